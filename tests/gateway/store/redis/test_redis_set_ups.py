"""The ways in which a Redis is run: TLS, a password, a Unix socket, a primary under Sentinel."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from gateway.config.tls import tls_context
from gateway.store import StoreUnavailable
from gateway.store.redis.client import RedisClient
from gateway.store.redis.library import find_primary
from gateway.store.redis.link import Refused
from gateway.store.redis.store import RedisStore
from loadtests.ports import free_port
from tests.gateway.store.redis.asking import COUNT, ECHO, until
from tests.support.redis_sentinel import SERVICE, guarded_redis
from tests.support.redis_server import RedisServer
from tests.support.redis_tls import Certificates, make_certificates

LOOPS = ("asyncio", "uvloop")
Make = Callable[..., RedisClient]


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
        client = make_client(f"rediss://localhost:{port}", tls=tls_context(Path(certificates.ca), None, None))
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


async def test_sentinels_that_are_gone_frozen_or_have_a_password(make_client: Make) -> None:
    with guarded_redis(1, password="hunter3") as guarded, RedisServer() as frozen:
        frozen.freeze()
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{frozen.port},127.0.0.1:{guarded.sentinels[0]}/"
        client = make_client(url + SERVICE, sentinel_password="hunter3")
        await client.connect()
        assert await client.run(COUNT, ("n",), ()) == 1
        told: list[bytes] = []
        await client.subscribe("news", told.append)
        await until(lambda: guarded.primary.command("PUBLISH", "news", "x"))
        await until(lambda: told)
        frozen.thaw()
        for service, given, said in (
            (SERVICE, "", "Authentication required"),
            (SERVICE, "wrong-secret", "invalid username-password|WRONGPASS"),
            ("nobody", "hunter3", "it knows no primary nobody"),
        ):
            stranger = make_client(f"{guarded.url.rpartition('/')[0]}/{service}", sentinel_password=given)
            with pytest.raises(StoreUnavailable, match=f"no sentinel named a primary .*({said})") as refused:
                await stranger.connect(within_s=1.0)
            assert "wrong-secret" not in str(refused.value)


async def test_a_demoted_primary_is_not_used_although_a_sentinel_names_it(make_client: Make) -> None:
    with guarded_redis(1) as guarded:
        guarded.primary.command("REPLICAOF", "127.0.0.1", "1")  # the sentinel puts that right only after a while
        with pytest.raises(StoreUnavailable, match="it is no primary but a slave"):
            await make_client(guarded.url).connect(within_s=0.5)


async def test_sentinels_are_reached_over_tls_by_an_authority_of_one_s_own(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    port = free_port()
    options = tuple(" ".join(option) for option in certificates.options(port))
    with contextlib.ExitStack() as stack:
        if _built_without_tls(stack, certificates):
            pytest.skip("redis-server was built without TLS")
        guarded = stack.enter_context(guarded_redis(1, options=options))
        own = ssl.create_default_context(cafile=certificates.ca)
        primary, named_by = await find_primary(SERVICE, [("localhost", port)], within_s=5.0, tls=own)
        assert primary == ("127.0.0.1", guarded.primary.port)
        assert named_by == ("localhost", port)
        with pytest.raises(Refused, match="certificate verify failed"):
            await find_primary(SERVICE, [("localhost", port)], within_s=5.0, tls=ssl.create_default_context())


def _built_without_tls(stack: contextlib.ExitStack, certificates: Certificates) -> bool:
    try:
        stack.enter_context(RedisServer(*certificates.options(free_port())))
    except AssertionError as failed:
        if "tls" not in str(failed):
            raise
        return True
    return False


def _until_promoted(replica: RedisServer) -> None:
    end = time.monotonic() + 30.0
    while True:
        with contextlib.suppress(redis.ConnectionError):  # a sentinel closes a server's connections when it promotes it
            if replica.command("ROLE")[0] == b"master":
                return
        assert time.monotonic() < end, "no failover"
        time.sleep(0.05)
