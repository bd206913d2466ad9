"""Has LoRA adapters loaded where requests that want them are sent, and others unloaded to make room.

Which replica a request goes to is the policy's business, and what may go `routing.adapters`'; this carries it out. One
adapter is loaded at a time at each engine, and everybody who waits for the same one waits for the same load. A lease
keeps two workers from loading at one engine at once; without the store they may, which costs loads and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

import msgspec
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from backends.dialects.protocol import AdapterRefused, NotOffered
from backends.side import SideChannelError
from backends.signals import ADAPTERS as ADAPTERS_SIGNAL
from backends.upstream import Upstream
from gateway.adapter_orders import AdapterOrders, held
from gateway.errors import GatewayError, UpstreamTimeout
from gateway.fleet import Fleet
from gateway.record import Outcome
from gateway.store.protocol import Store, StoreError
from gateway.watch import notes
from routing import adapters as rules

logger = logging.getLogger(__name__)

LEASE_S = 10.0
LOOK_S = 0.05
"""How often is looked whether it is this worker's turn, or a slot has become free."""
LOADING_S = 180.0
"""For how long others are told of a load at most: longer than a dialect gives an engine for it."""
SLOT_WAIT_S = 60.0
"""How long a load waits for a slot."""
HEEDED_S = 5.0
"""How long an engine's word is heeded that somebody else uses an adapter: an idle one repeats its last word forever."""


class AdapterAway(GatewayError):
    """The adapter could not be had at a replica. Another one may have it."""

    status = 503
    code = "adapter_unavailable"
    outcome = Outcome.UNAVAILABLE


class _Load:
    """One adapter on its way to one engine, and how many requests wait for it."""

    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.waiting = 0


class AdapterKeeper:
    """One worker's. `fleet` gives the fleet as it is now."""

    def __init__(self, store: Store, fleet: Callable[[], Fleet]) -> None:
        self._store = store
        self._fleet = fleet
        self._orders = AdapterOrders(store)
        self._holder = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._loads: dict[tuple[str, str, str], _Load] = {}
        """By pool, engine and adapter."""
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self.loads: Counter[tuple[str, str]] = Counter()
        """By pool and outcome: `loaded`, `failed`."""
        self.evictions: Counter[str] = Counter()
        self.load_ms: Counter[str] = Counter()
        """Time spent loading."""

    async def ensure(self, upstream: Upstream, adapter: str, within_s: float) -> None:
        """Returns once the replica has the adapter in memory.

        Raises `AdapterAway` when it cannot be had there, `SideChannelError` when the engine does not answer, and
        `UpstreamTimeout` after `within_s` seconds. The load goes on without whoever stops waiting, unless it has not
        begun and nobody else wants it.
        """
        replica = upstream.replica
        if replica.adapters is not None and adapter in replica.adapters:
            return
        key = (replica.pool, replica.url, adapter)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(asyncio.create_task(self._bring(upstream, adapter), name="adapter"))
            load.task.add_done_callback(lambda task: self._end(key, task))
        load.waiting += 1
        try:
            async with asyncio.timeout(within_s):
                await asyncio.shield(load.task)
        except TimeoutError as error:
            raise UpstreamTimeout(f"The adapter was not loaded within {within_s:g} s.") from error
        except asyncio.CancelledError:
            if load.task.cancelled():  # not this request's end: the gateway's own
                raise AdapterAway("The adapter was not loaded.", retry_after_s=1.0) from None
            raise
        finally:
            load.waiting -= 1

    def missed(self, upstream: Upstream, adapter: str) -> AdapterAway:
        """The engine says that it does not know an adapter that it was taken to hold: somebody has unloaded it."""
        for each in self._ranks(upstream):
            each.holds(tuple(known for known in each.adapters if known.name != adapter))
        return AdapterAway("The model server has just unloaded the adapter.", retry_after_s=1.0)

    async def aclose(self) -> None:
        """Stop what waits. An engine that has been told to load goes on with it."""
        tasks = [load.task for load in self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def families(self) -> Iterator[Metric]:
        """How often adapters were loaded and dropped because of requests, and how long it took."""
        loads = CounterMetricFamily(
            "tidegate_adapter_loads", "Adapters loaded for requests.", labels=["pool", "outcome"]
        )
        for (pool, outcome), count in list(self.loads.items()):
            loads.add_metric([pool, outcome], count)
        evictions = CounterMetricFamily(
            "tidegate_adapter_evictions", "Adapters unloaded to make room for others.", labels=["pool"]
        )
        for pool, count in list(self.evictions.items()):
            evictions.add_metric([pool], count)
        seconds = CounterMetricFamily(
            "tidegate_adapter_load_seconds", "Time that engines took to load adapters.", labels=["pool"]
        )
        for pool, spent_ms in list(self.load_ms.items()):
            seconds.add_metric([pool], spent_ms / 1000)
        yield loads
        yield evictions
        yield seconds

    def _end(self, key: tuple[str, str, str], task: asyncio.Task[None]) -> None:
        del self._loads[key]
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody did, nobody needs it

    def _ranks(self, upstream: Upstream) -> Sequence[Upstream]:
        """The replicas that are ranks of the same engine, this one first: all of them have the same adapters."""
        replica = upstream.replica
        pool = self._fleet().pools.get(replica.pool)
        others = () if pool is None else pool.upstreams.values()
        return [upstream, *(each for each in others if each.replica.url == replica.url and each is not upstream)]

    async def _bring(self, upstream: Upstream, adapter: str) -> None:
        """See `ensure`."""
        replica = upstream.replica
        ranks = self._ranks(upstream)
        for each in ranks:
            each.replica.loading |= {adapter}
        turn = self._turns.setdefault((replica.pool, replica.url), asyncio.Lock())
        try:
            async with turn, self._lease(upstream, adapter) as needed:
                if needed:
                    await self._load(upstream, ranks, adapter)
        except AdapterRefused as error:
            replica.shelf.refuse(adapter, time.monotonic())
            self.loads[replica.pool, "failed"] += 1
            # The engine's words may have paths of its disk in them.
            logger.warning("replica %s does not load the adapter %s: %s", replica.name, adapter, error)
            raise AdapterAway("The model server would not load the adapter.") from error
        except NotOffered as error:
            for each in ranks:
                each.replica.loadable = frozenset()  # until it begins anew
            upstream.signals.lacks(ADAPTERS_SIGNAL, str(error))
            raise AdapterAway("The model server cannot be told to load adapters.") from error
        except SideChannelError:
            self.loads[replica.pool, "failed"] += 1
            raise
        finally:
            for each in ranks:
                each.replica.loading -= {adapter}

    async def _load(self, upstream: Upstream, ranks: Sequence[Upstream], adapter: str) -> None:
        """Load, after making room. Whoever calls has the turn and the lease."""
        replica = upstream.replica
        path = next((each.path for each in upstream.configured_adapters if each.name == adapter), None)
        if path is None:
            raise AdapterAway("The adapter is not configured any more.")
        # What is known here may be some seconds old, and other workers load too.
        await self._look(upstream, ranks)
        if adapter not in (replica.adapters or ()):
            await self._tell_loading(ranks)
            try:
                while rules.lacking_slots(replica, alone=True) > 0:
                    await self._make_room(upstream, ranks, adapter)
                began = time.monotonic()
                if await self._orders.load(upstream, adapter, path) is None:
                    took_ms = (time.monotonic() - began) * 1000.0
                    for each in ranks:
                        rules.learn_load(each.replica, took_ms)
                    self.loads[replica.pool, "loaded"] += 1
                    self.load_ms[replica.pool] += round(took_ms)
                    logger.info("replica %s has loaded the adapter %s in %.0f ms", replica.name, adapter, took_ms)
            finally:
                with suppress(StoreError):
                    for each in ranks:
                        await self._store.withdraw(notes.key(notes.LOADING, each.replica))
                with suppress(SideChannelError, NotOffered):
                    await self._look(upstream, ranks)
        for each in ranks:
            await self._orders.post(each, each.adapters)
        if adapter not in (replica.adapters or ()):
            raise AdapterAway("The model server does not list the adapter that it has loaded.")

    async def _make_room(self, upstream: Upstream, ranks: Sequence[Upstream], adapter: str) -> None:
        """Unload one adapter, as soon as one is not in use any more. Raises `AdapterAway` if that takes too long.

        Where all are always in use, the one that has been there for longest gets no new requests, and goes when the
        last one under way has ended.
        """
        replica = upstream.replica
        gone = leaving = ""
        try:
            began = time.monotonic()
            while not gone:
                load = self._loads.get((replica.pool, replica.url, adapter))
                if time.monotonic() - began > SLOT_WAIT_S or load is None or not load.waiting:
                    raise AdapterAway("All adapters that the model server has room for are in use.", retry_after_s=1.0)
                elsewhere = await self._running(upstream) if time.monotonic() - began < HEEDED_S else set()
                busy = elsewhere.union(*(each.replica.adapter_use for each in ranks))
                now = time.monotonic()
                gone = leaving if leaving and leaving not in busy else rules.victim(replica, busy, now) or ""
                if not gone and not leaving:
                    leaving = rules.next_to_go(replica, now) or ""
                    if leaving:
                        self._hide(ranks, leaving)
                        await self._orders.post(upstream, upstream.adapters)
                if not gone:
                    await asyncio.sleep(LOOK_S)
            self._hide(ranks, gone)  # at once: from here on no request of this worker is sent for it
            await self._orders.unload(upstream, gone)
            self.evictions[replica.pool] += 1
            logger.info("replica %s has dropped the adapter %s to make room for %s", replica.name, gone, adapter)
        finally:
            for each in ranks:
                each.dropping -= {gone, leaving}
        await self._look(upstream, ranks)

    @staticmethod
    def _hide(ranks: Sequence[Upstream], adapter: str) -> None:
        for each in ranks:
            each.dropping.add(adapter)
            each.holds(each.adapters)

    @staticmethod
    async def _look(upstream: Upstream, ranks: Sequence[Upstream]) -> None:
        """Learn from the engine what it holds now."""
        found = await held(upstream)
        if found is None:
            raise NotOffered("it does not list its adapters")
        for each in ranks:
            each.holds(found)

    @staticmethod
    async def _running(upstream: Upstream) -> set[str]:
        """The adapters of requests that the engine runs, other gateways' included, where it tells."""
        try:
            load = await upstream.dialect.load(upstream.side, upstream.replica.dp_rank)
        except (NotOffered, SideChannelError):
            return set()
        return set() if load.running == 0 else set(load.resident_adapters or ())

    async def _tell_loading(self, ranks: Sequence[Upstream]) -> None:
        for each in ranks:
            note = msgspec.json.encode(notes.LoadingNote(tuple(each.replica.loading)))
            with suppress(StoreError, ValueError):
                await self._store.post(notes.key(notes.LOADING, each.replica), note, LOADING_S)

    @asynccontextmanager
    async def _lease(self, upstream: Upstream, adapter: str) -> AsyncIterator[bool]:
        """Hold the right to change this engine's adapters. Gives False if another worker has loaded it meanwhile."""
        replica = upstream.replica
        first = min(self._ranks(upstream), key=lambda each: each.replica.identity).replica
        name = f"adapters/{notes.replica_key(first)}"
        began = time.monotonic()
        while not await self._claimed(name):
            if adapter in (replica.adapters or ()):
                yield False
                return
            if time.monotonic() - began > SLOT_WAIT_S:
                raise AdapterAway("Another worker is changing the adapters there.", retry_after_s=1.0)
            await asyncio.sleep(LOOK_S)
        renewal = asyncio.create_task(self._renew(name), name="adapter lease")
        try:
            yield True
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])
            with suppress(StoreError):
                await self._store.release(name, self._holder)

    async def _claimed(self, lease: str) -> bool:
        try:
            return await self._store.claim(lease, self._holder, LEASE_S)
        except StoreError as error:
            logger.debug("adapters are changed without a lease: %s", error)
            return True

    async def _renew(self, lease: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await self._claimed(lease)
