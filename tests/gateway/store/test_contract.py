"""What `gateway.store.protocol` promises, held against every implementation."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store import START, Fact, Facts, Store, StoreUnavailable
from gateway.store.protocol import MAX_NAME_BYTES, MAX_TTL_S, MAX_VALUE_BYTES, MAX_WAIT_S
from tests.gateway.store.halves import TOMBSTONES, Half

LOOPS = ("asyncio", "uvloop")
PATIENCE_S = 10.0
ARABIC_ONE = "\u0661"
"""A decimal digit that is not ASCII."""


class Reader:
    """A worker that follows the facts."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cursor = START
        self.view: dict[str, bytes] = {}

    async def read(self, wait_s: float = 0.0) -> Facts:
        facts = await self.store.read_since(self.cursor, wait_s)
        self.cursor = facts.cursor
        if facts.reset:
            self.view.clear()
        for fact in facts.changes:
            if fact.value is None:
                self.view.pop(fact.key, None)
            else:
                self.view[fact.key] = fact.value
        return facts


async def waiting_read(reader: Reader) -> asyncio.Task[Facts]:
    """A read that waits in the store: what its connection asks afterwards is answered after the read has begun."""
    reading = asyncio.create_task(reader.read(PATIENCE_S))
    await asyncio.sleep(0)
    await reader.store.claim("round trip", "test", 1.0)
    await asyncio.sleep(0)
    assert not reading.done()
    return reading


# -- leases


async def test_a_lease_has_one_holder(half: Half) -> None:
    first, second = half.open(), half.open()
    assert await first.claim("job", "a", 10.0)
    assert not await second.claim("job", "b", 10.0)
    assert await second.claim("other job", "b", 10.0)


async def test_one_of_many_claims_at_once_wins(half: Half) -> None:
    stores = [half.open() for _ in range(20)]
    won = await asyncio.gather(*(store.claim("job", f"holder {i}", 10.0) for i, store in enumerate(stores)))
    assert sum(won) == 1


async def test_a_lease_ends_with_its_time_and_not_before(half: Half) -> None:
    store = half.open()
    await store.claim("job", "a", 10.0)
    await half.pass_time(9.5)
    assert not await store.claim("job", "b", 10.0)
    await half.pass_time(0.5)
    assert await store.claim("job", "b", 10.0)
    assert not await store.claim("job", "a", 10.0)


async def test_a_renewal_counts_from_now(half: Half) -> None:
    store = half.open()
    await store.claim("job", "a", 10.0)
    await half.pass_time(6.0)
    assert await store.claim("job", "a", 10.0)
    await half.pass_time(6.0)
    assert not await store.claim("job", "b", 10.0)
    assert await store.claim("job", "a", 1.0)
    await half.pass_time(2.0)
    assert await store.claim("job", "b", 10.0)


async def test_a_refused_claim_changes_nothing(half: Half) -> None:
    store = half.open()
    await store.claim("job", "a", 10.0)
    await half.pass_time(6.0)
    assert not await store.claim("job", "b", 100.0)
    await half.pass_time(6.0)
    assert await store.claim("job", "c", 10.0)


async def test_a_released_lease_is_free(half: Half) -> None:
    store = half.open()
    await store.claim("job", "a", 10.0)
    await store.release("job", "a")
    assert await store.claim("job", "b", 10.0)


async def test_only_the_holder_can_release(half: Half) -> None:
    store = half.open()
    await store.release("job", "a")
    await store.claim("job", "a", 10.0)
    await store.release("job", "b")
    assert not await store.claim("job", "b", 10.0)
    await half.pass_time(10.0)
    await store.claim("job", "b", 10.0)
    await store.release("job", "a")  # it was a's once
    assert not await store.claim("job", "a", 10.0)


# -- facts


async def test_a_newcomer_is_told_everything_that_holds(half: Half) -> None:
    store = half.open()
    assert await store.read_since(START) == Facts((await store.read_since(START)).cursor, (), reset=True)
    await store.post("x", b"1")
    await store.post("y", b"2")
    await store.post("z", b"3")
    await store.post("x", b"4")
    await store.withdraw("y")
    facts = await half.open().read_since(START)
    assert facts.reset
    assert facts.changes == (Fact("z", b"3"), Fact("x", b"4"))


async def test_a_reader_is_told_what_is_new_once(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await store.post("x", b"1")
    await reader.read()
    await store.post("y", b"2")
    await store.post("y", b"3")
    assert (await reader.read()).changes == (Fact("y", b"3"),)
    cursor = reader.cursor
    assert await reader.read() == Facts(cursor)
    await store.withdraw("x")
    assert (await reader.read()).changes == (Fact("x", None),)
    assert reader.view == {"y": b"3"}


async def test_a_cursor_can_be_used_again(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await reader.read()
    await store.post("x", b"1")
    again = Reader(half.open())
    again.cursor = reader.cursor
    assert (await reader.read()).changes == (await again.read()).changes == (Fact("x", b"1"),)


async def test_posting_the_same_value_is_news(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await store.post("x", b"1")
    await reader.read()
    await store.post("x", b"1")
    assert (await reader.read()).changes == (Fact("x", b"1"),)


async def test_withdrawing_nothing_is_no_news(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await reader.read()
    await store.withdraw("x")
    assert await reader.read() == Facts(reader.cursor)


async def test_a_fact_ends_with_its_time_and_not_before(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await store.post("x", b"1", 5.0)
    await store.post("y", b"2")
    await reader.read()
    await half.pass_time(4.5)
    assert not (await reader.read()).changes
    await half.pass_time(0.5)
    assert (await reader.read()).changes == (Fact("x", None),)
    assert (await store.read_since(START)).changes == (Fact("y", b"2"),)


async def test_a_later_post_replaces_the_time_too(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await store.post("longer", b"1", 5.0)
    await store.post("for good", b"1", 5.0)
    await store.post("shorter", b"1")
    await half.pass_time(3.0)
    await store.post("longer", b"2", 5.0)
    await store.post("for good", b"2")
    await store.post("shorter", b"2", 3.0)
    await half.pass_time(3.0)
    await reader.read()
    assert reader.view == {"longer": b"2", "for good": b"2"}


async def test_a_reader_that_waits_is_woken_by_a_post(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await reader.read()
    reading = await waiting_read(reader)
    await store.post("x", b"1")
    async with asyncio.timeout(PATIENCE_S / 2):
        assert (await reading).changes == (Fact("x", b"1"),)


async def test_a_reader_that_waits_is_woken_by_a_withdrawal(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await store.post("x", b"1")
    await reader.read()
    reading = await waiting_read(reader)
    await store.withdraw("x")
    async with asyncio.timeout(PATIENCE_S / 2):
        assert (await reading).changes == (Fact("x", None),)


async def test_a_reader_that_waits_is_told_of_an_expiry(half: Half) -> None:
    """Nobody else uses the store meanwhile, so waiting itself has to notice."""
    store, reader = half.open(), Reader(half.open())
    await store.post("x", b"1", 0.2)
    await reader.read()
    reading = await waiting_read(reader)
    await half.pass_time(0.2)
    async with asyncio.timeout(PATIENCE_S / 2):
        assert (await reading).changes == (Fact("x", None),)


async def test_posts_in_quick_succession_are_told_together(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await reader.read()
    reading = await waiting_read(reader)
    for number in range(5):
        await store.post(f"key {number}", b"1")
    assert len((await reading).changes) == 5


async def test_a_wait_without_news_ends(half: Half) -> None:
    reader = Reader(half.open())
    await reader.read()
    cursor = reader.cursor
    assert await reader.read(0.01) == Facts(cursor)


async def test_many_readers_are_woken_at_once(half: Half) -> None:
    store, readers = half.open(), [Reader(half.open()) for _ in range(8)]
    for reader in readers:
        await reader.read()
    reading = [await waiting_read(reader) for reader in readers]
    await store.post("x", b"1")
    async with asyncio.timeout(PATIENCE_S / 2):
        await asyncio.gather(*reading)
    assert all(reader.view == {"x": b"1"} for reader in readers)


async def test_a_cancelled_wait_leaves_the_reader_able_to_go_on(half: Half) -> None:
    store, reader = half.open(), Reader(half.open())
    await reader.read()
    reading = await waiting_read(reader)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await store.post("x", b"1")
    assert (await reader.read(PATIENCE_S)).changes == (Fact("x", b"1"),)


async def test_a_reader_of_another_life_of_the_store_starts_anew(half: Half) -> None:
    store = half.open()
    await store.post("old", b"1")
    cursor = (await store.read_since(START)).cursor
    await half.restart()
    store = half.open()
    assert await store.claim("job", "a", 1.0)
    facts = await store.read_since(cursor, PATIENCE_S)  # at once, although there is nothing to tell
    assert (facts.changes, facts.reset) == ((), True)
    await store.post("new", b"2")
    facts = await store.read_since(cursor)
    assert (facts.changes, facts.reset) == ((Fact("new", b"2"),), True)


async def test_a_reader_that_missed_too_many_ends_starts_anew(half: Half) -> None:
    store, late, prompt = half.open(), Reader(half.open()), Reader(half.open())
    await store.post("stays", b"1")
    for number in range(TOMBSTONES + 1):
        await store.post(f"key {number}", b"1")
    await late.read()
    for number in range(TOMBSTONES):
        await store.withdraw(f"key {number}")
    first = Reader(half.open())
    first.cursor, first.view = late.cursor, dict(late.view)
    assert not (await first.read()).reset  # exactly as many as are remembered
    await prompt.read()
    await store.withdraw(f"key {TOMBSTONES}")
    assert not (await prompt.read()).reset
    assert (await late.read()).reset
    assert late.view == prompt.view == {"stays": b"1"}
    assert not (await late.read()).reset


@pytest.mark.parametrize("cursor", ["x", ".", "0", "x.1", ".1", "0.-1", ARABIC_ONE, "\x00", "9" * 5000])
async def test_a_text_that_no_store_gave_starts_anew(half: Half, cursor: str) -> None:
    store = half.open()
    await store.post("x", b"1")
    given = (await store.read_since(START)).cursor
    for wrong in (cursor, f"{given}9", f"{given}{cursor}", given.replace(".", ""), given[:-1] + ARABIC_ONE):
        facts = await store.read_since(wrong, PATIENCE_S)
        assert facts.reset, wrong
        assert facts.changes == (Fact("x", b"1"),)


# -- limits and ends


async def test_arguments_outside_the_limits_are_refused(half: Half) -> None:
    store = half.open()
    long = "é" * (MAX_NAME_BYTES // 2)
    assert await store.claim(long, long, MAX_TTL_S)
    await store.post(long, b"x" * MAX_VALUE_BYTES, MAX_TTL_S)
    for name in ("", long + "x"):
        with pytest.raises(ValueError, match="must have 1 to 512 bytes"):
            await store.claim(name, "a", 1.0)
        with pytest.raises(ValueError, match="must have 1 to 512 bytes"):
            await store.claim("job", name, 1.0)
        with pytest.raises(ValueError, match="must have 1 to 512 bytes"):
            await store.release(name, "a")
        with pytest.raises(ValueError, match="must have 1 to 512 bytes"):
            await store.post(name, b"")
        with pytest.raises(ValueError, match="must have 1 to 512 bytes"):
            await store.withdraw(name)
    for ttl_s in (0.0, -1.0, float("nan"), float("inf"), MAX_TTL_S + 1):
        with pytest.raises(ValueError, match="ttl_s must be above 0"):
            await store.claim("job", "a", ttl_s)
        with pytest.raises(ValueError, match="ttl_s must be above 0"):
            await store.post("x", b"", ttl_s)
    for wait_s in (-0.1, float("nan"), MAX_WAIT_S + 1):
        with pytest.raises(ValueError, match="wait_s must be 0 to 60"):
            await store.read_since(START, wait_s)
    with pytest.raises(ValueError, match="a fact's value may have 65536 bytes"):
        await store.post("x", b"x" * (MAX_VALUE_BYTES + 1))
    assert [fact.key for fact in (await store.read_since(START)).changes] == [long]


async def test_closing_ends_waiting_reads_and_later_operations(half: Half) -> None:
    store = half.open()
    reader = Reader(store)
    await reader.read()
    reading = await waiting_read(reader)
    await store.aclose()
    with pytest.raises(StoreUnavailable, match="it is closed"):
        await reading
    with pytest.raises(StoreUnavailable, match="it is closed"):
        await store.claim("job", "a", 1.0)
    with pytest.raises(StoreUnavailable, match="it is closed"):
        await store.read_since(START)
    await store.aclose()
