"""The admin listener takes few connections, and none that says nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gateway import listener as module
from gateway.listener import MAX_OPERATORS, admin_listener, bind_tcp, listen
from tests.support.client import RawClient, connect, until

ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def hello(_: Request) -> Response:
    return PlainTextResponse("hello")


async def slow(_: Request) -> Response:
    await asyncio.sleep(0.3)
    return PlainTextResponse("at last")


async def names(request: Request) -> Response:
    with contextlib.suppress(ClientDisconnect):
        await request.body()
    return PlainTextResponse(",".join(request.headers))


ROUTES = [Route("/", hello), Route("/slow", slow), Route("/body", names, methods=["POST"])]


@contextlib.asynccontextmanager
async def admin() -> AsyncIterator[tuple[module.Listener, int]]:
    sock = bind_tcp("127.0.0.1", 0, "admin.port")
    listen([sock])
    listener = admin_listener(Starlette(routes=ROUTES))
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    yield listener, sock.getsockname()[1]
    listener.should_exit = True
    listener.cut()
    await task


async def answered(client: RawClient) -> bool:
    await client.send(ASK)
    try:
        return (await client.reply()).status == 200
    except (OSError, EOFError):
        return False


async def test_operators_beyond_the_bound_are_turned_away_and_those_inside_served() -> None:
    async with admin() as (listener, port), contextlib.AsyncExitStack() as held:
        first = await held.enter_async_context(connect("127.0.0.1", port))
        for _ in range(MAX_OPERATORS + 50):
            await held.enter_async_context(connect("127.0.0.1", port))
        await until(lambda: listener.open_connections <= MAX_OPERATORS)
        async with connect("127.0.0.1", port) as late:
            assert not await answered(late)
        assert await answered(first)


async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_HEAD_S", 0.3)
    async with admin() as (_, port):
        async with connect("127.0.0.1", port) as silent, connect("127.0.0.1", port) as slow:
            await slow.send(b"GET / HTTP/1.1\r\nx-")
            assert await silent.rest(10.0) == b""
            assert await slow.rest(10.0) == b""
        async with connect("127.0.0.1", port) as asking:
            assert await answered(asking)
            await asyncio.sleep(0.5)
            assert await answered(asking)


@pytest.mark.parametrize("more", [b"G", b"\r\n", b"GET / HTTP/1.1\r\nx-"])
async def test_a_second_request_that_does_not_come_is_not_waited_for_either(
    monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    """Two hundred of these would keep the operators out."""
    monkeypatch.setattr(module, "FIRST_HEAD_S", 0.3)
    async with admin() as (_, port), connect("127.0.0.1", port) as client:
        assert await answered(client)
        await client.send(more)
        assert await client.rest(10.0) == b""


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_S", 0.3)
    async with admin() as (_, port):
        async with connect("127.0.0.1", port) as client:
            await client.send(b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n12")
            assert (await client.reply()).status == 200
            await client.send(b"3")
            assert await client.rest(10.0) == b""
        async with connect("127.0.0.1", port) as client:
            await client.send(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n12")
            assert await client.rest(10.0) == b""


async def test_a_request_that_is_refused_behind_another_is_not_answered_in_its_place() -> None:
    async with admin() as (_, port), connect("127.0.0.1", port) as client:
        await client.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n")
        assert b" 400 " not in await client.rest(10.0)


async def test_trailers_are_no_headers() -> None:
    async with admin() as (_, port), connect("127.0.0.1", port) as client:
        await client.send(
            b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            b"1\r\nx\r\n0\r\nauthorization: y\r\n\r\n"
        )
        assert (await client.reply()).body == b"host,transfer-encoding"
