"""What `gateway.store.streams` promises, held against every implementation."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store import START, Store, StoreUnavailable
from gateway.store.protocol import MAX_NAME_BYTES, MAX_WAIT_S
from gateway.store.streams import MAX_BLOB_BYTES, MAX_MESSAGE_BYTES, PAGE_MESSAGES
from tests.gateway.store.halves import Half

LOOPS = ("asyncio", "uvloop")
PATIENCE_S = 10.0


class Follower:
    """A worker that follows some streams."""

    def __init__(self, store: Store, *streams: str) -> None:
        self.store = store
        self.cursors = dict.fromkeys(streams, START)
        self.heard: dict[str, list[bytes]] = {stream: [] for stream in streams}

    async def read(self, wait_s: float = 0.0) -> int:
        """How many messages there were."""
        count = 0
        for passage in await self.store.follow(self.cursors, wait_s):
            self.cursors[passage.stream] = passage.cursor
            self.heard[passage.stream] += passage.payloads
            count += len(passage.payloads)
        return count


async def test_a_follower_hears_each_message_once_and_in_order(half: Half) -> None:
    first, second = half.open(), half.open()
    follower = Follower(second, "pool a")
    assert await follower.read() == 0
    for number in range(5):
        await first.publish("pool a", b"%d" % number)
    await follower.read()
    await first.publish("pool a", b"\x00\xff")
    await follower.read()
    assert await follower.read() == 0
    assert follower.heard == {"pool a": [b"0", b"1", b"2", b"3", b"4", b"\x00\xff"]}


async def test_streams_are_apart_and_followed_together(half: Half) -> None:
    store = half.open()
    both, one = Follower(store, "a", "b"), Follower(store, "b")
    await store.publish("a", b"1")
    await store.publish("b", b"2")
    await store.publish("c", b"3")
    await both.read()
    await one.read()
    assert both.heard == {"a": [b"1"], "b": [b"2"]}
    assert one.heard == {"b": [b"2"]}
    await store.publish("a", b"4")
    assert await both.read() == 1
    assert await one.read() == 0


async def test_everybody_hears_everything(half: Half) -> None:
    followers = [Follower(half.open(), "a") for _ in range(4)]
    await half.open().publish("a", b"1")
    for follower in followers:
        await follower.read()
    assert all(follower.heard == {"a": [b"1"]} for follower in followers)


async def test_messages_of_many_at_once_all_arrive(half: Half) -> None:
    stores = [half.open() for _ in range(5)]
    await asyncio.gather(*(store.publish("a", b"%d" % i) for i, store in enumerate(stores)))
    follower = Follower(half.open(), "a")
    while await follower.read():
        pass
    assert sorted(follower.heard["a"]) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_follower_that_waits_is_woken_by_a_message(half: Half) -> None:
    follower = Follower(half.open(), "a", "b")
    other = half.open()
    await other.publish("a", b"before")
    await follower.read()
    waiting = asyncio.create_task(follower.read(PATIENCE_S))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await other.publish("c", b"of no interest")
    await other.publish("b", b"now")
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting == 1
    assert follower.heard["b"] == [b"now"]


async def test_without_news_the_wait_ends_by_itself(half: Half) -> None:
    follower = Follower(half.open(), "a")
    assert await follower.read(0.05) == 0
    assert await Follower(half.open()).read(0.05) == 0


async def test_a_cancelled_wait_leaves_nothing_behind(half: Half) -> None:
    store = half.open()
    follower = Follower(store, "a")
    waiting = asyncio.create_task(follower.read(PATIENCE_S))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await store.publish("a", b"1")
    await follower.read(PATIENCE_S)
    assert follower.heard == {"a": [b"1"]}


async def test_an_answer_is_a_page_and_the_next_one_goes_on(half: Half) -> None:
    store = half.open()
    follower = Follower(store, "a", "b")
    count = PAGE_MESSAGES + 50
    await asyncio.gather(*(store.publish("a", b"%06d" % number) for number in range(count)))
    await store.publish("b", b"last")
    largest = 0
    while found := await follower.read():
        largest = max(largest, found)
    assert largest <= 2 * PAGE_MESSAGES
    assert sorted(follower.heard["a"]) == [b"%06d" % number for number in range(count)]
    assert follower.heard["b"] == [b"last"]


async def test_a_cursor_of_another_life_gets_everything(half: Half) -> None:
    store = half.open()
    follower = Follower(store, "a")
    for _ in range(3):
        await store.publish("a", b"old")
    await follower.read()
    await half.restart()
    follower.store = half.open()
    await follower.store.publish("a", b"new")
    await follower.read(PATIENCE_S)
    assert follower.heard["a"] == [b"old"] * 3 + [b"new"]


@pytest.mark.parametrize(
    "cursor", ["nonsense", "1", "x.1", "99999999999999999999-0", "9999999999999-0", "-", "\u0661-0"]
)
async def test_a_cursor_that_nobody_gave_gets_everything(half: Half, cursor: str) -> None:
    store = half.open()
    await store.publish("a", b"1")
    follower = Follower(store, "a")
    follower.cursors["a"] = cursor
    await follower.read()
    assert follower.heard == {"a": [b"1"]}


async def test_what_is_kept_is_found_until_its_time_is_over(half: Half) -> None:
    first, second = half.open(), half.open()
    assert await first.kept("snapshot") is None
    await first.keep("snapshot", b"1", 10.0)
    await first.keep("snapshot", b"\x00" * 300_000, 10.0)
    await first.keep("other", b"2", 10.0)
    assert await second.kept("snapshot") == b"\x00" * 300_000
    assert await second.kept("other") == b"2"


async def test_the_largest_blob_and_message_go_through(half: Half) -> None:
    store = half.open()
    await store.keep("snapshot", b"x" * MAX_BLOB_BYTES, 10.0)
    assert await store.kept("snapshot") == b"x" * MAX_BLOB_BYTES
    await store.publish("a", b"y" * MAX_MESSAGE_BYTES)
    follower = Follower(store, "a")
    await follower.read()
    assert follower.heard == {"a": [b"y" * MAX_MESSAGE_BYTES]}


async def test_arguments_outside_the_limits_are_refused(half: Half) -> None:
    store = half.open()
    with pytest.raises(ValueError, match="a message may have"):
        await store.publish("a", b"x" * (MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ValueError, match="a kept blob may have"):
        await store.keep("a", b"x" * (MAX_BLOB_BYTES + 1), 1.0)
    for name in ("", "x" * (MAX_NAME_BYTES + 1)):
        with pytest.raises(ValueError, match="must have 1 to"):
            await store.publish(name, b"")
        with pytest.raises(ValueError, match="must have 1 to"):
            await store.keep(name, b"", 1.0)
        with pytest.raises(ValueError, match="must have 1 to"):
            await store.kept(name)
    with pytest.raises(ValueError, match="wait_s"):
        await store.follow({"a": START}, MAX_WAIT_S + 1)
    with pytest.raises(ValueError, match="ttl_s"):
        await store.keep("a", b"", 0.0)


async def test_a_closed_store_does_nothing_more(half: Half) -> None:
    store = half.open()
    waiting = asyncio.create_task(store.follow({"a": START}, PATIENCE_S))
    await asyncio.sleep(0.05)
    await store.aclose()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreUnavailable):
            await waiting
    with pytest.raises(StoreUnavailable):
        await store.publish("a", b"")
    with pytest.raises(StoreUnavailable):
        await store.follow({"a": START})
    with pytest.raises(StoreUnavailable):
        await store.keep("a", b"", 1.0)
    with pytest.raises(StoreUnavailable):
        await store.kept("a")
