"""Slow, broken and hostile clients: what they send is refused or cut, and never reaches a model server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from gateway.order import CHAT
from loadtests.engine import FakeEngine
from tests.support.client import RawClient, connect, post, until
from tests.support.talking import ASK, LATE_S, SHORT, STREAM, Talk, both_edges, gateway_of, talking

LOOPS = ("uvloop",)


async def trickle(client: RawClient, piece: bytes, every_s: float = 0.05) -> None:
    while not client.reader.at_eof():
        await client.send(piece)
        await asyncio.sleep(every_s)


@contextlib.asynccontextmanager
async def trickling(client: RawClient, piece: bytes) -> AsyncIterator[None]:
    task = asyncio.create_task(trickle(client, piece))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


# -- deadlines


@both_edges
async def test_a_head_that_trickles_in_is_cut_off(edge: str) -> None:
    async with talking(edge, **SHORT) as talk:
        began = time.monotonic()
        await talk.client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        async with trickling(talk.client, b"a"):
            await talk.refused(408)
        assert 0.3 <= time.monotonic() - began <= 0.3 + LATE_S


@both_edges
async def test_a_silent_connection_is_closed_without_a_word(edge: str) -> None:
    async with talking(edge, **SHORT) as talk:
        began = time.monotonic()
        assert await talk.client.rest() == b""
        assert 0.25 <= time.monotonic() - began <= 0.3 + LATE_S


@both_edges
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
async def test_a_body_that_trickles_in_is_cut_off(edge: str, framing: str) -> None:
    async with talking(edge, **SHORT) as talk:
        began = time.monotonic()
        await talk.client.send(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode())
        async with trickling(talk.client, b"{" if "Length" in framing else b"1\r\n{\r\n"):
            await talk.refused(408)
        assert 0.3 <= time.monotonic() - began <= 0.3 + LATE_S
        talk.assert_nothing_reached_the_engine()


@both_edges
@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /v1/models", 200), ("POST /v1/nothing", 404), ("PUT /v1/chat/completions", 405), ("GET /livez", 200)],
)
async def test_a_body_that_nobody_waits_for_has_a_deadline_too(edge: str, line: str, status: int) -> None:
    async with talking(edge, **SHORT) as talk:
        await talk.client.send(f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode())
        reply = await talk.client.reply()
        assert reply.status == status
        began = time.monotonic()
        async with trickling(talk.client, b"a"):
            assert await talk.client.rest() == b""  # and no second answer to the same request
        assert time.monotonic() - began <= 0.6 + LATE_S


@both_edges
async def test_a_connection_whose_body_came_after_its_answer_is_closed_when_idle(edge: str) -> None:
    async with talking(edge, **SHORT) as talk:
        await talk.client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
        assert (await talk.client.reply()).status == 200
        await talk.client.send(b"{}")
        began = time.monotonic()
        assert await talk.client.rest() == b""
        assert time.monotonic() - began <= 0.3 + LATE_S


@both_edges
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_an_idle_connection_is_closed(edge: str, path: str) -> None:
    async with talking(edge, **{**SHORT, "header_timeout_s": 10}) as talk:
        await talk.client.send(
            post(CHAT, ASK) if path == CHAT else b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        assert (await talk.client.reply()).status == 200
        began = time.monotonic()
        assert await talk.client.rest() == b""
        assert 0.25 <= time.monotonic() - began <= 0.3 + LATE_S


@both_edges
async def test_a_slow_answer_is_no_deadline_of_the_client(edge: str) -> None:
    async with talking(edge, {"delay_head_s": 0.9}, **SHORT) as talk:
        await talk.client.send(post(CHAT, ASK))
        assert (await talk.client.reply()).status == 200


# -- clients that do not read


async def stalled(talk: Talk) -> Any:
    """The server's side of the connection, as soon as the client's slowness shows."""
    (connection,) = talk.gateway.listener.server_state.connections
    await until(lambda: getattr(connection, "stalled_since", None) is not None)
    return connection


@both_edges
async def test_a_stream_that_nobody_reads_pauses_its_source_and_is_cut(edge: str) -> None:
    script: dict[str, Any] = {"chunks": 1_000_000, "chunk_bytes": 4000}
    async with (
        FakeEngine(**script) as engine,
        gateway_of(engine, edge, **SHORT) as gateway,
        connect(gateway.host, gateway.port, receive_buffer_bytes=4096) as client,
    ):
        await client.send(post(CHAT, STREAM))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        request = await engine.received()
        connection = await stalled(Talk(engine, gateway, client))
        began = time.monotonic()
        await asyncio.sleep(0.1)
        written = request.writes
        assert connection.transport.get_write_buffer_size() < 1_000_000
        await asyncio.sleep(0.1)
        assert request.writes == written  # the model server waits
        async with asyncio.timeout(5.0):
            await request.gone.wait()
        assert 0.4 <= time.monotonic() - began <= 0.5 + LATE_S
        await gateway.settled()
        assert not gateway.listener.server_state.connections


@both_edges
async def test_a_large_answer_that_nobody_reads_is_cut(edge: str) -> None:
    async with (
        FakeEngine(huge_body_bytes=8_000_000) as engine,
        gateway_of(engine, edge, **SHORT) as gateway,
        connect(gateway.host, gateway.port, receive_buffer_bytes=4096) as client,
    ):
        await client.send(post(CHAT, ASK))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stalled(Talk(engine, gateway, client))
        began = time.monotonic()
        await until(lambda: not gateway.listener.server_state.connections)
        assert 0.4 <= time.monotonic() - began <= 0.5 + LATE_S


@both_edges
@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive"])
async def test_the_last_bytes_of_an_answer_must_be_fetched_too(edge: str, header: str) -> None:
    """A remainder too small to pause anything is still watched."""
    async with (
        FakeEngine() as engine,
        gateway_of(engine, edge, **SHORT) as gateway,
        contextlib.AsyncExitStack() as clients,
    ):
        remainders = 0
        for size in range(200_000, 700_000, 30_000):
            client = await clients.enter_async_context(connect(gateway.host, gateway.port, receive_buffer_bytes=4096))
            await client.send(post(CHAT, {**ASK, "fake": {"huge_body_bytes": size}}, header))
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await gateway.settled(17)
        for connection in gateway.listener.server_state.connections:
            remainders += 0 < connection.transport.get_write_buffer_size() < 65_536
        assert remainders  # else the sizes above do not fit this kernel
        await until(lambda: not gateway.listener.server_state.connections, 0.5 + 3 * LATE_S)


@both_edges
async def test_a_slow_reader_that_makes_progress_is_not_cut(edge: str) -> None:
    """As long as the kernel's send buffer (256 KiB, passed on in lumps) empties within the limit."""
    size = 8_000_000
    server = {**SHORT, "write_stall_timeout_s": 1.0}
    async with (
        FakeEngine(huge_body_bytes=size) as engine,
        gateway_of(engine, edge, **server) as gateway,
        connect(gateway.host, gateway.port, receive_buffer_bytes=4096) as client,
    ):
        await client.send(post(CHAT, ASK))
        await client.until(b"\r\n\r\n")
        began, received = time.monotonic(), 0
        while piece := await client.reader.read(8192):
            received += len(piece)
            if time.monotonic() - began < 2.5:
                await asyncio.sleep(0.003)
            if received >= size:
                break
        assert received >= size


# -- ceilings


@both_edges
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
@pytest.mark.parametrize(
    "head",
    [
        pytest.param("X: " + "a" * 40_000, id="one long header"),
        pytest.param("\r\n".join(f"X-{n}: {'a' * 1000}" for n in range(40)), id="many bytes"),
        pytest.param("\r\n".join(f"X-{n}: a" for n in range(101)), id="many headers"),
    ],
)
async def test_a_head_beyond_the_limits_is_refused(edge: str, path: str, head: str) -> None:
    async with talking(edge) as talk:
        await talk.client.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
        await talk.refused(431)
        talk.assert_nothing_reached_the_engine()


@both_edges
@pytest.mark.parametrize("complete", [True, False])
async def test_a_target_beyond_the_limits_is_refused(edge: str, complete: bool) -> None:
    async with talking(edge) as talk:
        await talk.client.send(
            b"GET /" + b"a" * 40_000 + (b" HTTP/1.1\r\nHost: localhost\r\n\r\n" if complete else b"")
        )
        await talk.refused(431)


@both_edges
@pytest.mark.parametrize(
    "flood", [b"2\r\n{}\r\n0\r\nX-Trailer: ", b"2;extension=", b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 20]
)
async def test_bytes_that_are_no_body_are_bounded(edge: str, flood: bytes) -> None:
    """Trailers and chunk extensions: a second head, without the first one's limits."""
    async with talking(edge) as talk:
        await talk.client.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        await talk.client.send(flood)
        async with trickling(talk.client, b"X: a\r\n" * 2000 if flood.endswith(b"\r\n") else b"a" * 12_000):
            await talk.refused(431)
        talk.assert_nothing_reached_the_engine()


@both_edges
async def test_a_trailer_is_not_a_header(edge: str) -> None:
    async with talking(edge) as talk:
        body = json.dumps(ASK).encode()
        await talk.client.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"%x\r\n%b\r\n0\r\n" % (len(body), body)
            + b"X-Tidegate-Region: mars\r\nTraceparent: 00-trailer\r\nHost: y\r\n\r\n"
        )
        assert (await talk.client.reply()).status == 200
        assert (await talk.engine.received()).header("traceparent") is None


@both_edges
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nowhere"])
async def test_a_body_declared_too_large_is_refused_before_it_is_read(edge: str, path: str) -> None:
    async with talking(edge, max_body_bytes=1024) as talk:
        await talk.client.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1025\r\n\r\n".encode())
        reply = await talk.refused(413)
        assert reply.json["error"]["code"] == "request_too_large"
        talk.assert_nothing_reached_the_engine()


@both_edges
async def test_a_chunked_body_is_cut_at_the_limit(edge: str) -> None:
    async with talking(edge, max_body_bytes=4096) as talk:
        await talk.client.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(4):
            await talk.client.send(b"400\r\n" + b" " * 1024 + b"\r\n")
        await asyncio.sleep(0.02)
        assert talk.gateway.runtime.body_budget.used_bytes == 4096
        await talk.client.send(b"1\r\n \r\n")
        await talk.refused(413)
        assert talk.gateway.runtime.body_budget.used_bytes == 0
        talk.assert_nothing_reached_the_engine()


@both_edges
async def test_a_request_behind_the_end_of_one_that_was_answered_early_has_deadlines_of_its_own(edge: str) -> None:
    """Its head comes with the last bytes of a body that nobody waited for, in one piece."""
    async with talking(edge, **{**SHORT, "header_timeout_s": 30, "keep_alive_s": 30}) as talk:
        await talk.client.send(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n")
        assert (await talk.client.reply()).status == 404
        await talk.client.send(
            b"abcd" + f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n".encode()
        )
        budget = talk.gateway.runtime.body_budget
        await until(lambda: budget.used_bytes == 500)
        await talk.client.send(b"{")
        reply = await asyncio.wait_for(talk.refused(408), 10)
        assert "body" in reply.json["error"]["message"]
        assert budget.used_bytes == 0


@both_edges
async def test_the_stock_sdk_reads_the_refusal_of_a_large_body(edge: str) -> None:
    """The answer comes while the client still sends; it must not be lost to a reset."""
    async with FakeEngine() as engine, gateway_of(engine, edge) as gateway:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError) as refused:
                await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "a" * 20_000_000}]
                )
        assert refused.value.status_code == 413
        assert engine.accepted == 0


@both_edges
async def test_a_length_that_promises_too_much_is_waited_for_and_given_up(edge: str) -> None:
    async with talking(edge, **SHORT) as talk:
        await talk.client.send(post(CHAT, ASK).replace(b"Content-Length: ", b"Content-Length: 1"))
        await talk.refused(408)
        talk.assert_nothing_reached_the_engine()


@both_edges
async def test_a_length_that_promises_too_little_executes_no_rest(edge: str) -> None:
    async with talking(edge) as talk:
        body = json.dumps(ASK).encode()
        await talk.client.send(post(CHAT, body) + b'"}trailing junk' + post(CHAT, ASK))
        await talk.client.rest()
        assert len(talk.engine.requests) <= 1


@both_edges
async def test_more_connections_than_allowed_are_told_so(edge: str) -> None:
    async with FakeEngine() as engine, gateway_of(engine, edge, max_connections=3) as gateway:
        async with contextlib.AsyncExitStack() as held:
            for _ in range(3):
                client = await held.enter_async_context(connect(gateway.host, gateway.port))
                await client.send(post(CHAT, ASK))
                assert (await client.reply()).status == 200
            async with connect(gateway.host, gateway.port) as fourth:
                reply = await Talk(engine, gateway, fourth).refused(503)
                assert reply.json["error"]["code"] == "overloaded"
                assert reply.headers["retry-after"]
        await until(lambda: not gateway.listener.server_state.connections)
        async with connect(gateway.host, gateway.port) as again:
            await again.send(post(CHAT, ASK))
            assert (await again.reply()).status == 200


@both_edges
async def test_one_address_has_no_more_connections_than_it_may(edge: str) -> None:
    async with FakeEngine() as engine, gateway_of(engine, edge, max_connections_per_address=2) as gateway:
        counts = gateway.runtime.connections_of
        async with contextlib.AsyncExitStack() as held:
            for _ in range(2):
                await held.enter_async_context(connect(gateway.host, gateway.port))
            await until(lambda: counts.total() == 2)
            async with connect(gateway.host, gateway.port) as third:
                reply = await Talk(engine, gateway, third).refused(503)
                assert "Your address" in reply.json["error"]["message"]
        await until(lambda: not counts)
        async with connect(gateway.host, gateway.port) as again:
            await again.send(post(CHAT, ASK))
            assert (await again.reply()).status == 200


@both_edges
async def test_more_request_bytes_than_fit_are_refused_until_others_are_done(edge: str) -> None:
    filler = {**ASK, "user": "a" * 3000}
    async with FakeEngine(hang=True) as engine, gateway_of(engine, edge, max_in_flight_bytes=4096) as gateway:
        async with connect(gateway.host, gateway.port) as first, connect(gateway.host, gateway.port) as second:
            await first.send(post(CHAT, filler))
            await engine.received()
            await second.send(post(CHAT, filler))
            reply = await Talk(engine, gateway, second).refused(503)
            assert reply.headers["retry-after"]
            first.leave("close")
            await gateway.settled()
        await until(lambda: not gateway.runtime.body_budget.used_bytes)
        engine.script = engine.script.updated({"hang": False})
        async with connect(gateway.host, gateway.port) as third:
            await third.send(post(CHAT, filler))
            assert (await third.reply()).status == 200


@both_edges
async def test_a_declared_length_alone_holds_little_of_the_byte_budget(edge: str) -> None:
    size = 1 << 20
    claim = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()
    async with (
        FakeEngine() as engine,
        gateway_of(engine, edge, max_in_flight_bytes=2 * size, max_body_bytes=size) as gateway,
        contextlib.AsyncExitStack() as claims,
    ):
        for _ in range(8):
            claimant = await claims.enter_async_context(connect(gateway.host, gateway.port))
            await claimant.send(claim)
        async with connect(gateway.host, gateway.port) as other:
            await other.send(post(CHAT, {**ASK, "user": "a" * (size // 2)}))
            assert (await other.reply()).status == 200
