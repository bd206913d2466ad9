"""What is the memory store's own: how much it keeps, and what waiting costs."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store import START, MemoryStore, StoreFull
from gateway.store.memory import FACT_BYTES, Expiries, FactLog, Leases
from tests.gateway.store.halves import Clock


def test_renewals_do_not_pile_up() -> None:
    leases, facts = Leases(), FactLog("life")
    for number in range(10_000):
        leases.claim("job", "a", 3600.0, now=number / 1000)
        facts.post("x", b"1", 3600.0, now=number / 1000)
    assert len(leases._expiries) < 200
    assert len(facts._expiries) < 200


def test_names_run_out_in_the_order_of_their_last_ends() -> None:
    expiries = Expiries()
    for name, ends_at in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("a", 4.0), ("d", 5.0)):
        expiries.set(name, ends_at)
    expiries.discard("c")
    assert expiries.next_at() == 2.0
    assert list(expiries.take_due(4.0)) == ["b", "a"]
    assert expiries.next_at() == 5.0
    assert list(expiries.take_due(5.0)) == ["d"]
    assert expiries.next_at() is None


async def test_what_has_ended_takes_no_room() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_tombstones=10)
    for number in range(1000):
        await store.claim(f"job {number}", "a", 1.0)
        await store.post(f"key {number}", b"1", 1.0)
        await store.post(f"other key {number}", b"1")
        await store.withdraw(f"other key {number}")
    clock.now += 1.0
    await store.claim("job", "a", 1.0)
    await store.read_since(START)
    assert repr(store) == "<MemoryStore leases=1 facts=0 waiting=0>"
    assert len(store._facts._ended) == 10
    assert store._facts._size_bytes == 0


async def test_facts_beyond_the_limit_are_refused_until_others_end() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_facts_bytes=2 * (FACT_BYTES + 10))
    await store.post("é", b"x" * 8)
    await store.post("ab", b"x" * 8, 5.0)
    cursor = (await store.read_since(START)).cursor
    with pytest.raises(StoreFull, match="220 bytes"):
        await store.post("cd", b"")
    with pytest.raises(StoreFull):
        await store.post("ab", b"x" * 9)
    assert not (await store.read_since(cursor)).changes
    await store.post("ab", b"x" * 8, 5.0)
    clock.now += 5.0
    await store.post("cd", b"x" * 8)
    await store.withdraw("cd")
    await store.post("ef", b"x" * 8)


async def test_leases_beyond_the_limit_are_refused_until_others_end() -> None:
    clock = Clock()
    store = MemoryStore(clock, max_leases=2)
    assert await store.claim("job 1", "a", 5.0)
    assert await store.claim("job 2", "a", 5.0)
    with pytest.raises(StoreFull, match="2 leases"):
        await store.claim("job 3", "a", 5.0)
    assert await store.claim("job 1", "a", 50.0)
    clock.now += 5.0
    assert await store.claim("job 3", "a", 5.0)


async def test_a_cancelled_wait_leaves_nothing() -> None:
    store = MemoryStore()
    cursor = (await store.read_since(START)).cursor
    reading = [asyncio.create_task(store.read_since(cursor, 10.0)) for _ in range(5)]
    await asyncio.sleep(0)
    assert repr(store) == "<MemoryStore leases=0 facts=0 waiting=5>"
    for task in reading:
        task.cancel()
    await asyncio.wait(reading)
    assert repr(store) == "<MemoryStore leases=0 facts=0 waiting=0>"


async def test_a_reader_that_waits_sleeps_until_something_happens() -> None:
    """The clock is asked whenever a wait looks around: twice for the whole wait, and never for the posts before it."""
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return 1000.0

    store = MemoryStore(clock)
    await store.post("x", b"1", 3600.0)
    await store.claim("job", "a", 0.001)
    cursor = (await store.read_since(START)).cursor
    asked = 0
    await store.read_since(cursor, 0.3)
    assert asked == 2
