"""What is particular to leases and facts in Redis; what every store promises is in `test_contract`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.store import START, Fact, StoreFull, StoreUnavailable
from gateway.store.redis.scripts import script
from gateway.store.redis.store import RedisStore
from tests.gateway.store.halves import Redis
from tests.gateway.store.redis.asking import client_of, until
from tests.support.redis_server import RedisServer

LOOPS = ("asyncio", "uvloop")


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(client_of(redis_server.url))
    yield store
    await store.aclose()


@pytest.fixture
async def half(folder: Path) -> AsyncIterator[Redis]:
    half = Redis(folder)
    await half.start()
    yield half
    await half.stop()


async def test_live_gateways_are_counted_and_dead_ones_are_not(half: Redis) -> None:
    first, second = half.open(), half.open()
    assert (await first.beat("a", 3.0)).live == 1
    assert (await second.beat("b", 3.0)).live == 2
    await half.pass_time(2.0)
    assert (await first.beat("a", 3.0)).live == 2
    await half.pass_time(1.0)
    assert (await first.beat("a", 3.0)).live == 1
    assert (await second.beat("b", 3.0)).live == 2
    assert (await second.beat("b", 3.0)).known
    assert (await second.beat("b", 0.0)).live == 1  # it says that it ends
    assert not (await second.beat("b", 3.0)).known


async def test_more_than_one_page_is_read_whole(store: RedisStore) -> None:
    large = {f"large {number}": bytes([number]) * 60_000 for number in range(8)}
    small = {f"small {number}": b"%d" % number for number in range(1200)}
    for key, value in (large | small).items():
        await store.post(key, value)
    facts = await store.read_since(START)
    assert facts.reset
    assert facts.changes == tuple(Fact(key, value) for key, value in (large | small).items())
    cursor = facts.cursor
    for key in small:
        await store.withdraw(key)
    facts = await store.read_since(cursor)
    assert not facts.reset
    assert facts.changes == tuple(Fact(key, None) for key in small)
    assert (await store.read_since(START)).changes == tuple(Fact(key, value) for key, value in large.items())


async def test_pages_of_facts_that_change_meanwhile_agree_in_the_end(store: RedisStore) -> None:
    over = asyncio.Event()
    held: dict[str, bytes] = {f"key {number}": b"first" for number in range(1500)}
    for key, value in held.items():
        await store.post(key, value)

    async def change() -> None:
        number = 0
        while not over.is_set():
            number += 1
            key = f"key {number * 7 % 1500}"
            if number % 3:
                held[key] = b"%d" % number
                await store.post(key, held[key])
            else:
                held.pop(key, None)
                await store.withdraw(key)

    changing = asyncio.create_task(change())
    cursor, view = START, dict[str, bytes]()
    for number in range(60):
        facts = await store.read_since(START if number % 10 == 0 else cursor)
        if facts.reset:
            view.clear()
        for fact in facts.changes:
            if fact.value is None:
                view.pop(fact.key, None)
            else:
                view[fact.key] = fact.value
        cursor = facts.cursor
        if number == 58:
            over.set()
            await changing
    assert view == held


async def test_facts_beyond_the_room_for_them_are_refused(redis_server: RedisServer) -> None:
    store = RedisStore(client_of(redis_server.url), max_facts_bytes=1000)
    try:
        await store.post("a", b"x" * 800)
        with pytest.raises(StoreFull, match="may have 1000 bytes"):
            await store.post("b", b"x" * 100)
        await store.post("a", b"x" * 600)  # it takes the place of the earlier one
        await store.post("b", b"x" * 100)
        await store.withdraw("a")
        await store.post("c", b"x" * 600)
        assert [fact.key for fact in (await store.read_since(START)).changes] == ["b", "c"]
    finally:
        await store.aclose()


async def test_a_reader_begins_anew_after_all_connections_were_lost(
    redis_server: RedisServer, store: RedisStore
) -> None:
    """The Redis at the other end may be a replica that never heard of the last changes."""
    await store.post("x", b"1")
    cursor = (await store.read_since(START)).cursor
    assert not (await store.read_since(cursor)).reset
    redis_server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    client = store._client
    await until(lambda: client.epoch == 1)
    facts = await store.read_since(cursor)
    assert (facts.reset, facts.changes) == (True, (Fact("x", b"1"),))
    assert not (await store.read_since(facts.cursor)).reset


async def test_a_reader_whose_message_was_lost_finds_the_change(redis_server: RedisServer, store: RedisStore) -> None:
    facts = await store.read_since(START)
    reading = asyncio.create_task(store.read_since(facts.cursor, 10.0))
    await asyncio.sleep(0.05)
    redis_server.command("CLIENT", "KILL", "TYPE", "pubsub")
    await store.post("x", b"1")
    async with asyncio.timeout(5.0):
        assert (await reading).changes == (Fact("x", b"1"),)


async def test_a_redis_that_is_away_is_told_to_readers_and_claimers() -> None:
    with RedisServer() as server:
        store = RedisStore(client_of(server.url, timeout_s=0.05))
        try:
            await store._client.connect()
            assert await store.claim("job", "a", 1.0)
            server.kill()
            for _ in range(10):
                with pytest.raises(StoreUnavailable):
                    await store.claim("job", "a", 1.0)
                with pytest.raises(StoreUnavailable):
                    await store.read_since("x", 5.0)
        finally:
            await store.aclose()


async def test_a_stream_that_was_evicted_and_began_anew_with_an_earlier_clock_is_heard(store: RedisStore) -> None:
    await store.publish("pool", b"before")
    (passage,) = await store.follow({"pool": START})
    assert (await store.follow({"pool": passage.cursor})) == ()
    anew = script("anew", "redis.call('DEL', KEYS[1]); return redis.call('XADD', KEYS[1], '1-1', 'm', ARGV[1])")
    await store._client.run(anew, (store._streams._stream("pool"),), (b"after",))
    heard: list[bytes] = []
    for _ in range(2):
        for each in await store.follow({"pool": passage.cursor}, 0.05):
            heard += each.payloads
            passage = each
    assert heard == [b"after"]
