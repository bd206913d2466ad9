"""Workers that tell each other of their work and of caches, over every store, in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.sharing.service import MAX_OUTBOX_BYTES, Share
from gateway.store import MemoryStore
from gateway.store.streams import Passage
from routing.router import Change
from routing.sharing import Peerage
from routing.snapshot import cursor_of
from tests.gateway.sharing.sharing_worker import PATIENCE_S, SharingWorker, until
from tests.gateway.store.halves import Half, Redis


@contextlib.asynccontextmanager
async def workers(half: Half, count: int, *pools: str, snapshot_s: float = 30.0) -> AsyncIterator[list[SharingWorker]]:
    made = [SharingWorker(half.open(), *pools, snapshot_s=snapshot_s) for _ in range(count)]
    try:
        for worker in made:
            await worker.start()
        yield made
    finally:
        for worker in made:
            await worker.sharing.aclose()


async def test_what_one_does_all_know(half: Half) -> None:
    async with workers(half, 3, "a", "b") as (one, two, three):
        one.dispatch("1", 0, pool="a", seed=7)
        one.dispatch("2", 1, pool="b")
        two.dispatch("3", 1, pool="b", seed=8)
        for worker in (one, two, three):
            await until(lambda worker=worker: worker.queued("a") == [1, 0] and worker.queued("b") == [0, 2])  # type: ignore[misc]
            await until(lambda worker=worker: worker.knows(7, "a") and worker.knows(8, "b"))  # type: ignore[misc]
            assert not worker.knows(7, "b")


async def test_many_changes_go_out_in_few_messages(half: Half) -> None:
    async with workers(half, 2) as (one, two):
        for number in range(200):
            one.dispatch(str(number), seed=number + 1)
        await until(lambda: two.queued() == [200, 0])
        assert one.sharing.told <= 3


async def test_a_farewell_ends_work_at_once(half: Half) -> None:
    async with workers(half, 2) as (one, two):
        one.dispatch("1")
        await until(lambda: two.queued() == [1, 0])
        await one.sharing.aclose()
        assert await until(lambda: two.queued() == [0, 0]) < 1.5


async def test_silence_ends_work_and_a_heartbeat_keeps_it(half: Half) -> None:
    async with workers(half, 2) as (one, two):
        one.dispatch("1", seed=7)
        await until(lambda: two.queued() == [1, 0])
        with pytest.raises(TimeoutError):  # for longer than silence is borne
            await until(lambda: two.queued() != [1, 0], within_s=3.0)
        for task in one.sharing._tasks:  # as if it was killed
            task.cancel()
        took_s = await until(lambda: two.queued() == [0, 0])
        assert 1.0 < took_s < 4.0
        assert two.knows(7)


async def test_who_comes_late_learns_what_was_told(half: Half) -> None:
    async with workers(half, 1) as (one,):
        for number in range(50):
            one.dispatch(str(number), seed=number + 1)
            await asyncio.sleep(0.002)
        (share,) = one.sharing._shares.values()
        await until(lambda: not share.peerage._awake and not one.sharing._outbox)
        late = await SharingWorker(half.open()).start()
        assert all(late.knows(seed + 1) for seed in range(50))
        assert late.queued() == [0, 0]
        await until(lambda: late.queued() == [50, 0])
        await late.sharing.aclose()


async def test_who_comes_late_learns_from_a_snapshot_what_the_stream_no_longer_has(half: Half) -> None:
    async with workers(half, 2, snapshot_s=0.2) as (one, two):
        one.dispatch("1", seed=7)
        await until(lambda: two.knows(7))
        store = half.open()
        async with asyncio.timeout(PATIENCE_S):
            while (blob := await store.kept("routing/pool")) is None or len(blob) < 60:  # noqa: ASYNC110 - it is shared
                await asyncio.sleep(0.02)
        late = SharingWorker(half.open())
        late.sharing.refresh()
        share = Share("pool", late.pools["pool"], late.sharing._worker, lambda _: None)
        cursor = await late.sharing._restore(share)
        assert cursor
        assert late.knows(7)
        await late.sharing.aclose()


async def test_snapshot_and_stream_together_are_enough_for_who_comes_late() -> None:
    half = Redis(Path())
    await half.start()
    async with workers(half, 2, snapshot_s=0.2) as (one, two):
        one.dispatch("1", seed=7)
        await until(lambda: two.knows(7))
        blob = await two.store.kept("routing/pool")
        async with asyncio.timeout(PATIENCE_S):
            while blob is None or cursor_of(blob) < one.sharing._shares["pool"].cursor:
                blob = await two.store.kept("routing/pool")
                await asyncio.sleep(0.02)
        half.server.command("DEL", "tidegate:{stream:routing/pool}")
        one.dispatch("2", seed=8)
        await until(lambda: two.knows(8))
        late = await SharingWorker(half.open()).start()
        assert late.knows(7)
        assert late.knows(8)
        await late.sharing.aclose()
    await half.stop()


async def test_only_one_worker_makes_snapshots(half: Half) -> None:
    async with workers(half, 3, snapshot_s=0.1) as made:
        made[0].dispatch("1", seed=7)
        await until(lambda: all(worker.knows(7) for worker in made))
        await asyncio.sleep(0.5)
        others = half.open()
        assert not await others.claim("routing snapshot/pool", "somebody else", 1.0)
        keepers = [await others.claim("routing snapshot/pool", worker.sharing.worker, 1.0) for worker in made]
        assert sum(keepers) == 1


async def test_a_missed_message_is_repaired_by_a_snapshot(half: Half) -> None:
    async with workers(half, 2, snapshot_s=0.3) as (one, two):
        one.dispatch("1", seed=7)
        await until(lambda: two.knows(7))
        told = [each.peerage.pack() for each in one.sharing._shares.values()]
        assert told == [[]]
        one.dispatch("2", seed=8)
        (share,) = one.sharing._shares.values()
        assert share.peerage.pack()  # and lost
        one.dispatch("3", seed=9)
        await until(lambda: two.knows(9))
        assert two.sharing.gaps == 1
        assert not two.knows(8)
        assert two.queued() == [3, 0]
        await until(lambda: two.knows(8))


async def test_pools_come_and_go_with_a_reload(half: Half) -> None:
    async with workers(half, 2, "a") as (one, two):
        one.dispatch("1", pool="a")
        await until(lambda: two.queued("a") == [1, 0])
        for worker in (one, two):
            worker.pools = {**worker.pools, "b": worker.pool("b")}
            worker.sharing.refresh()
        one.dispatch("2", pool="b", seed=7)
        await until(lambda: two.queued("b") == [1, 0] and two.knows(7, "b"))
        gone = one.pools.pop("a")
        one.sharing.refresh()
        assert await until(lambda: two.queued("a") == [0, 0]) < 1.5
        assert gone.routing.on_change is None
        assert two.queued("b") == [1, 0]


async def test_a_replica_that_a_reload_adds_is_shared(half: Half) -> None:
    async with workers(half, 2) as (one, two):
        for worker in (one, two):
            pool = worker.pools["pool"]
            pool.replicas = (*pool.replicas, SharingWorker.pool("pool", 3).replicas[2])
            worker.sharing.refresh()
        one.dispatch("1", 2)
        await until(lambda: two.queued() == [0, 0, 1])


async def test_a_store_that_lost_everything_is_told_anew(half: Half, caplog: pytest.LogCaptureFixture) -> None:
    async with workers(half, 2) as (one, two):
        one.dispatch("1", seed=7)
        await until(lambda: two.queued() == [1, 0])
        await half.restart()
        if not isinstance(one.store, MemoryStore):  # which ends with its worker
            one.dispatch("2", seed=8)
            async with asyncio.timeout(PATIENCE_S):
                while not (two.queued() == [2, 0] and two.knows(8)):
                    await half.pass_time(1.0)  # before which a lost connection is not opened again
                    await asyncio.sleep(0.05)
        assert sum("Traceback" in record.getMessage() for record in caplog.records) == 0


async def test_while_the_store_is_away_nothing_grows_and_decisions_go_on() -> None:
    store = MemoryStore()
    one = await SharingWorker(store).start()
    await store.aclose()
    for number in range(3_000):
        one.dispatch(str(number), seed=number + 1)
        if number % 100 == 0:
            one.sharing._due.set()
            await asyncio.sleep(0.001)
    assert one.sharing._outbox_bytes <= MAX_OUTBOX_BYTES
    assert one.knows(3_000)
    assert one.queued() == [3_000, 0]
    await one.sharing.aclose()


async def test_much_that_peers_tell_at_once_is_taken_in_steps() -> None:
    """A page may have megabytes after Redis was away: half a second in which no request would be served."""
    teller, hearer = (SharingWorker(MemoryStore()) for _ in range(2))
    told: list[bytes] = []
    peers = Peerage(b"a worker", teller.pools["pool"].routing, teller.pools["pool"].replicas, lambda _: None)
    first = teller.pools["pool"].replicas[0]
    for number in range(20):
        digests = range(number * 5000, number * 5000 + 5000)
        peers._learned(Change(first, digests, [128] * 5000))
        told += peers.pack()
    hearer.sharing.refresh()
    passage = Passage("routing/pool", "1", tuple(told))
    taking = asyncio.ensure_future(hearer.sharing._take((passage,)))
    turns = 0
    while not taking.done():
        turns += 1
        await asyncio.sleep(0)
    assert await taking == len(told)
    assert turns > sum(map(len, told)) / 70_000
    await hearer.sharing.aclose()
