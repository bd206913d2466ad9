"""How a request goes out and what counts as a response: framing, limits, reuse."""

from __future__ import annotations

import asyncio

import pytest

from backends.errors import (
    Disconnected,
    ProtocolViolation,
)
from backends.http1 import MAX_HEAD_BYTES
from backends.pool import ConnectionPool
from tests.backends.scripted import GET, OK, PATIENCE_S, Peer, Recorder, exchange, scripted, send, soon, until

EVERY_LOOP = True

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def answered(answer: bytes, *, method: bytes = b"GET") -> tuple[Recorder, ConnectionPool]:
    """One request to a server that gives this answer and then closes; returns the pool as it was left."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        recorder = await exchange(pool, method=method)
        await until(lambda: pool.idle == pool.active == 0)
        return recorder, pool


async def kept(answer: bytes, *, method: bytes = b"GET") -> tuple[Recorder, int]:
    """The same with a server that keeps the connection; returns how many are in the pool afterwards."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        recorder = await exchange(pool, method=method)
        idle = pool.idle
        await pool.aclose()
        return recorder, idle


# -- framing


async def test_request_arrives_and_response_is_delivered_in_order() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(b"HTTP/1.1 201 Created\r\nX-Mixed-Case: Kept As Is \r\nContent-Length: 5\r\n\r\nhello")

    async with scripted(script) as server:
        recorder = await exchange(ConnectionPool(server.origin), GET)
    assert seen == [GET]
    assert recorder.status == 201
    assert recorder.headers == [(b"x-mixed-case", b"Kept As Is"), (b"content-length", b"5")]
    assert recorder.body == b"hello"
    assert recorder.calls == ["head", "data", "end"]


async def test_response_split_anywhere_reads_the_same() -> None:
    answer = CHUNKED + b"5;ext=1\r\nhello\r\n7\r\n, world\r\n0\r\nx-trailer: t\r\n\r\n"

    async def script(peer: Peer) -> None:
        await peer.request()
        for i in range(len(answer)):
            await peer.send(answer[i : i + 1])
            await asyncio.sleep(0)
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        recorder = await exchange(pool)
        assert recorder.body == b"hello, world"
        assert pool.idle == 1
        await pool.aclose()


async def test_pieces_of_one_read_are_joined_into_one_call() -> None:
    recorder, idle = await kept(CHUNKED + b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n")
    assert recorder.pieces == [b"abc"]
    assert idle == 1


async def test_trailers_are_read_and_dropped() -> None:
    recorder, idle = await kept(CHUNKED + b"2\r\nhi\r\n0\r\nx-checksum: 1\r\nx-more: 2\r\n\r\n")
    assert recorder.body == b"hi"
    assert recorder.headers == [(b"transfer-encoding", b"chunked")]
    assert idle == 1


@pytest.mark.parametrize("interim", [b"100 Continue", b"103 Early Hints"])
async def test_interim_responses_are_swallowed(interim: bytes) -> None:
    recorder, idle = await kept(b"HTTP/1.1 " + interim + b"\r\nlink: </x>\r\n\r\n" + OK)
    assert (recorder.status, recorder.headers) == (200, [(b"content-length", b"2")])
    assert recorder.body == b"hi"
    assert idle == 1


async def test_interim_response_in_a_read_of_its_own_does_not_end_the_exchange() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await soon(go_on)
        await peer.send(OK)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        recorder = send(connection)
        await asyncio.sleep(0.02)
        assert recorder.calls == []
        go_on.set()
        assert await recorder.result() == b"hi"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("length", [b"", b"content-length: 5\r\n"])
async def test_statuses_without_body_end_with_their_head(status: bytes, length: bytes) -> None:
    recorder, idle = await kept(b"HTTP/1.1 " + status + b"\r\n" + length + b"\r\n")
    assert recorder.calls == ["head", "end"]
    assert idle == 1


@pytest.mark.parametrize("framing", [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b""])
async def test_answer_to_head_has_no_body_and_the_connection_serves_the_next_request(framing: bytes) -> None:
    async def script(peer: Peer) -> None:
        while True:
            method = (await peer.request()).split()[0]
            await peer.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n" if method == b"HEAD" else OK)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        for _ in range(2):
            head = await exchange(pool, GET.replace(b"GET", b"HEAD"), method=b"HEAD")
            assert head.calls == ["head", "end"]
            assert (await exchange(pool)).body == b"hi"
        assert server.accepted == 1
        await pool.aclose()


async def test_body_in_answer_to_head_costs_the_connection() -> None:
    recorder, idle = await kept(OK, method=b"HEAD")
    assert recorder.calls == ["head", "end"]
    assert idle == 0


async def test_body_without_length_ends_with_the_connection() -> None:
    recorder, _ = await answered(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
    assert recorder.body == b"until the end"
    assert recorder.calls[-1] == "end"


async def test_reset_does_not_end_a_body_without_length() -> None:
    recorder = Recorder()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await soon(recorder.fed)
        peer.reset()

    async with scripted(script) as server:
        send(await ConnectionPool(server.origin).acquire(1), recorder=recorder)
        with pytest.raises(Disconnected, match=r"connection reset by peer \(body\)"):
            await recorder.result()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nconnection: foo, Close\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nhi",
        OK + OK,
        OK + b"garbage",
        OK + b"H",
    ],
)
async def test_connection_is_not_reused_but_the_response_is_delivered(answer: bytes) -> None:
    recorder, idle = await kept(answer)
    assert recorder.calls == ["head", "data", "end"]
    assert recorder.body == b"hi"
    assert idle == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n",
        CHUNKED + b"4\r\nhalf\r\n0\r\n",
        CHUNKED + b"8\r\nhalf",
    ],
)
async def test_truncated_body_is_a_disconnect(answer: bytes) -> None:
    recorder, _ = await answered(answer)
    assert recorder.body == b"half"
    assert recorder.calls[-1] == "error"
    error = recorder.error
    assert isinstance(error, Disconnected)
    assert (error.phase, error.sent, error.reused, error.got_bytes) == ("body", True, False, True)
    assert not error.retry_safe


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-le"])
async def test_close_before_the_head_is_complete_is_a_disconnect(answer: bytes) -> None:
    recorder, _ = await answered(answer)
    error = recorder.error
    assert isinstance(error, Disconnected)
    assert (error.phase, error.got_bytes) == ("head", bool(answer))
    assert not error.retry_safe  # a fresh connection: the server may have worked on it


def _head(*headers: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(h + b"\r\n" for h in headers) + b"\r\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CHUNKED + b"zz\r\nhi\r\n", "chunk size"),
        (CHUNKED + b"fffffffffffffffff\r\n", "size overflow"),
        (CHUNKED + b"2\r\nhixx0\r\n\r\n", ""),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "HTTP/"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "status"),
        (b"HTTP/1.1 099 Low\r\n\r\n", "status"),
        (b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", "neither"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "upgrade"),
        (_head(b"content-length: 2", b"transfer-encoding: chunked"), "ontent-"),
        (_head(b"transfer-encoding: chunked", b"content-length: 2"), "ontent-"),
        (_head(b"content-length: 2", b"content-length: 3"), "Content-Length"),
        (_head(b"content-length: -2"), "Content-Length"),
        (_head(b"content-length: 99999999999999999999"), "Content-Length"),
        (_head(b"transfer-encoding: gzip"), "coding"),
        (_head(b"transfer-encoding: gzip, chunked"), "coding"),
        (_head(b"transfer-encoding: chunked", b"transfer-encoding: chunked"), "coding"),
        (_head(b"no-colon-here"), "header"),
        (_head(b"x: a\x00b"), "header"),
        (_head(b"x: a\r b"), ""),
        (_head(*[b"x: y"] * 101, b"content-length: 0"), "more than 100 headers"),
        (_head(b"x: " + b"y" * MAX_HEAD_BYTES, b"content-length: 0"), "more than 65536 bytes"),
        (_head(*[b"x: " + b"y" * 7000] * 10, b"content-length: 0"), "more than 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 3 * MAX_HEAD_BYTES, "more than 65536 bytes"),
        (b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" * 4000, "more than 65536 bytes"),
        (CHUNKED + b"2;" + b"e" * 6 * MAX_HEAD_BYTES, "more than 65536 bytes"),
        (CHUNKED + b"0\r\nt: " + b"e" * 6 * MAX_HEAD_BYTES, "more than 65536 bytes"),
    ],
)
async def test_malformed_response_is_a_protocol_violation(answer: bytes, reason: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        recorder = await exchange(pool)
        error = recorder.error
        assert isinstance(error, ProtocolViolation), error
        assert reason in str(error)
        assert str(error).startswith(server.origin.address)
        assert not error.retry_safe
        assert (pool.idle, pool.active) == (0, 0)
        await until(lambda: server.open == 0)


async def test_what_was_well_framed_before_a_violation_is_delivered_first() -> None:
    recorder, _ = await answered(CHUNKED + b"4\r\ngood\r\nzz\r\n")
    assert recorder.calls == ["head", "data", "error"]
    assert recorder.body == b"good"


async def test_large_body_behind_a_small_head_is_no_large_head() -> None:
    body = b"x" * 3_000_000
    recorder, _ = await kept(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    assert recorder.error is None
    assert recorder.body == body


async def test_compressed_body_is_passed_on_as_it_is() -> None:
    recorder, _ = await kept(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00")
    assert recorder.body == b"\x1f\x8b\x08\x00"


# -- the request's way out


@pytest.mark.parametrize("size", [0, 100, 65536, 65537, 3_000_000])
async def test_request_in_pieces_arrives_whole(size: int) -> None:
    head = b"POST /x HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % size
    body = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(OK)

    async with scripted(script) as server:
        recorder = await exchange(ConnectionPool(server.origin), [head, body], method=b"POST")
    assert recorder.error is None
    assert seen == [head + body]


async def test_answer_before_the_request_was_read_is_delivered() -> None:
    """413, then the server closes with most of the request unread, which makes the kernel send a reset."""
    body = b"x" * 8_000_000

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig")

    async with scripted(script, receive_buffer_bytes=4096) as server:
        pool = ConnectionPool(server.origin)
        head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
        recorder = await exchange(pool, [head, body], method=b"POST")
    assert recorder.calls == ["head", "data", "end"]
    assert (recorder.status, recorder.body) == (413, b"big")
    assert (pool.idle, pool.active) == (0, 0)


async def test_connection_with_unsent_request_bytes_is_not_reused() -> None:
    """The server claims to keep the connection, but it has not read the request it answered."""

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await peer.send(OK)
        await asyncio.sleep(PATIENCE_S)

    async with scripted(script, receive_buffer_bytes=4096) as server:
        pool = ConnectionPool(server.origin)
        head = b"POST / HTTP/1.1\r\ncontent-length: 8000000\r\n\r\n"
        recorder = await exchange(pool, [head, b"x" * 8_000_000], method=b"POST")
        assert recorder.body == b"hi"
        assert (pool.idle, pool.active) == (0, 0)


async def test_second_send_on_one_connection_is_a_mistake() -> None:
    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        recorder = send(connection)
        with pytest.raises(RuntimeError, match="one request"):
            send(connection)
        assert await recorder.result() == b"hi"
        with pytest.raises(RuntimeError, match="one request"):
            send(connection)
        await pool.aclose()


async def test_request_on_a_connection_that_died_since_acquire_was_never_sent() -> None:
    async def script(peer: Peer) -> None:
        await asyncio.sleep(0)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        await until(lambda: pool.active == 0)
        recorder = send(connection)
        assert recorder.calls == []  # never from within send()
        with pytest.raises(Disconnected) as caught:
            await recorder.result()
        assert not caught.value.sent
        assert caught.value.retry_safe

        connection = await pool.acquire(1)
        await until(lambda: pool.active == 0)
        recorder = send(connection)
        connection.detach()
        await asyncio.sleep(0.01)
        assert recorder.calls == []
