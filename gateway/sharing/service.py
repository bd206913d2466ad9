"""One worker's exchange with its peers: tells what `Peerage` packs, takes in what others tell, by way of the store.

Nothing here is waited for by a request. While the store is away, decisions go on with this worker's own counts; what
peers said of their work runs out, and all of it comes back by itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from random import Random
from typing import Protocol

from gateway.sharing.outage import Outage
from gateway.store.protocol import START, Store, StoreError
from gateway.store.streams import MAX_BLOB_BYTES, Passage
from routing import snapshot
from routing.router import PoolState
from routing.sharing import FLUSH_S, HEARTBEAT_S, WORKER_BYTES, Peerage
from routing.types import Replica

logger = logging.getLogger(__name__)

SNAPSHOT_S = 30.0
GATHER_S = 0.005
"""Between two answers of the store: bounds how often a worker with many busy peers is woken."""
STEP_BYTES = 32_768
"""Messages that are taken in at a time: two milliseconds' work."""
WAIT_S = 5.0
AGAIN_S = 0.5
LOOK_S = 0.25
"""How often silence of peers is looked for."""
MAX_OUTBOX_BYTES = 262_144
"""Messages that the store has not taken. Beyond that the oldest are given up; a snapshot repairs it."""
FAREWELL_S = 0.5


class SharedPool(Protocol):
    """What is shared of a pool."""

    @property
    def routing(self) -> PoolState: ...

    @property
    def replicas(self) -> Iterable[Replica]: ...


class Share:
    """One pool's part."""

    def __init__(self, name: str, pool: SharedPool, worker: bytes, wake: Callable[[bool], None]) -> None:
        self.name = name
        self.stream = f"routing/{name}"
        self.peerage = Peerage(worker, pool.routing, pool.replicas, wake)
        self.cursor = START
        self.joined = False
        """What others knew before this worker began is taken in."""
        self.repair_at: float | None = None
        """Messages were missed: when there will be a snapshot that has what they said."""


class Sharing:
    """Starts with `start`, follows reloads with `refresh`, ends with `aclose`. Belongs to one event loop.

    `pools` gives the pools as they are now, by name. `snapshot_s`: between two snapshots of an index, of which one
    worker makes one for all.
    """

    def __init__(
        self,
        store: Store,
        pools: Callable[[], Mapping[str, SharedPool]],
        *,
        rng: Random | None = None,
        snapshot_s: float = SNAPSHOT_S,
    ) -> None:
        self._store = store
        self._pools = pools
        self._rng = rng or Random()
        self._snapshot_s = snapshot_s
        self._worker = secrets.token_bytes(WORKER_BYTES)
        self._shares: dict[str, Share] = {}
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = 0.0
        self._heartbeat = False
        self._outbox: deque[tuple[str, bytes]] = deque()
        self._outbox_bytes = 0
        self._outage = Outage()
        self._caught_up = asyncio.Event()
        self._hearing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.told = 0
        """Messages that the store has taken."""
        self.told_bytes = 0
        self.heard = 0
        """Messages that the store has given, the own ones included."""

    def __repr__(self) -> str:
        return f"<Sharing pools={len(self._shares)} peers={self.peers} told={self.told} heard={self.heard}>"

    @property
    def worker(self) -> str:
        """The name of this life of this worker."""
        return self._worker.hex()

    @property
    def peers(self) -> int:
        """Peers that have work now, in the pool that has most of them."""
        return max((share.peerage.peers for share in self._shares.values()), default=0)

    @property
    def gaps(self) -> int:
        """Messages of peers that were missed."""
        return sum(share.peerage.gaps for share in self._shares.values())

    def start(self) -> None:
        """From now on decisions take account of peers, as soon as they are heard."""
        create = asyncio.get_running_loop().create_task
        self._tasks = [
            create(self._tell(), name="sharing tells"),
            create(self._beat(), name="sharing beats"),
            create(self._keep_snapshots(), name="sharing snapshots"),
        ]
        self.refresh()

    async def first_look(self, within_s: float) -> bool:
        """Wait until what others knew before is taken in, but not for long. Whether it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._caught_up.wait()
        return self._caught_up.is_set()

    def refresh(self) -> None:
        """Share the pools as they are now: after a start and after every reload."""
        pools = self._pools()
        for name in self._shares.keys() - pools.keys():
            share = self._shares.pop(name)
            self._put(share.stream, share.peerage.leave())
        for name, pool in pools.items():
            known = self._shares.get(name)
            if known is not None and known.peerage.state is pool.routing:
                known.peerage.refresh(pool.replicas)
                continue
            if known is not None:
                self._put(known.stream, known.peerage.leave())
            self._shares[name] = Share(name, pool, self._worker, self._wake)
            self._caught_up.clear()
        if self._hearing is not None:
            self._hearing.cancel()
        self._hearing = asyncio.get_running_loop().create_task(self._hear(), name="sharing hears")
        self._due.set()

    async def aclose(self) -> None:
        """Say farewell, so that peers drop this worker's work at once, and end."""
        tasks = [*self._tasks, *([self._hearing] if self._hearing is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._hearing = None
        if self._timer is not None:
            self._timer.cancel()
        for share in self._shares.values():
            self._put(share.stream, share.peerage.leave())
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._send()
                await asyncio.gather(*(self._store.release(_lease(name), self.worker) for name in self._shares))
        self._shares.clear()

    # -- telling

    def _wake(self, at_once: bool) -> None:
        """There is something to tell. The one thing here that happens on a request's way."""
        if at_once:
            self._ring()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._told_at + FLUSH_S), self._ring)

    def _ring(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due.set()

    def _put(self, stream: str, message: bytes) -> None:
        self._outbox.append((stream, message))
        self._outbox_bytes += len(message)
        while self._outbox_bytes > MAX_OUTBOX_BYTES:
            self._outbox_bytes -= len(self._outbox.popleft()[1])

    async def _tell(self) -> None:
        """Whatever is to be told, one batch at a time: what comes up while the store is slow is told together."""
        loop = asyncio.get_running_loop()
        lost = False
        delay_s = 0.0
        while True:
            await self._due.wait()
            self._due.clear()
            self._told_at = loop.time()
            heartbeat, self._heartbeat = self._heartbeat or lost, False
            for share in self._shares.values():
                for message in share.peerage.pack(heartbeat=heartbeat):
                    self._put(share.stream, message)
            try:
                await self._send()
                lost, delay_s = False, 0.0
            except StoreError as error:
                logger.debug("not told to peers: %s", error)
                # What was told at last may be out of date when the store takes messages again.
                lost = True
                delay_s = min(max(2 * delay_s, FLUSH_S), AGAIN_S)
                await asyncio.sleep(delay_s * self._rng.uniform(0.8, 1.2))
                self._due.set()
            except Exception:
                logger.exception("what peers should know could not be told; it goes on in a moment")
                await asyncio.sleep(AGAIN_S)

    async def _send(self) -> None:
        """All that is in the outbox. What fails stays there: peers pass over what they hear twice."""
        while self._outbox:
            batch = list(self._outbox)
            if len(batch) == 1:
                await self._store.publish(*batch[0])
            else:
                await asyncio.gather(*(self._store.publish(*each) for each in batch))
            for each in batch:
                if self._outbox and self._outbox[0] is each:  # else it was given up meanwhile
                    self._outbox_bytes -= len(self._outbox.popleft()[1])
                self.told += 1
                self.told_bytes += len(each[1])

    async def _beat(self) -> None:
        """Tell work that lasts again and again, and notice peers that have fallen silent."""
        next_at = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for share in self._shares.values():
                share.peerage.expire(now)
            if now >= next_at:
                next_at = now + HEARTBEAT_S - LOOK_S / 2
                self._heartbeat = True
                self._due.set()

    # -- hearing

    async def _hear(self) -> None:
        while True:
            try:
                await self._hear_on()
            except StoreError as error:
                self._outage.failed(error, time.monotonic())
                await asyncio.sleep(AGAIN_S * self._rng.uniform(0.8, 1.2))
            except Exception:
                logger.exception("what peers tell could not be used; it goes on in a moment")
                await asyncio.sleep(AGAIN_S)

    async def _hear_on(self) -> None:
        """Until the store fails."""
        for share in self._shares.values():
            if not share.joined:
                await self._join(share)
        self._caught_up.set()
        while True:
            cursors = {share.stream: share.cursor for share in self._shares.values()}
            passages = await self._store.follow(cursors, WAIT_S)
            self._outage.ended(time.monotonic())
            if passages:
                await self._take(passages)
                await asyncio.sleep(GATHER_S)
            for share in self._shares.values():
                if share.repair_at is not None and time.monotonic() >= share.repair_at:
                    share.repair_at = None
                    await self._restore(share)

    async def _take(self, passages: tuple[Passage, ...], *, old: bool = False) -> int:
        """How many messages there were. Lets requests pass in between; what is cut off by that is read again."""
        shares = {share.stream: share for share in self._shares.values()}
        now = time.monotonic()
        count = taken_bytes = 0
        for passage in passages:
            share = shares.get(passage.stream)
            if share is None:
                continue
            absorb = share.peerage.absorb
            for message in passage.payloads:
                if not absorb(message, now, old=old) and share.repair_at is None:
                    share.repair_at = now + 1.5 * self._snapshot_s
                taken_bytes += len(message)
                if taken_bytes >= STEP_BYTES:
                    taken_bytes = 0
                    await asyncio.sleep(0)
                    now = time.monotonic()
            share.cursor = passage.cursor
            count += len(passage.payloads)
        self.heard += count
        return count

    async def _join(self, share: Share) -> None:
        """Take in the last snapshot, and what was told since. Of work, only what is told from now on counts."""
        share.cursor = await self._restore(share)
        while True:
            passages = await self._store.follow({share.stream: share.cursor})
            if not await self._take(passages, old=True):
                break
            await asyncio.sleep(0)
        share.joined = True

    async def _restore(self, share: Share) -> str:
        """Take in the last snapshot; the cursor of the last message that it covers."""
        blob = await self._store.kept(share.stream)
        if blob is None:
            return START
        try:
            for _ in snapshot.restore(share.peerage, blob):
                await asyncio.sleep(0)
            return snapshot.cursor_of(blob)
        except snapshot.SnapshotError as error:
            logger.info("the snapshot of pool %s is of no use here: %s", share.name, error)
            return START

    # -- snapshots

    async def _keep_snapshots(self) -> None:
        while True:
            await asyncio.sleep(self._snapshot_s * self._rng.uniform(0.8, 1.2))
            for share in tuple(self._shares.values()):
                try:
                    await self._keep_snapshot(share)
                except StoreError as error:
                    logger.debug("no snapshot of pool %s: %s", share.name, error)
                except Exception:
                    logger.exception("a snapshot of pool %s could not be made", share.name)

    async def _keep_snapshot(self, share: Share) -> None:
        """Make one, unless another worker does, or this one knows nothing."""
        if not share.joined or share.cursor == START:
            return
        if not await self._store.claim(_lease(share.name), self.worker, 2 * self._snapshot_s):
            return
        packing = snapshot.pack(share.peerage, share.cursor, MAX_BLOB_BYTES)
        while True:
            try:
                next(packing)
            except StopIteration as done:
                await self._store.keep(share.stream, done.value, 20 * self._snapshot_s)
                return
            await asyncio.sleep(0)


def _lease(pool: str) -> str:
    return f"routing snapshot/{pool}"
