"""The ways in which a Redis is run: TLS, users with narrow rights, a Unix socket, a primary under Sentinel."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from gateway.store import StoreUnavailable
from gateway.store.redis.client import RedisClient
from gateway.store.redis.store import RedisStore
from tests.gateway.store.redis.asking import COUNT, ECHO, until
from tests.support.redis_sentinel import guarded_redis
from tests.support.redis_server import RedisServer, free_port
from tests.support.redis_tls import make_certificates

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]

ACL = (
    *(
        "user",
        "gateway",
        "on",
        ">hunter2",
        "~tidegate:*",
        "resetchannels",
        "&tidegate:*",
        "-@all",
        "+ping",
        "+eval",
        "+evalsha",
    ),
    *("+get", "+set", "+del", "+hmget", "+hset", "+hdel", "+hget", "+hexists", "+hstrlen", "+time", "+publish"),
    *("+zadd", "+zrem", "+zrange", "+zrangebyscore", "+zremrangebyscore", "+zremrangebyrank", "+zcard", "+subscribe"),
)


async def test_tls_with_an_authority_of_one_s_own(make_client: Make, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    port = free_port()
    server = RedisServer(*certificates.options(port))
    try:
        server.start()
    except AssertionError as failed:
        if "tls" not in str(failed):
            raise
        pytest.skip(f"{server.binary} was built without TLS")
    with contextlib.closing(server):
        client = make_client(f"rediss://localhost:{port}", ca_file=certificates.ca)
        assert await asyncio.gather(*(client.run(ECHO, (), (number,)) for number in range(3))) == [b"0", b"1", b"2"]
        told: list[bytes] = []
        await client.subscribe("news", told.append)
        server.command("PUBLISH", "news", "x")
        await until(lambda: told)
        stranger = make_client(f"rediss://localhost:{port}")
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await stranger.connect(within_s=1.0)


async def test_a_password(make_client: Make) -> None:
    with RedisServer(("requirepass", "hunter2")) as server:
        assert await make_client(server.url, password="hunter2").run(ECHO, (), ("x",)) == b"x"
        for given, message in (("", "NOAUTH"), ("wrong-secret", "WRONGPASS")):
            client = make_client(server.url, password=given)
            with pytest.raises(StoreUnavailable, match=message) as refused:
                await client.connect(within_s=0.5)
            assert "wrong-secret" not in str(refused.value) + repr(client)


async def test_a_user_who_may_only_do_what_is_needed_under_its_prefix(make_client: Make) -> None:
    """The rights that the documentation asks for."""
    with RedisServer(("user", "default", "off"), ACL) as server:
        client = make_client(server.url, username="gateway", password="hunter2")
        store = RedisStore(client)
        assert await store.claim("job", "a", 10.0)
        await store.post("key", b"value", 5.0)
        await store.withdraw("key")
        await store.release("job", "a")
        assert await store.beat("gateway 1", 5.0) == 1
        cursor = (await store.read_since()).cursor
        reading = asyncio.create_task(store.read_since(cursor, 10.0))
        await asyncio.sleep(0.05)
        await store.post("key", b"value")
        assert (await reading).changes
        with pytest.raises(StoreUnavailable, match=r"NOPERM|can't access|No permissions"):
            await client.run(COUNT, ("other:{x}",), ())


async def test_a_unix_socket_and_a_database_of_its_own(make_client: Make) -> None:
    with RedisServer(unix=True) as server:
        client = make_client(f"{server.url}?db=3")
        assert await client.run(COUNT, ("n",), ()) == 1
        with server.client(db=3) as other:
            assert other.get("n") == b"1"
        server.restart()
        await until(lambda: client.epoch == 1)  # it was lost, and is there again
        assert await client.run(COUNT, ("n",), ()) == 1


@pytest.mark.parametrize("sentinels", [1, 3])
async def test_a_failover_is_followed(make_client: Make, sentinels: int) -> None:
    with guarded_redis(sentinels) as guarded:
        client = make_client(guarded.url, timeout_s=0.5)
        await client.connect()
        assert await client.run(COUNT, ("n",), ()) == 1
        store = RedisStore(client)
        cursor = (await store.read_since()).cursor
        guarded.primary.kill()
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                await client.run(COUNT, ("n",), ())
        assert not client.available
        await asyncio.to_thread(_until_promoted, guarded.replica)
        promoted_at = time.monotonic()
        await until(lambda: client.available)
        assert time.monotonic() - promoted_at < 3.0
        assert await client.run(COUNT, ("m",), ()) == 1
        with guarded.replica.client() as other:
            assert other.get("m") == b"1"
        assert (await store.read_since(cursor)).reset


def _until_promoted(replica: RedisServer) -> None:
    end = time.monotonic() + 30.0
    while True:
        with contextlib.suppress(redis.ConnectionError):  # a sentinel closes a server's connections when it promotes it
            if replica.command("ROLE")[0] == b"master":
                return
        assert time.monotonic() < end, "no failover"
        time.sleep(0.05)
