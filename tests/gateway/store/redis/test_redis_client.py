"""Calls that concurrent callers make: batches, order, and whose reply is whose."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from gateway.store import StoreError, StoreUnavailable
from gateway.store.redis.client import RedisClient
from gateway.store.redis.scripts import script
from tests.gateway.store.redis.asking import APPEND, COUNT, ECHO, PATIENCE_S, until
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]


async def test_replies_come_as_redis_gives_them(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    shapes = script("shapes", "return {1, ARGV[1], ARGV[2], {2, {KEYS[1]}}, false}")
    assert await client.run(shapes, ("é",), (b"\x00\xff", 12)) == [1, b"\x00\xff", b"12", [2, ["é".encode()]], None]


async def test_what_is_asked_in_one_turn_goes_out_as_one_write(redis_server: RedisServer, make_client: Make) -> None:
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url)
        await client.run(ECHO, (), ("",))
        proxy.keep = True

        async def ask(number: int) -> bytes:
            answer: bytes = await client.run(ECHO, (), (number,))
            return answer

        replies = await asyncio.gather(*(ask(number) for number in range(100)))
        assert replies == [b"%d" % number for number in range(100)]
        assert len(proxy.writes) == 1
        assert proxy.writes[0].count(b"EVALSHA") == 100


async def test_calls_are_carried_out_in_their_order(redis_server: RedisServer, make_client: Make) -> None:
    """Also those of later turns whose caller has not waited, however many connections there are."""
    client = make_client(redis_server.url, connections=3)
    calls = []
    for number in range(300):
        calls.append(client.run(APPEND, ("list",), (number,)))
        if number % 7 == 0:
            await asyncio.sleep(0)
    assert await asyncio.gather(*calls) == list(range(1, 301))
    assert redis_server.command("LRANGE", "list", 0, -1) == [b"%d" % number for number in range(300)]


async def test_cancelled_calls_never_give_another_one_a_wrong_reply(
    redis_server: RedisServer, make_client: Make
) -> None:
    client = make_client(redis_server.url)
    rng = random.Random(4)
    right = cancelled = 0

    async def ask(number: int) -> None:
        nonlocal right
        assert await client.run(ECHO, (), (number,)) == b"%d" % number
        right += 1

    for batch in range(100):
        tasks = [asyncio.create_task(ask(batch * 100 + number)) for number in range(100)]
        for task in rng.sample(tasks, 40):
            if rng.random() < 0.1:  # some were not sent yet, some are on their way, some have been answered
                await asyncio.sleep(0)
            cancelled += task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not [task for task in tasks if not task.cancelled() and task.exception() is not None]
    assert right == 10_000 - cancelled
    assert cancelled > 1000
    assert await client.run(ECHO, (), ("last",)) == b"last"


async def test_scripts_survive_a_redis_that_forgets_them(redis_server: RedisServer, make_client: Make) -> None:
    """`SCRIPT FLUSH` a hundred times a second: every call runs once, and one after the other in order."""
    client = make_client(redis_server.url)
    over = asyncio.Event()

    def flush() -> None:
        with redis_server.client() as connection:
            while not over.is_set():
                connection.execute_command("SCRIPT", "FLUSH")
                time.sleep(0.01)

    async def caller(name: str) -> None:
        for number in range(300):
            append = client.run(APPEND, (name,), (number,))
            count = client.run(COUNT, (f"count {name}",), ())
            assert await append == number + 1
            assert await count == number + 1

    flushing = asyncio.create_task(asyncio.to_thread(flush))
    try:
        await asyncio.gather(*(caller(f"caller {number}") for number in range(8)))
    finally:
        over.set()
        await flushing
    assert redis_server.command("LRANGE", "caller 3", 0, -1) == [b"%d" % number for number in range(300)]


async def test_a_forgotten_script_is_sent_again_in_order(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    await client.run(APPEND, ("list",), ("0",))
    redis_server.command("SCRIPT", "FLUSH")
    await asyncio.gather(*(client.run(APPEND, ("list",), (number,)) for number in (1, 2, 3)))
    assert redis_server.command("LRANGE", "list", 0, -1) == [b"0", b"1", b"2", b"3"]


async def test_the_script_command_is_not_needed(redis_server: RedisServer, make_client: Make) -> None:
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        proxy.refuse, proxy.keep = {"SCRIPT", "CLIENT", "HELLO", "INFO", "CONFIG"}, True
        client = make_client(proxy.url)
        assert await client.run(ECHO, (), ("a",)) == b"a"
        redis_server.command("SCRIPT", "FLUSH")
        assert await client.run(ECHO, (), ("b",)) == b"b"
        sent = b"".join(proxy.writes)
        assert not [word for word in (b"SCRIPT", b"CLIENT", b"HELLO", b"INFO", b"CONFIG") if word in sent]


async def test_a_refused_script_is_the_caller_s_error_and_no_outage(
    redis_server: RedisServer, make_client: Make
) -> None:
    client = make_client(redis_server.url)
    for wrong in ("return redis.call('NO SUCH')", "return {", "return redis.error_reply('MINE is wrong')"):
        for _ in range(10):
            with pytest.raises(StoreError, match="the script wrong was refused") as refused:
                await client.run(script("wrong", wrong), (), ())
            assert not isinstance(refused.value, StoreUnavailable)
    assert client.available


async def test_arguments_that_cannot_be_sent_spoil_no_other_call(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    first, wrong, last = (client.run(ECHO, (), (text,)) for text in ("a", "\ud800", "b"))
    assert await first == b"a"
    with pytest.raises(UnicodeEncodeError):
        await wrong
    assert await last == b"b"


async def test_a_closed_client_refuses_and_leaves_nobody_waiting(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    await client.connect()
    redis_server.freeze()
    try:
        sent = client.run(ECHO, (), ("x",))
        await asyncio.sleep(0.01)
        unsent = client.run(ECHO, (), ("x",))
        await client.aclose()
    finally:
        redis_server.thaw()
    for call in (sent, unsent, client.run(ECHO, (), ("x",))):
        with pytest.raises(StoreUnavailable, match="it is closed"):
            await call
    assert not client.available
    await client.aclose()


async def test_the_spare_connection_takes_over(redis_server: RedisServer, make_client: Make) -> None:
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url, connections=2)
        await client.connect()
        await until(lambda: len(client._links) == 2)
        await client.run(ECHO, (), ("x",))
        proxy.refusing_connections = True
        first = client._links[0]
        first.close("by the test")
        assert await client.run(ECHO, (), ("y",)) == b"y"
        proxy.refusing_connections = False
        await until(lambda: len(client._links) == 2)


async def test_messages_of_a_channel_are_told_until_it_is_given_up(
    redis_server: RedisServer, make_client: Make
) -> None:
    client = make_client(redis_server.url)
    first: list[bytes] = []
    second: list[bytes] = []
    give_up = await client.subscribe("news", first.append)
    await client.subscribe("news", second.append)
    assert redis_server.command("PUBLISH", "news", "1") == 1
    await until(lambda: first == second == [b"1"])
    give_up()
    redis_server.command("PUBLISH", "news", "2")
    await until(lambda: second == [b"1", b"2"])
    assert first == [b"1"]


async def test_a_subscription_outlives_its_connection(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    told: list[bytes] = []
    await client.subscribe("news", told.append)
    assert redis_server.command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
    await until(lambda: redis_server.command("PUBLISH", "news", "x") == 1)
    await until(lambda: told)


async def test_a_subscription_waits_for_a_redis_that_is_away(make_client: Make) -> None:
    with RedisServer() as server:
        server.kill()
        client = make_client(server.url)
        told: list[bytes] = []
        async with asyncio.timeout(PATIENCE_S):
            await client.subscribe("news", told.append)
        server.start()
        await until(lambda: server.command("PUBLISH", "news", "x") == 1)
        await until(lambda: told)
