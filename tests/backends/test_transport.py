"""The lean client behind httpx2's API, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from backends.ticker import Ticker
from backends.transport import LeanTransport
from tests.backends.scripted import OK, Peer, Script, ScriptedServer, scripted, soon, until

EVERY_LOOP = True

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def client_of(
    script: Script, transport: LeanTransport | None = None
) -> AsyncIterator[tuple[httpx2.AsyncClient, ScriptedServer]]:
    transport = LeanTransport() if transport is None else transport
    async with (
        scripted(script) as server,
        httpx2.AsyncClient(transport=transport, trust_env=False, base_url=str(server.origin)) as client,
    ):
        yield client, server


async def test_get_with_query_and_headers() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n" + b'{"a": "\xc3\xa9"}'
        )

    async with client_of(script) as (client, server):
        response = await client.get("/v1/models?x=a%20b", headers={"X-Probe": "1"})
        assert response.status_code == 200
        assert response.json() == {"a": "é"}
        assert response.http_version == "HTTP/1.1"
        head = seen[0].lower()
        assert head.startswith(b"get /v1/models?x=a%%20b http/1.1\r\nhost: 127.0.0.1:%d\r\n" % server.origin.port)
        assert b"\r\nx-probe: 1\r\n" in head
        assert b"content-length" not in head


async def test_post_json_and_connection_reuse() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.send(OK)

    async with client_of(script) as (client, server):
        for _ in range(3):
            assert (await client.post("/abort", json={"rid": "x"})).text == "hi"
        assert server.accepted == 1
        assert seen[0].endswith(b'\r\n\r\n{"rid":"x"}')


async def test_streamed_upload_is_sent_with_its_length() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(OK)

    async with client_of(script) as (client, _):
        await client.post("/", content=body())
    assert seen[0].endswith(b"\r\ncontent-length: 7\r\n\r\none two")
    assert b"transfer-encoding" not in seen[0].lower()


async def test_compressed_answers_are_the_clients_business() -> None:
    import gzip

    packed = gzip.compress(b"hello")

    async def script(peer: Peer) -> None:
        await peer.request()
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
        await peer.send(head % len(packed) + packed)

    async with client_of(script) as (client, _):
        async with client.stream("GET", "/") as response:
            assert b"".join([chunk async for chunk in response.aiter_raw()]) == packed
        assert (await client.get("/")).content == b"hello"


async def test_head_has_no_body() -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")

    async with client_of(script) as (client, server):
        for _ in range(2):
            response = await client.head("/")
            assert (response.headers["content-length"], response.content) == ("500", b"")
        assert server.accepted == 1


async def test_redirects_are_the_clients_business() -> None:
    async def script(peer: Peer) -> None:
        while True:
            old = b"/old" in await peer.request()
            await peer.send(b"HTTP/1.1 302 Found\r\nlocation: /new\r\ncontent-length: 0\r\n\r\n" if old else OK)

    async with client_of(script) as (client, _):
        assert (await client.get("/old")).status_code == 302
        assert (await client.get("/old", follow_redirects=True)).text == "hi"


async def test_stream_arrives_piece_by_piece() -> None:
    turn = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for piece in (b"a", b"b", b"c"):
            await soon(turn)
            turn.clear()
            await peer.send(b"1\r\n%b\r\n" % piece)
        await peer.send(b"0\r\n\r\n")
        await peer.gone()

    async with client_of(script) as (client, server):
        got = []
        async with client.stream("GET", "/") as response:
            turn.set()
            async for chunk in response.aiter_bytes():
                got.append(chunk)
                turn.set()
        assert got == [b"a", b"b", b"c"]
        assert server.open == 1


async def test_slow_reader_holds_the_server_back() -> None:
    block = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(400):
            await peer.send(block)
            sent += 1
        await peer.send(b"0\r\n\r\n")

    async with client_of(script) as (client, _), client.stream("GET", "/") as response:
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.05)
        assert sent < 400
        total = 0
        async for chunk in response.aiter_bytes():
            total += len(chunk)
        assert total == 400 * 65536


async def test_leaving_a_stream_closes_the_socket() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"1\r\na\r\n")
        await peer.gone()

    async with client_of(script) as (client, server):
        async with client.stream("GET", "/") as response:
            async for chunk in response.aiter_bytes():
                assert chunk == b"a"
                break
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("head", [b"", CHUNKED])
async def test_cancellation_closes_the_socket(head: bytes) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head)
        asked.set()
        await peer.gone()

    async with client_of(script) as (client, server):
        task = asyncio.create_task(client.get("/", timeout=None))
        await soon(asked)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.open == 0)


async def test_stale_connection_is_replaced_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if peer.number > 0:
            await peer.send(OK)

    async with client_of(script) as (client, server):
        assert (await client.get("/")).text == "hi"
        assert (await client.post("/", content=b"x")).text == "hi"
        assert server.accepted == 2


async def test_failures_have_their_httpx2_names() -> None:
    async def script(peer: Peer) -> None:
        target = (await peer.request()).split()[1]
        if target == b"/violation":
            await peer.send(b"garbage\r\n\r\n")
        elif target == b"/half":
            await peer.send(OK[:-1])
        elif target == b"/reset":
            peer.reset()
        elif target == b"/silent-head":
            await peer.gone()
        elif target == b"/silent-body":
            await peer.send(OK[:-1])
            await peer.gone()

    transport = LeanTransport(ticker=Ticker(interval_s=0.01))
    async with client_of(script, transport) as (client, server):
        timeout = httpx2.Timeout(5, read=0.05)
        for target, kind in {
            "/close": httpx2.RemoteProtocolError,
            "/violation": httpx2.RemoteProtocolError,
            "/half": httpx2.RemoteProtocolError,
            "/reset": httpx2.ReadError,
            "/silent-head": httpx2.ReadTimeout,
            "/silent-body": httpx2.ReadTimeout,
        }.items():
            with pytest.raises(kind, match=server.origin.address) as caught:
                await client.get(target, timeout=timeout)
            assert caught.value.request.url.path == target
        await until(lambda: server.open == 0)
    refusing = httpx2.AsyncClient(transport=LeanTransport(), trust_env=False)
    async with refusing:
        with pytest.raises(httpx2.ConnectError, match="connection refused"):
            await refusing.get(str(server.origin))
        for url in ("ftp://h/", "http+unix://x/"):
            with pytest.raises((httpx2.UnsupportedProtocol, httpx2.InvalidURL)):
                await refusing.get(url)


async def test_pool_timeout() -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    transport = LeanTransport(max_connections=1, ticker=Ticker(interval_s=0.01))
    async with client_of(script, transport) as (client, _):
        first = asyncio.create_task(client.get("/"))
        await asyncio.sleep(0.02)
        with pytest.raises(httpx2.PoolTimeout):
            await client.get("/", timeout=httpx2.Timeout(5, pool=0.03))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_number_of_pools_is_bounded() -> None:
    async def script(peer: Peer) -> None:
        await peer.serve(OK)

    transport = LeanTransport(max_origins=2)
    async with (
        scripted(script) as a,
        scripted(script) as b,
        scripted(script) as c,
        httpx2.AsyncClient(transport=transport, trust_env=False) as client,
    ):
        for server in (a, b, a, c):
            assert (await client.get(str(server.origin))).text == "hi"
        assert [pool.origin for pool in transport._pools.values()] == [a.origin, c.origin]
        await until(lambda: (a.open, b.open, c.open) == (1, 0, 1))


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0b"])
async def test_header_injection_is_refused(value: str) -> None:
    async with httpx2.AsyncClient(transport=LeanTransport(), trust_env=False) as client:
        with pytest.raises(httpx2.LocalProtocolError, match="malformed header"):
            await client.get("http://127.0.0.1:9", headers={"x": value})
        with pytest.raises(httpx2.LocalProtocolError, match="content-length"):
            await client.post("http://127.0.0.1:9", headers={"content-length": "3"}, content=b"four")


async def test_unix_socket(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.serve(OK)

    path = tmp_path / "admin.sock"
    transport = LeanTransport(uds=str(path))
    async with (
        scripted(script, uds=path),
        httpx2.AsyncClient(transport=transport, trust_env=False) as client,
    ):
        assert (await client.get("http://admin/health")).text == "hi"
        with pytest.raises(httpx2.UnsupportedProtocol):
            await client.get("https://admin/health")
