"""HTTP as it must be read: strictly, in order, and with nothing passed on that was not meant to be."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from gateway.order import CHAT
from loadtests.rawclient import read_head
from tests.support.client import post
from tests.support.talking import ASK, SHORT, STREAM, both_edges, talking

LOOPS = ("uvloop",)

BODY = json.dumps(ASK).encode()
SIZE = len(BODY)


def raw(
    *lines: str, body: bytes = BODY, line: str = f"POST {CHAT} HTTP/1.1", host: str | None = "Host: localhost"
) -> bytes:
    head = [line, *([host] if host else []), *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)
FORMS = {
    "no Host": raw(f"Content-Length: {SIZE}", host=None),
    "two Hosts": raw("Host: y", f"Content-Length: {SIZE}"),
    "two equal Hosts": raw("Host: localhost", f"Content-Length: {SIZE}"),
    "Host with a path": raw(f"Content-Length: {SIZE}", host="Host: a/x?y="),
    "Host with a user": raw(f"Content-Length: {SIZE}", host="Host: a@b"),
    "Host with a space": raw(f"Content-Length: {SIZE}", host="Host: a b"),
    "two Authorizations": raw("Authorization: Bearer a", "Authorization: Bearer b", f"Content-Length: {SIZE}"),
    "length and chunks": raw(f"Content-Length: {SIZE}", "Transfer-Encoding: chunked", body=CHUNKED),
    "chunks and length": raw("Transfer-Encoding: chunked", f"Content-Length: {SIZE}", body=CHUNKED),
    "two lengths": raw(f"Content-Length: {SIZE}", "Content-Length: 3"),
    "two equal lengths": raw(f"Content-Length: {SIZE}", f"Content-Length: {SIZE}"),
    "list of lengths": raw(f"Content-Length: {SIZE}, {SIZE}"),
    "plus": raw(f"Content-Length: +{SIZE}"),
    "minus": raw("Content-Length: -1"),
    "hexadecimal": raw(f"Content-Length: 0x{SIZE:x}"),
    "huge length": raw("Content-Length: 99999999999999999999999999"),
    "length with a space inside": raw("Content-Length: 4 2"),
    "identity": raw("Transfer-Encoding: identity"),
    "xchunked": raw("Transfer-Encoding: xchunked", body=CHUNKED),
    "chunked, identity": raw("Transfer-Encoding: chunked, identity", body=CHUNKED),
    "gzip, chunked": raw("Transfer-Encoding: gzip, chunked", body=CHUNKED),
    "chunked twice": raw("Transfer-Encoding: chunked, chunked", body=CHUNKED),
    "chunked in two headers": raw("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=CHUNKED),
    "chunked, then identity": raw("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=CHUNKED),
    "quoted chunked": raw('Transfer-Encoding: "chunked"', body=CHUNKED),
    "space before the colon": raw("Transfer-Encoding : chunked", body=CHUNKED),
    "vertical tab": raw("Transfer-Encoding: \x0bchunked", body=CHUNKED),
    "chunks in HTTP/1.0": raw("Transfer-Encoding: chunked", body=CHUNKED, line=f"POST {CHAT} HTTP/1.0"),
    "bare LF": raw(f"Content-Length: {SIZE}").replace(b"\r\n", b"\n"),
    "one bare LF": raw("X: a\nY: b", f"Content-Length: {SIZE}"),
    "bare LF at the end of the head": raw(f"Content-Length: {SIZE}").replace(b"\r\n\r\n", b"\n\n"),
    "folded header": raw("X: a\r\n b", f"Content-Length: {SIZE}"),
    "folded coding": raw("Transfer-Encoding:\r\n chunked", body=CHUNKED),
    "chunk size not a number": raw("Transfer-Encoding: chunked", body=b"g\r\n"),
    "chunk size with a prefix": raw("Transfer-Encoding: chunked", body=b"0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk size with a sign": raw("Transfer-Encoding: chunked", body=b"+2\r\n{}\r\n0\r\n\r\n"),
    "chunk size too large": raw("Transfer-Encoding: chunked", body=b"ffffffffffffffffff\r\n"),
    "chunk longer than its size": raw("Transfer-Encoding: chunked", body=b"1\r\n{}\r\n0\r\n\r\n"),
    "chunk ended by LF": raw("Transfer-Encoding: chunked", body=b"2\r\n{}\n0\r\n\r\n"),
    "chunk size ended by LF": raw("Transfer-Encoding: chunked", body=b"2\n{}\r\n0\r\n\r\n"),
    "NUL in a value": raw("X: a\0b", f"Content-Length: {SIZE}"),
    "CR in a value": raw("X: a\rb", f"Content-Length: {SIZE}"),
    "NUL in a name": raw("X\0: a", f"Content-Length: {SIZE}"),
    "space in a name": raw("X Y: a", f"Content-Length: {SIZE}"),
    "no name": raw(": a", f"Content-Length: {SIZE}"),
    "no colon": raw("just words", f"Content-Length: {SIZE}"),
    "control character in the target": raw(f"Content-Length: {SIZE}", line="POST /v1/\x01 HTTP/1.1"),
    "no target": raw(f"Content-Length: {SIZE}", line="POST  HTTP/1.1"),
    "no version": raw(f"Content-Length: {SIZE}", line=f"POST {CHAT}"),
    "unknown version": raw(f"Content-Length: {SIZE}", line=f"POST {CHAT} HTTP/1.9"),
    "another protocol": raw(f"Content-Length: {SIZE}", line=f"POST {CHAT} ICE/1.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "CONNECT": raw(line="CONNECT example.com:443 HTTP/1.1", body=b""),
    "upgrade to WebSocket": raw("Connection: Upgrade", "Upgrade: websocket", body=b"", line="GET /v1/models HTTP/1.1"),
    "upgrade to HTTP/2": raw("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {SIZE}"),
}


@both_edges
@pytest.mark.parametrize("form", FORMS)
async def test_a_request_that_can_be_read_in_two_ways_is_refused(edge: str, form: str) -> None:
    async with talking(edge, **SHORT) as talk:
        await talk.client.send(FORMS[form])
        await talk.refused(400)
        talk.assert_nothing_reached_the_engine()
        assert talk.gateway.runtime.body_budget.used_bytes == 0


@both_edges
@pytest.mark.parametrize("form", [form for form in FORMS if CHAT.encode() in FORMS[form]])
async def test_so_it_is_on_the_other_routes(edge: str, form: str) -> None:
    async with talking(edge, **SHORT) as talk:
        await talk.client.send(FORMS[form].replace(b"POST " + CHAT.encode(), b"GET /v1/models"))
        await asyncio.sleep(0)
        reply = await talk.client.reply()
        # A chunk that breaks the rules may come after a route that wants no body has answered.
        assert reply.status == 400 or (reply.status == 200 and "chunk " in form)
        assert b"HTTP/1.1 2" not in await talk.client.rest()


@both_edges
@pytest.mark.parametrize(
    "carrier",
    [
        pytest.param(f"POST {CHAT}", id="not JSON"),
        pytest.param("GET /v1/models", id="a GET with a body"),
        pytest.param("POST /v1/nothing", id="an unknown route"),
        pytest.param(f"PUT {CHAT}", id="a wrong method"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("split", [False, True])
async def test_a_request_inside_a_body_is_never_executed(edge: str, carrier: str, chunked: bool, split: bool) -> None:
    hidden = post(CHAT, ASK)
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(hidden)}"
    head = f"{carrier} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden) if chunked else hidden
    async with talking(edge) as talk:
        await talk.client.send(head if split else head + body)
        if split:
            await asyncio.sleep(0.02)  # some routes answer now; the body follows the answer
            await talk.client.send(body)
        first = await talk.client.reply()
        assert first.status in (200, 400, 404, 405)
        # The connection is in step: the next request is the next one answered.
        await talk.client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        second = await talk.client.reply()
        assert second.json == {"status": "ok"}
        talk.assert_nothing_reached_the_engine()


# -- HTTP as it should be


@both_edges
async def test_a_client_that_expects_100_is_told_to_continue(edge: str) -> None:
    async with talking(edge) as talk:
        head, _, body = post(CHAT, ASK, "Expect: 100-continue").partition(b"\r\n\r\n")
        await talk.client.send(head + b"\r\n\r\n")
        assert await talk.client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await talk.client.send(body)
        assert (await talk.client.reply()).status == 200


@both_edges
async def test_a_client_that_expects_100_for_too_much_gets_the_refusal_instead(edge: str) -> None:
    async with talking(edge, max_body_bytes=1024) as talk:
        await talk.client.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        await talk.refused(413)


@both_edges
@pytest.mark.parametrize("host", ["Host: localhost", None])
@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_is_answered_without_chunks_and_closed(edge: str, host: str | None, stream: bool) -> None:
    async with talking(edge) as talk:
        body = json.dumps({**ASK, "stream": stream}).encode()
        await talk.client.send(raw(f"Content-Length: {len(body)}", line=f"POST {CHAT} HTTP/1.0", host=host, body=body))
        status, headers = await read_head(talk.client.reader)
        assert status == 200
        assert "transfer-encoding" not in headers
        answer = await talk.client.rest()
        if stream:
            assert answer.startswith(b"data: ")
            assert answer.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(answer)["object"] == "chat.completion"


@both_edges
async def test_http_1_0_is_not_told_to_continue(edge: str) -> None:
    async with talking(edge) as talk:
        await talk.client.send(post(CHAT, ASK, "Expect: 100-continue", version="1.0"))
        assert (await talk.client.reply()).status == 200


@both_edges
async def test_a_request_is_timed_from_its_own_first_byte(edge: str) -> None:
    async with talking(edge, {"delay_head_s": 0.8}) as talk:
        second = post(CHAT, ASK, "x-tidegate-deadline-ms: 700")
        await talk.client.send(post(CHAT, ASK))
        request = await talk.engine.received(1)
        await asyncio.sleep(0.6)  # the first one's time, which must not count
        await talk.client.send(second[:20])
        await request.done.wait()
        talk.engine.script = talk.engine.script.updated({"delay_head_s": 0})
        assert (await talk.client.reply()).status == 200
        await talk.client.send(second[20:])
        assert (await talk.client.reply()).status == 200
        assert (await talk.gateway.settled(2))[1].duration_s < 0.7


@both_edges
async def test_pipelined_requests_are_answered_in_order(edge: str) -> None:
    async with talking(edge) as talk:
        talk.engine.queue.append(talk.engine.script.updated({"delay_head_s": 0.1}))
        await talk.client.send(
            post(CHAT, ASK)
            + b"GET /v1/models/m HTTP/1.1\r\nHost: localhost\r\n\r\n"
            + post(CHAT, STREAM)
            + b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"
            + post(CHAT, ASK)
        )
        replies = [await talk.client.reply() for _ in range(5)]
        assert [reply.status for reply in replies] == [200, 200, 200, 404, 200]
        assert replies[0].json["object"] == replies[4].json["object"] == "chat.completion"
        assert replies[1].json["id"] == "m"
        assert replies[2].body.endswith(b"data: [DONE]\n\n")


@both_edges
async def test_many_pipelined_requests_are_answered_in_order(edge: str) -> None:
    async with talking(edge) as talk:
        count = 50
        one = [b"GET /v1/models/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % n for n in range(count)]
        await talk.client.send(post(CHAT, ASK) + b"".join(one))
        assert (await talk.client.reply()).status == 200
        for n in range(count):
            reply = await talk.client.reply()
            assert reply.status == 404
            assert f"'{n}'" in reply.json["error"]["message"]


@both_edges
@pytest.mark.parametrize(
    "second",
    [
        pytest.param(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", id="slow body"),
        pytest.param(post(CHAT, ASK)[:-3], id="slow inference body"),
        pytest.param(b"POST /v1/models HTTP/1.1\r\nHo", id="slow head"),
    ],
)
async def test_a_slow_second_request_does_not_disturb_the_first_answer(edge: str, second: bytes) -> None:
    async with talking(edge, {"chunks": 12, "interval_s": 0.1}, **SHORT) as talk:
        await talk.client.send(post(CHAT, STREAM))
        await talk.client.until(b"\r\n\r\n")
        await talk.client.send(second)
        answer = await talk.client.rest()
        stream, _, after = answer.partition(b"\r\n0\r\n\r\n")
        assert b"data: [DONE]" in stream
        assert b"HTTP/1.1" not in stream
        assert after.count(b"HTTP/1.1") <= 1
        assert after == b"" or after[:13] in (b"HTTP/1.1 408 ", b"HTTP/1.1 405 ")


@both_edges
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_not_allowed_on_inference_routes(edge: str, path: str, method: str) -> None:
    async with talking(edge) as talk:
        await talk.client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if method == "HEAD":
            status, headers = await read_head(talk.client.reader)
        else:
            reply = await talk.client.reply()
            status, headers = reply.status, reply.headers
            assert reply.json["error"]["code"] == "method_not_allowed"
        assert status == 405
        assert headers["allow"] == "POST"
        assert headers["x-request-id"]


@both_edges
async def test_a_compressed_body_is_refused(edge: str) -> None:
    async with talking(edge) as talk:
        await talk.client.send(post(CHAT, ASK, "Content-Encoding: gzip"))
        await talk.refused(415)
        talk.assert_nothing_reached_the_engine()


@both_edges
async def test_absurd_targets_are_answered(edge: str) -> None:
    for target in ("*", "http://evil.example/v1/models", "/%00", "/v1/%2e%2e/models", "//v1/models", "/v1/models?a=b"):
        async with talking(edge) as talk:
            await talk.client.send(f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (await talk.client.reply()).status in (400, 404, 405)


# -- header allow-lists

SECRET = "canary-7c1e"


@both_edges
@pytest.mark.parametrize("stream", [False, True])
async def test_no_header_of_the_client_reaches_the_engine_but_the_allowed(edge: str, stream: bool) -> None:
    async with talking(edge) as talk:
        await talk.client.send(
            post(
                CHAT,
                {**ASK, "stream": stream},
                f"Authorization: Bearer {SECRET}",
                f"Cookie: session={SECRET}",
                f"X-API-Key: {SECRET}",
                f"Api-Key: {SECRET}",
                f"Proxy-Authorization: {SECRET}",
                f"Forwarded: for={SECRET}",
                f"X-Forwarded-For: {SECRET}",
                f"X-Forwarded-Host: {SECRET}",
                f"X-Real-IP: {SECRET}",
                f"OpenAI-Organization: {SECRET}",
                f"X-Request-Id: {SECRET}",
                f"User-Agent: {SECRET}",
                f"X-Named: {SECRET}",
                f"Te: {SECRET}",
                f"Trailer: {SECRET}",
                f"Keep-Alive: {SECRET}",
                "Connection: keep-alive, X-Named, Traceparent",
                "Accept-Encoding: gzip, br",
                f"X-Fake: status=500; error_body={SECRET}",
                "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            )
        )
        reply = await talk.client.reply()
        assert reply.status == 200
        request = await talk.engine.received()
        names = {name for name, _ in request.headers}
        assert names == {
            b"host",
            b"user-agent",
            b"accept-encoding",
            b"content-type",
            b"content-length",
            b"x-request-id",
            b"traceparent",
        }
        assert request.header("accept-encoding") == "identity"
        assert SECRET.encode() not in b"".join(value for _, value in request.headers)
        assert SECRET.encode() not in request.body
        assert SECRET not in str(reply)


@both_edges
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "503 Service Unavailable"])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_header_of_the_engine_reaches_the_client_but_the_allowed(edge: str, status: str, stream: bool) -> None:
    content, body = "application/json", '{"choices":[],"error":{"message":"no"}}'
    if stream and status.startswith("200"):
        content = "text/event-stream"
        body = 'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    answer = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content}\r\nServer: {SECRET}\r\nSet-Cookie: a={SECRET}\r\n"
        f"X-Powered-By: {SECRET}\r\nVia: {SECRET}\r\nX-Request-Id: {SECRET}\r\nAccess-Control-Allow-Origin: *\r\n"
        f"Connection: X-Secret\r\nX-Secret: {SECRET}\r\nWWW-Authenticate: {SECRET}\r\nContent-Length: {len(body)}\r\n"
        f"\r\n{body}"
    )
    async with talking(edge, {"raw": answer}) as talk:
        await talk.client.send(post(CHAT, {**ASK, "stream": stream}))
        reply = await talk.client.reply()
        assert SECRET not in str(reply)
        allowed = {"content-type", "content-length", "transfer-encoding", "date", "x-request-id", "connection"}
        allowed |= {"cache-control", "x-accel-buffering", "retry-after", "retry-after-ms", "x-should-retry"}
        assert {name for name in reply.headers if not name.startswith("x-tidegate-")} <= allowed


# -- sockets


@both_edges
@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_small_writes_are_not_delayed_on_either_side(edge: str, path: str) -> None:
    async with talking(edge, {"hang": True}) as talk:
        await talk.client.send(post(CHAT, ASK))
        await talk.engine.received()
        (connection,) = talk.gateway.listener.server_state.connections
        (upstream,) = talk.gateway.runtime.fleet.upstreams()
        (wire,) = upstream.pool._active
        assert wire.transport is not None
        for transport in (connection.transport, wire.transport):
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@both_edges
async def test_too_many_pipelined_requests_end_the_connection_and_the_work(edge: str) -> None:
    async with talking(edge, {"hang": True}) as talk:
        await talk.client.send(post(CHAT, ASK))
        asked = await talk.engine.received(1)
        await talk.client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 150)
        async with asyncio.timeout(2):
            assert await asked.gone.wait()


@both_edges
async def test_a_client_behind_a_pipeline_is_seen_to_leave(edge: str) -> None:
    async with talking(edge, {"hang": True}) as talk:
        await talk.client.send(post(CHAT, ASK))
        asked = await talk.engine.received(1)
        await talk.client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 60)
        talk.client.leave("close")
        async with asyncio.timeout(1):
            assert await asked.gone.wait()
