"""One exchange over time: time-outs, back-pressure, leaving, and who may call whom afterwards."""

from __future__ import annotations

import asyncio
import logging

import pytest

from backends.errors import (
    ConsumerFailed,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    UpstreamError,
)
from backends.http1 import Connection, Headers
from backends.pool import ConnectionPool
from backends.ticker import Ticker
from tests.backends.scripted import OK, Peer, Recorder, exchange, scripted, send, soon, until

EVERY_LOOP = True

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


# -- time


async def test_silence_before_the_head_is_a_head_timeout() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        while True:  # a trickle of head bytes does not help
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(0.02)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, ticker=Ticker(interval_s=0.02))
        recorder = send(await pool.acquire(1), head_timeout_s=0.15)
        with pytest.raises(HeadTimeout, match=r"^127\.0\.0\.1:\d+: no answer within 0\.15 s \(head\)$") as caught:
            await recorder.result()
        assert caught.value.sent
        assert not caught.value.retry_safe
        assert (pool.idle, pool.active) == (0, 0)
        await until(lambda: server.open == 0)


async def test_silence_within_the_body_is_an_idle_timeout_and_data_postpones_it() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(8):
            await peer.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.05)
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, ticker=Ticker(interval_s=0.02))
        recorder = send(await pool.acquire(1), idle_timeout_s=0.2)
        with pytest.raises(IdleTimeout, match=r"silent for 0\.2 s \(body\)$"):
            await recorder.result()
        assert recorder.body == b"x" * 8


async def test_idle_timeout_does_not_run_while_reading_is_paused() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"1\r\na\r\n")
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, ticker=Ticker(interval_s=0.01))
        connection = await pool.acquire(1)
        recorder = send(connection, idle_timeout_s=0.05)
        await soon(recorder.fed)
        connection.pause_reading()
        await asyncio.sleep(0.2)
        assert recorder.calls == ["head", "data"]
        connection.resume_reading()
        with pytest.raises(IdleTimeout):
            await recorder.result()


# -- back-pressure


async def test_paused_connection_reads_nothing_and_resumes() -> None:
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
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        recorder = send(connection)
        await soon(recorder.fed)
        connection.pause_reading()
        connection.pause_reading()
        delivered = len(recorder.body)
        before = -1
        while sent != before:  # until the server is stuck
            before = sent
            await asyncio.sleep(0.05)
        assert sent < 400
        assert len(recorder.body) == delivered
        connection.resume_reading()
        connection.resume_reading()
        assert len(await recorder.result()) == 400 * 65536
        assert pool.idle == 1
        await pool.aclose()


async def test_connection_that_was_paused_at_its_end_can_be_reused() -> None:
    class Pausing(Recorder):
        connection: Connection

        def on_data(self, data: bytes) -> None:
            super().on_data(data)
            self.connection.pause_reading()

    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        pausing = Pausing()
        pausing.connection = await pool.acquire(1)
        send(pausing.connection, recorder=pausing)
        assert await pausing.result() == b"hi"
        recorder = send(await pool.acquire(1))
        pausing.connection.pause_reading()  # by a husk: must not reach the new exchange
        pausing.connection.resume_reading()
        assert await recorder.result() == b"hi"
        assert server.accepted == 1
        await pool.aclose()


# -- leaving


async def test_detach_closes_the_socket_at_once_and_silences_the_consumer() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"1\r\na\r\n")
        await peer.gone()
        closed.set()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        recorder = send(connection)
        await soon(recorder.fed)
        connection.detach()
        assert (pool.idle, pool.active) == (0, 0)
        await soon(closed)
        connection.detach()
        connection.pause_reading()
        connection.resume_reading()
        assert recorder.calls == ["head", "data"]


@pytest.mark.parametrize("moment", ["head", "data"])
async def test_detach_from_within_a_callback_is_the_last_callback(moment: str) -> None:
    class Leaving(Recorder):
        connection: Connection

        def on_head(self, status: int, headers: Headers) -> None:
            super().on_head(status, headers)
            if moment == "head":
                self.connection.detach()

        def on_data(self, data: bytes) -> None:
            super().on_data(data)
            self.connection.detach()

    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        leaving = Leaving()
        leaving.connection = await pool.acquire(1)
        send(leaving.connection, recorder=leaving)
        await until(lambda: pool.active == 0 and server.open == 0)
        assert leaving.calls == (["head"] if moment == "head" else ["head", "data"])
        assert pool.idle == 0


async def test_detach_after_the_end_does_not_touch_the_next_exchange() -> None:
    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        first = await pool.acquire(1)
        await send(first).result()
        second = await pool.acquire(1)
        recorder = send(second)
        first.detach()
        assert await recorder.result() == b"hi"
        first.detach()
        assert (pool.idle, server.accepted) == (1, 1)
        await pool.aclose()


async def test_unused_connection_goes_back_to_the_pool() -> None:
    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        assert not connection.reused
        connection.detach()
        connection.detach()
        assert (pool.idle, pool.active) == (1, 0)
        again = pool.acquire_nowait()
        assert again is not None
        assert again.reused  # it was idle: the keep-alive race applies
        again.detach()
        await pool.aclose()


# -- callbacks


async def test_connection_is_free_again_when_on_end_is_called() -> None:
    class Chain(Recorder):
        next: Recorder | None = None

        def on_end(self) -> None:
            super().on_end()
            connection = pool.acquire_nowait()
            assert connection is not None
            assert connection.reused
            self.next = send(connection)

    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        chain = Chain()
        send(await pool.acquire(1), recorder=chain)
        await chain.result()
        assert chain.next is not None
        assert await chain.next.result() == b"hi"
        assert server.accepted == 1
        await pool.aclose()


@pytest.mark.parametrize("moment", ["on_head", "on_data"])
async def test_consumer_that_raises_loses_its_connection_and_is_told(
    moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Recorder):
        def on_head(self, status: int, headers: Headers) -> None:
            super().on_head(status, headers)
            if moment == "on_head":
                raise ValueError("a bug of ours")

        def on_data(self, data: bytes) -> None:
            raise ValueError("a bug of ours")

    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        with caplog.at_level(logging.ERROR), pytest.raises(ConsumerFailed) as caught:
            await send(await pool.acquire(1), recorder=Broken()).result()
        assert "a bug of ours" in caplog.text
        assert "a bug of ours" not in str(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)
        assert caught.value.fault == "gateway"
        assert (pool.idle, pool.active) == (0, 0)


async def test_consumer_that_raises_at_the_end_is_logged_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Recorder):
        def on_end(self) -> None:
            super().on_end()
            raise ValueError("on_end is broken")

        def on_error(self, error: UpstreamError) -> None:
            super().on_error(error)
            raise ValueError("on_error is broken")

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        with caplog.at_level(logging.ERROR):
            assert (await exchange(pool)).calls == ["head", "data", "end"]
            broken = send(await pool.acquire(1), recorder=Broken())
            with pytest.raises(Disconnected):
                await broken.result()
            assert "on_error is broken" in caplog.text
            broken = send(await pool.acquire(1), recorder=Broken())
            assert await broken.result() == b"hi"
            assert "on_end is broken" in caplog.text
        assert pool.idle == 1
        await pool.aclose()
