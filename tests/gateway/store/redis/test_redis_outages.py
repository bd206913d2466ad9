"""A Redis that is frozen, killed, full or behind a broken network, and how soon calls fail and work again.

Bounds on time are for a busy machine; the usual values stand beside them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable

import pytest

from gateway.store import StoreUnavailable
from gateway.store.redis.client import RedisClient
from tests.gateway.store.redis.asking import COUNT, ECHO, failure, until
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]

TIMEOUT_S = 0.05
SLACK_S = 0.25
BACK_WITHIN_S = 2.0


async def open_breaker(client: RedisClient) -> None:
    for _ in range(10):
        if not client.available:
            return
        await failure(client)
    assert not client.available


async def test_a_frozen_redis_costs_five_calls_50_ms_and_later_ones_nothing(
    redis_server: RedisServer, make_client: Make, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[bool] = []
    client = make_client(redis_server.url, timeout_s=TIMEOUT_S, on_change=changes.append)
    await client.connect()
    assert await failure(client) is None
    redis_server.freeze()
    try:
        began_at = time.monotonic()
        failures = await asyncio.gather(*(failure(client) for _ in range(5)))
        assert TIMEOUT_S <= time.monotonic() - began_at < TIMEOUT_S + SLACK_S  # 54 ms
        assert all(isinstance(error, StoreUnavailable) for error in failures)
        assert not client.available
        gc.collect()  # or a look through all that the other tests have left falls into the measurement: 0.4 s
        began_at = time.process_time()
        errors = [await failure(client) for _ in range(1000)]
        # CPU, which a busy machine does not change: 6.5 us, of which the call and its failure are 1.9
        assert (time.process_time() - began_at) / 1000 < 200e-6
        assert all(redis_server.url in str(error) for error in errors)
        await asyncio.sleep(0.1)
    finally:
        redis_server.thaw()
        thawed_at = time.monotonic()
    await until(lambda: client.available)
    assert time.monotonic() - thawed_at < BACK_WITHIN_S + SLACK_S
    assert await failure(client) is None
    assert changes == [False, True]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2, said
    assert f"the store at {redis_server.url} is unavailable: no answer in time" in said[0]
    assert "is available again after" in said[1]


async def test_calls_one_after_the_other_open_the_breaker_after_five(
    redis_server: RedisServer, make_client: Make
) -> None:
    client = make_client(redis_server.url, timeout_s=TIMEOUT_S)
    await client.connect()
    redis_server.freeze()
    try:
        for _ in range(5):
            assert client.available
            began_at = time.monotonic()
            assert await failure(client) is not None
            assert time.monotonic() - began_at < TIMEOUT_S + SLACK_S
        assert not client.available
    finally:
        redis_server.thaw()


async def test_a_killed_redis_is_used_again_within_two_seconds_of_its_return(make_client: Make) -> None:
    with RedisServer() as server:
        client = make_client(server.url, timeout_s=TIMEOUT_S)
        await client.connect()
        assert await client.run(COUNT, ("n",), ()) == 1
        server.kill()
        await open_breaker(client)
        await asyncio.sleep(0.5)
        assert not client.available
        server.start()
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)
        assert await client.run(COUNT, ("n",), ()) == 1  # it has forgotten data and scripts


async def test_a_client_that_starts_before_redis_says_so_and_finds_it(make_client: Make) -> None:
    with RedisServer() as server:
        server.kill()
        client = make_client(server.url, timeout_s=TIMEOUT_S)
        with pytest.raises(StoreUnavailable, match="unavailable"):
            await client.connect(within_s=0.2)
        began_at = time.monotonic()
        assert await failure(client) is not None
        assert time.monotonic() - began_at < TIMEOUT_S + SLACK_S
        await open_breaker(client)
        server.start()
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)
        assert await failure(client) is None


async def test_an_outage_lasts_as_long_as_replies_are_lost(redis_server: RedisServer, make_client: Make) -> None:
    """Connections are accepted and commands carried out, and nobody hears of it: that is no success."""
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url, timeout_s=TIMEOUT_S)
        await client.connect()
        proxy.drop_replies = True
        await open_breaker(client)
        await asyncio.sleep(1.8)
        assert not client.available
        proxy.drop_replies = False
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)


async def test_a_lost_reply_fails_one_batch_and_its_connection(redis_server: RedisServer, make_client: Make) -> None:
    """The late reply of the call that was given up never reaches the next caller."""
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url, timeout_s=0.2)
        await client.connect()
        await until(lambda: len(client._links) == 2)
        await client.run(ECHO, (), ("before",))
        proxy.delay_s = 0.4
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            await client.run(ECHO, (), ("late",))
        proxy.delay_s = 0.0
        for number in range(20):
            assert await client.run(ECHO, (), (number,)) == b"%d" % number
            await asyncio.sleep(0.01)
        assert client.available


async def test_a_cut_connection_fails_what_was_on_its_way_at_once(redis_server: RedisServer, make_client: Make) -> None:
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url)
        await client.connect()
        proxy.drop_commands = True
        call = client.run(ECHO, (), ("x",))
        await asyncio.sleep(0.02)
        proxy.cut()
        proxy.drop_commands = False
        with pytest.raises(StoreUnavailable, match="the connection was lost"):
            await call
        assert await client.run(ECHO, (), ("y",)) == b"y"


async def test_a_redis_without_a_free_place_is_unavailable_until_there_is_one(make_client: Make) -> None:
    with RedisServer(("maxclients", "3")) as server, server.client() as taken, server.client() as taken_too:
        taken.execute_command("PING")
        taken_too.execute_command("PING")
        with server.client() as last:
            last.execute_command("PING")
            client = make_client(server.url, timeout_s=TIMEOUT_S)
            with pytest.raises(StoreUnavailable, match=r"max number of clients|connection"):
                await client.connect(within_s=0.3)
            await open_breaker(client)
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)
        assert await failure(client) is None


async def test_a_demoted_primary_counts_as_away_although_it_answers(make_client: Make) -> None:
    with RedisServer() as server:
        client = make_client(server.url, timeout_s=1.0)
        assert await client.run(COUNT, ("n",), ()) == 1
        first = client._links[0]
        server.command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable, match=r"READONLY"):
            await client.run(COUNT, ("n",), ())
        assert not first.open  # so that Sentinel is asked again
        for _ in range(10):
            if client.available:
                with pytest.raises(StoreUnavailable, match=r"READONLY|connection"):
                    await client.run(COUNT, ("n",), ())
        assert not client.available
        server.command("REPLICAOF", "NO", "ONE")
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)
        assert await client.run(COUNT, ("n",), ()) == 2


async def test_a_full_redis_counts_as_away(make_client: Make) -> None:
    with RedisServer(("maxmemory-policy", "noeviction")) as server:
        client = make_client(server.url, timeout_s=1.0)
        assert await client.run(COUNT, ("n",), ()) == 1
        server.command("CONFIG", "SET", "maxmemory", "1")
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="OOM"):
                await client.run(COUNT, ("n",), ())
        assert not client.available
        server.command("CONFIG", "RESETSTAT")
        await asyncio.sleep(1.8)
        assert not client.available  # probes are answered, with a refusal
        assert 1 <= _probes(server) <= 2
        server.command("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: client.available, BACK_WITHIN_S + SLACK_S)


def _probes(server: RedisServer) -> int:
    with server.client() as connection:
        stats = connection.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("eval", "evalsha"))
