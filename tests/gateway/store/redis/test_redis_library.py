"""What redis-py does here: that messages come again after every kind of loss, and that others do not pay for it."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from gateway.store.redis.client import RedisClient
from gateway.store.redis.ending import end
from tests.gateway.store.redis.asking import client_of, until
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]

MEMORY = """
import asyncio, sys
import gateway.supervisor, gateway.worker
from gateway.admission.opening import Admission
from gateway.config import Settings
import gateway.store.redis.client
async def main():
    admission = Admission(Settings())
    await admission.start()
    await admission.aclose()
asyncio.run(main())
print("redis" in sys.modules)
from gateway.store.redis.address import parse_address
gateway.store.redis.client.RedisClient(parse_address("redis://localhost"))
print("redis" in sys.modules)
"""


def test_only_a_process_whose_store_is_a_redis_imports_redis_py() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.fixture
def ping_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """What the listener takes for a long silence: three seconds, nine until it acts, are for those who have them."""
    monkeypatch.setattr("gateway.store.redis.listener.PING_S", 1.0)
    return 1.0


async def test_a_subscription_notices_that_nothing_comes_any_more(
    redis_server: RedisServer, make_client: Make, ping_s: float
) -> None:
    """Half open: what is written is accepted, and nothing comes back, not even an end."""
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url, connections=1)
        told: list[bytes] = []
        await client.connect()
        await client.subscribe("news", told.append)
        assert redis_server.command("PUBLISH", "news", "1") == 1
        await until(lambda: told == [b"1"])
        before = proxy.connections
        proxy.drop_replies = True
        began_at = time.monotonic()
        await until(lambda: proxy.connections > before)
        assert ping_s < time.monotonic() - began_at < 4 * ping_s + 2.0  # 2 to 3 times as long
        proxy.drop_replies = False
        proxy.cut()
        # again and again: Redis may still count the connection that was cut
        await until(lambda: redis_server.command("PUBLISH", "news", "2") and b"2" in told)


async def test_an_idle_subscription_stays_on_its_connection(
    redis_server: RedisServer, make_client: Make, ping_s: float
) -> None:
    async with RedisProxy("127.0.0.1", redis_server.port) as proxy:
        client = make_client(proxy.url, connections=1)
        await client.connect()
        proxy.keep = True
        await client.subscribe("news", lambda _: None)
        before = proxy.connections
        proxy.writes.clear()
        await asyncio.sleep(2.5 * ping_s)
        assert proxy.connections == before
        assert b"".join(proxy.writes).count(b"PING") == 2


async def test_a_channel_given_up_and_wanted_again_is_heard(redis_server: RedisServer, make_client: Make) -> None:
    client = make_client(redis_server.url)
    told: list[bytes] = []
    for turn in range(20):
        give_up = await client.subscribe("news", told.append)
        if turn % 2:
            await until(lambda: redis_server.command("PUBSUB", "NUMSUB", "news") == [b"news", 1])
        give_up()
        give_up()
        if turn % 3 == 0:
            await until(lambda: redis_server.command("PUBSUB", "NUMSUB", "news") == [b"news", 0])
    began_at = time.monotonic()
    await client.subscribe("news", told.append)
    assert time.monotonic() - began_at < 0.9  # confirmed, not given up waiting for that
    await until(lambda: redis_server.command("PUBLISH", "news", "x") == 1)
    await until(lambda: told == [b"x"])


async def test_closing_ends_whatever_the_listener_is_about_to_write(redis_server: RedisServer) -> None:
    """`asyncio.wait_for` of Python 3.11, under redis-py's writes, loses a cancellation that comes as the write ends.

    Which turn of the event loop that is depends on the loop and on how busy the machine is, so all near ones are tried.
    """
    for turns in range(12):
        client = client_of(redis_server.url)
        give_up = await client.subscribe("news", lambda _: None)
        await client.subscribe("others", lambda _: None)
        give_up()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(5.0):
            await client.aclose()
    await until(lambda: redis_server.command("PUBSUB", "NUMSUB", "others") == [b"others", 0])


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                if lost == 2:
                    raise
                lost += 1

    async def failing() -> None:
        raise ValueError("by the test")

    tasks = [asyncio.create_task(deaf()), asyncio.create_task(deaf()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    async with asyncio.timeout(5.0):
        await end(tasks)
    assert [task.cancelled() for task in tasks] == [True, True, False]


async def test_a_missing_right_to_subscribe_is_told_once(make_client: Make, caplog: pytest.LogCaptureFixture) -> None:
    rights = ("user", "gateway", "on", ">hunter2", "~*", "resetchannels", "+@all")
    with RedisServer(("user", "default", "on", "nopass", "~*", "&*", "+@all"), rights) as server:
        client = make_client(server.url, username="gateway", password="hunter2")
        told: list[bytes] = []
        await client.subscribe("news", told.append)
        await asyncio.sleep(0.3)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == 1, said
        assert "no messages of the store" in said[0]
        server.command("ACL", "SETUSER", "gateway", "&*")
        await until(lambda: server.command("PUBLISH", "news", "x") == 1)
        await until(lambda: told)


async def test_a_callback_that_fails_stops_no_message(
    redis_server: RedisServer, make_client: Make, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(redis_server.url)
    told: list[bytes] = []

    def take(message: bytes) -> None:
        told.append(message)
        raise ValueError("by the test")

    await client.subscribe("news", take)
    for text in ("1", "2"):
        redis_server.command("PUBLISH", "news", text)
    await until(lambda: told == [b"1", b"2"])
    assert "could not be dealt with" in caplog.text
