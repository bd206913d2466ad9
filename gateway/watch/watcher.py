"""One worker's watch over the fleet: a patrol at every replica, and one reader of what the workers post."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import msgspec

from backends.upstream import Upstream
from gateway.config import Backend, KvEvents
from gateway.fleet import Pool
from gateway.runtime import Runtime
from gateway.store.protocol import START, Store, StoreError
from gateway.watch import notes
from gateway.watch.board import Board
from gateway.watch.patrol import Patrol
from routing.health import Change
from routing.types import Replica

if TYPE_CHECKING:  # imported where it is used: ZeroMQ is loaded only where KV events are followed
    import zmq

    from backends.kvevents.subscriber import Socket
    from gateway.watch.kv_listener import KvListener

logger = logging.getLogger(__name__)

_WAIT_S = 10.0
_AGAIN_S = 1.0
_RECOVERED_S = 5.0
_NOT_OF_ONE_REPLICA = {"replicas": (), "discovery": None, "launch": None, "scaling": None}
"""Parts of a pool's settings that a patrol at one replica does not go by."""


class Watcher:
    """Starts with `start`, follows reloads with `refresh`, ends with `aclose`. Belongs to one event loop."""

    def __init__(self, runtime: Runtime, rng: Random) -> None:
        self._runtime = runtime
        self._store: Store = runtime.store
        self._rng = rng
        self._holder = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._board = Board(runtime, self._holder)
        self._patrols: dict[Upstream, tuple[object, Patrol, asyncio.Task[None]]] = {}
        """By replica: what its patrol was made from, and the patrol."""
        self._settings_of: dict[str, Backend] = {}
        """By pool: what its patrols go by."""
        self._listeners: dict[Upstream, tuple[KvListener, asyncio.Task[None]]] = {}
        self._zmq: zmq.Context[Socket] | None = None
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._runtime.witness.on_change = self._share
        self.refresh()

    async def first_look(self, within_s: float) -> None:
        """Wait until each replica was asked once and the answers are taken in, but not for long.

        Without it the first requests would meet engines of which nothing is known: a llama.cpp whose adapters must be
        switched off by number, a replica that is away.
        """
        try:
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(patrol.made_a_round.wait() for _, patrol, _ in self._patrols.values()))
        except TimeoutError:
            logger.info("not every replica has answered yet; serving all the same")
        try:
            async with asyncio.timeout(within_s):
                facts = await self._store.read_since(START)
        except (TimeoutError, StoreError):
            return
        for fact in facts.changes:
            self._board.apply(fact, old=True)

    def refresh(self) -> None:
        """Watch the fleet as it is now: after a start and after every reload."""
        fleet = self._runtime.fleet
        patrols: dict[Upstream, tuple[object, Patrol, asyncio.Task[None]]] = {}
        anew = self._reader is None
        for pool in fleet.pools.values():
            model = self._model_of(pool)
            settings = pool.settings.model_copy(update=_NOT_OF_ONE_REPLICA)
            if (before := self._settings_of.get(pool.name)) == settings:
                settings = before  # told by identity from here on: equality looks at everything, for each replica
            self._settings_of[pool.name] = settings
            entries = {each.name: each for each in pool.settings.replicas}
            for upstream in pool.upstreams.values():
                # Where anything has changed a patrol begins anew, which costs one round of questions. Replicas come
                # and go by the minute where they are discovered: that must not have all the others asked again.
                wanted = (settings, entries[upstream.replica.name], model)
                known = self._patrols.pop(upstream, None)
                if known is not None and known[0] == wanted:
                    patrols[upstream] = known
                    continue
                if known is not None:
                    known[2].cancel()
                warm = self._runtime.warmer.warm
                patrol = Patrol(upstream, pool.settings, model, self._store, self._holder, warm)
                task = asyncio.create_task(self._walk(patrol), name=f"patrol {upstream.replica.name}")
                patrols[upstream] = (wanted, patrol, task)
                anew = True
        for _, _, task in self._patrols.values():
            task.cancel()
        self._patrols = patrols
        self._refresh_listeners()
        if anew:  # facts about replicas that are new here were passed over when they came
            if self._reader is not None:
                self._reader.cancel()
            self._reader = asyncio.create_task(self._read(), name="board")

    def _refresh_listeners(self) -> None:
        """Follow the KV events of the replicas that are to be followed; those that were keep what they know."""
        listeners: dict[Upstream, tuple[KvListener, asyncio.Task[None]]] = {}
        for pool in self._runtime.fleet.pools.values():
            wanted = {entry.name: entry.kv_events for entry in pool.settings.replicas}
            for upstream in pool.upstreams.values():
                settings = wanted.get(upstream.replica.name)
                if settings is None:
                    continue
                before = self._listeners.pop(upstream, None)
                if before is not None and before[0].settings == settings:
                    listeners[upstream] = before
                    continue
                if before is not None:
                    before[1].cancel()
                listener = self._listener(upstream, settings, pool)
                task = asyncio.create_task(listener.run(), name=f"kv events {upstream.replica.name}")
                listeners[upstream] = (listener, task)
        for _, task in self._listeners.values():
            task.cancel()
        self._listeners = listeners
        self._runtime.kv_listeners = {upstream.replica: listener for upstream, (listener, _) in listeners.items()}

    def _listener(self, upstream: Upstream, settings: KvEvents, pool: Pool) -> KvListener:
        import zmq

        from gateway.watch.kv_listener import KvListener

        if self._zmq is None:
            self._zmq = zmq.Context()
        models = self._runtime.settings.models.values()
        exact = any(model.tokenizer is not None and model.backend == pool.name for model in models)
        seeds = partial(self._event_seed, pool.name) if exact else None
        return KvListener(upstream, settings, self._zmq, pool.routing, seeds)

    def _event_seed(self, pool: str, adapter: str | None, cache_salt: str | None) -> int | None:
        """The seed of prompts over tokens that are cached by the replicas of a pool."""
        for route in self._runtime.fleet.models.values():
            if route.pool.name == pool and route.adapter is None:
                seed = route.reader.event_seed(adapter, cache_salt)
                if seed is not None:
                    return seed
        return None

    async def aclose(self) -> None:
        self._runtime.witness.on_change = None
        listening = [task for _, task in self._listeners.values()]
        patrols = [task for _, _, task in self._patrols.values()]
        tasks = [*listening, *patrols, *([self._reader] if self._reader is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._patrols.clear()
        self._listeners.clear()
        self._reader = None
        if self._zmq is not None:
            self._zmq.term()
            self._zmq = None

    def _model_of(self, pool: Pool) -> str | None:
        """The name under which a pool's model is asked for: that of the first model that uses it."""
        for route in self._runtime.fleet.models.values():
            if route.pool is pool:
                return route.upstream_model or route.name
        return None

    async def _walk(self, patrol: Patrol) -> None:
        """Keep a patrol going whatever happens to the store or in it."""
        while True:
            try:
                await patrol.run(self._rng)
            except StoreError as error:
                logger.debug("patrol: %s", error)
            except Exception:
                logger.exception("a replica's patrol failed; it goes on in a moment")
            await asyncio.sleep(_AGAIN_S)

    async def _read(self) -> None:
        cursor = START
        unavailable = False
        while True:
            try:
                facts = await self._store.read_since(cursor, _WAIT_S)
            except StoreError as error:
                if not unavailable:
                    logger.warning("%s; replicas are judged by this worker's own requests alone", error)
                unavailable = True
                await asyncio.sleep(_AGAIN_S)
                continue
            unavailable = False
            cursor = facts.cursor
            if facts.reset:
                self._board.reset()
            for fact in facts.changes:
                try:
                    self._board.apply(fact, old=facts.reset)
                except Exception:
                    logger.exception("a note about a replica could not be used")

    def _share(self, replica: Replica, change: Change) -> None:
        """Tell the other workers what this one has seen. In the background: no request waits for it."""
        if change is Change.EJECTED:
            self._runtime.spawn(self._post_ejection(replica))
        elif change is Change.RECOVERED:
            self._runtime.spawn(self._post_recovery(replica))

    async def _post_ejection(self, replica: Replica) -> None:
        left_s = replica.health.ejection.until - time.monotonic()
        if left_s > 0:
            note = notes.EjectionNote(time.time() + left_s)
            await self._quietly(notes.key(notes.EJECTED, replica, self._holder), note, left_s)

    async def _post_recovery(self, replica: Replica) -> None:
        await self._quietly(
            notes.key(notes.RECOVERED, replica, self._holder), notes.EjectionNote(time.time()), _RECOVERED_S
        )

    async def _quietly(self, key: str, note: msgspec.Struct, ttl_s: float) -> None:
        try:
            await self._store.post(key, msgspec.json.encode(note), ttl_s)
        except StoreError as error:
            logger.debug("not shared: %s", error)
