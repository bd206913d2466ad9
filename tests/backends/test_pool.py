"""Which connection a request gets, who waits for whom, and that nothing leaks."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    Disconnected,
    PoolClosed,
    PoolTimeout,
    UpstreamError,
)
from backends.http1 import Connection
from backends.origin import Origin
from backends.pool import ConnectionPool
from backends.ticker import Ticker
from tests.backends.scripted import GET, OK, PATIENCE_S, Peer, Recorder, exchange, scripted, send, soon, until

EVERY_LOOP = True


async def serve_ok(peer: Peer) -> None:
    await peer.serve(OK)


async def silent(peer: Peer) -> None:
    await peer.gone()


# -- reuse


async def test_last_connection_in_is_first_out() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin)
        connections = [await pool.acquire(1) for _ in range(3)]
        wires = [connection._wire for connection in connections]
        for connection in connections:
            await send(connection).result()
        assert repr(pool) == f"<ConnectionPool {server.origin.address} idle=3 active=0 waiting=0>"
        taken = [pool.acquire_nowait() for _ in range(3)]
        assert [c._wire for c in taken if c is not None] == wires[::-1]
        assert pool.acquire_nowait() is None
        for c in taken:
            assert c is not None
            c.detach()
        await pool.aclose()


async def test_idle_connection_closed_by_the_server_leaves_the_pool_at_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        await exchange(pool)
        await until(lambda: pool.idle == 0)
        recorder = await exchange(pool)
        assert recorder.body == b"hi"
        assert server.accepted == 2


async def test_unasked_bytes_on_an_idle_connection_close_it() -> None:
    more = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await soon(more)
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        await exchange(pool)
        assert pool.idle == 1
        more.set()
        await until(lambda: pool.idle == 0 and server.open == 0)
        assert pool.active == 0


async def test_stale_connection_fails_in_a_way_that_may_be_retried() -> None:
    """The keep-alive race: the server closes on receiving the second request."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number == 0:
            await peer.request()
            peer.reset()
        else:
            await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        await exchange(pool)
        connection = await pool.acquire(1)
        assert connection.reused
        recorder = send(connection)
        with pytest.raises(Disconnected) as caught:
            await recorder.result()
        error = caught.value
        assert (error.sent, error.reused, error.got_bytes, error.phase) == (True, True, False, "head")
        assert error.retry_safe
        assert (await exchange(pool)).body == b"hi"
        await pool.aclose()


async def test_reused_connection_that_dies_after_a_byte_may_not_be_retried() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(b"H")

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)
        await exchange(pool)
        error = (await exchange(pool)).error
        assert isinstance(error, Disconnected)
        assert error.reused
        assert error.got_bytes
        assert not error.retry_safe


async def test_expired_connection_is_not_handed_out() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, idle_s=0.05, ticker=Ticker(interval_s=60))
        await exchange(pool)
        assert pool.idle == 1
        await asyncio.sleep(0.06)
        assert pool.acquire_nowait() is None
        assert pool.idle == 0
        await exchange(pool)
        assert server.accepted == 2
        await pool.aclose()


async def test_sweep_closes_what_has_been_idle_too_long() -> None:
    async with scripted(serve_ok) as server:
        ticker = Ticker(interval_s=0.02)
        pool = ConnectionPool(server.origin, idle_s=0.1, ticker=ticker)
        await exchange(pool)
        assert len(ticker) == 1
        await until(lambda: server.open == 0)
        assert pool.idle == 0
        await until(lambda: len(ticker) == 0)
        assert (await exchange(pool)).body == b"hi"  # and it wakes up again
        assert len(ticker) == 1
        await pool.aclose()
        assert len(ticker) == 0


# -- connecting


async def test_refused_connection_names_address_reason_and_phase() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pool = ConnectionPool(Origin.parse(f"http://127.0.0.1:{port}"))
    with pytest.raises(ConnectFailed) as caught:
        await pool.acquire(1)
    assert str(caught.value) == f"127.0.0.1:{port}: connection refused (connect)"
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert caught.value.retry_safe
    assert caught.value.fault == "upstream"
    assert (pool.idle, pool.active, pool.waiting) == (0, 0, 0)


async def test_missing_unix_socket_is_a_failed_connection(tmp_path: Path) -> None:
    pool = ConnectionPool(Origin("http+unix", "localhost", 0, str(tmp_path / "none.sock")))
    with pytest.raises(ConnectFailed, match=r"^unix:.*none\.sock: no such file or directory \(connect\)$"):
        await pool.acquire(1)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70])
async def test_unknown_name_is_a_failed_connection(host: str) -> None:
    pool = ConnectionPool(Origin("http", host, 80))
    with pytest.raises(ConnectFailed, match=r"\(connect\)$"):
        await pool.acquire(1)
    assert pool.active == 0


async def test_connect_timeout_has_its_own_type() -> None:
    # A listener whose queue is full lets further connections hang, on loopback as well.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            pool = ConnectionPool(Origin("http", "127.0.0.1", port), connect_timeout_s=0.2)
            with pytest.raises(ConnectTimeout, match=r"timed out after 0\.2 s \(connect\)$"):
                await pool.acquire(1)
            with pytest.raises(ConnectTimeout, match=r"timed out after 0\.1 s"):
                await pool.acquire(1, connect_timeout_s=0.1)
            assert pool.active == 0
        finally:
            for filler in fillers:
                filler.close()


async def test_plain_text_server_behind_https_is_a_failed_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(Origin("https", "127.0.0.1", server.origin.port))
        with pytest.raises(ConnectFailed, match=r"TLS failed: .* \(connect\)$") as caught:
            await pool.acquire(1)
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        assert pool.active == 0
        await until(lambda: server.open == 0)


# -- waiting


async def test_pool_never_grows_beyond_its_limit_and_serves_waiters_in_order() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        first = await pool.acquire(1)
        order: list[int] = []

        async def wait(number: int) -> None:
            connection = await pool.acquire(PATIENCE_S)
            order.append(number)
            await send(connection).result()

        tasks = [asyncio.create_task(wait(i)) for i in range(5)]
        await until(lambda: pool.waiting == 5)
        assert pool.active == 1
        first.detach()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4]
        assert server.accepted == 1
        assert (pool.idle, pool.active, pool.waiting) == (1, 0, 0)
        await pool.aclose()


async def test_waiting_too_long_is_a_pool_timeout() -> None:
    async with scripted(silent) as server:
        pool = ConnectionPool(server.origin, max_connections=1, ticker=Ticker(interval_s=0.01))
        connection = await pool.acquire(1)
        with pytest.raises(PoolTimeout, match=r"all 1 connections are busy \(pool\)$") as caught:
            await pool.acquire(0.05)
        assert caught.value.fault == "gateway"
        assert caught.value.retry_safe
        with pytest.raises(PoolTimeout):
            await pool.acquire(0)
        assert (pool.active, pool.waiting) == (1, 0)
        connection.detach()
        await pool.aclose()


async def test_waiter_gets_the_slot_of_a_connection_that_died() -> None:
    async def script(peer: Peer) -> None:
        await (peer.gone() if peer.number == 0 else peer.serve(OK))

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        connection = await pool.acquire(1)
        recorder = send(connection)
        task = asyncio.create_task(pool.acquire(PATIENCE_S))
        await until(lambda: pool.waiting == 1)
        connection.detach()
        other = await task
        assert not other.reused
        assert recorder.calls == []
        assert await send(other).result() == b"hi"
        await pool.aclose()


async def test_waiters_fail_one_by_one_when_the_server_is_gone() -> None:
    async with scripted(silent) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        connection = await pool.acquire(1)
        tasks = [asyncio.create_task(pool.acquire(PATIENCE_S)) for _ in range(3)]
        await until(lambda: pool.waiting == 3)
        send(connection)
    await until(lambda: pool.active == 0)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, ConnectFailed)
    assert (pool.idle, pool.active, pool.waiting) == (0, 0, 0)


@pytest.mark.parametrize("gift", ["connection", "slot"])
async def test_cancelled_waiter_passes_on_what_it_was_just_given(gift: str) -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        connection = await pool.acquire(1)
        first = asyncio.create_task(pool.acquire(PATIENCE_S))
        second = asyncio.create_task(pool.acquire(PATIENCE_S))
        await until(lambda: pool.waiting == 2)
        if gift == "slot":
            send(connection)
        connection.detach()  # gives to `first`, which is cancelled before it wakes up
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        got = await second
        assert got.reused == (gift == "connection")
        assert (pool.idle, pool.active, pool.waiting) == (0, 1, 0)
        got.detach()
        await pool.aclose()


async def test_cancelled_waiter_leaves_the_queue() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        connection = await pool.acquire(1)
        task = asyncio.create_task(pool.acquire(PATIENCE_S))
        await until(lambda: pool.waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.waiting == 0
        connection.detach()
        assert (pool.idle, pool.active) == (1, 0)
        await pool.aclose()


async def test_cancelled_connect_frees_its_slot() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        task = asyncio.create_task(pool.acquire(PATIENCE_S))
        await asyncio.sleep(0)
        assert pool.active == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.active == 0
        assert (await exchange(pool)).body == b"hi"
        await pool.aclose()
        await until(lambda: server.open == 0)


async def test_handed_over_connection_that_dies_before_the_waiter_wakes_is_replaced() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin, max_connections=1)
        connection = await pool.acquire(1)
        task = asyncio.create_task(pool.acquire(PATIENCE_S))
        await until(lambda: pool.waiting == 1)
        wire = connection._wire
        assert wire is not None
        connection.detach()
        wire.eof_received()
        assert await send(await task).result() == b"hi"
        assert pool.active == 0
        await pool.aclose()


# -- draining


async def test_aclose_waits_for_the_exchange_under_way() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        if peer.number == 0:
            await peer.serve(OK)
        await peer.request()
        await soon(go_on)
        await peer.send(OK)
        await peer.gone()

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, max_connections=2)
        idle, busy = await pool.acquire(1), await pool.acquire(1)
        recorder = send(busy)
        idle.detach()
        closing = asyncio.create_task(pool.aclose())
        await until(lambda: pool.idle == 0)
        assert not closing.done()
        assert repr(pool).endswith("idle=0 active=1 waiting=0 closing>")
        with pytest.raises(PoolClosed) as caught:
            await pool.acquire(1)
        assert caught.value.retry_safe
        go_on.set()
        assert await recorder.result() == b"hi"
        await closing
        assert (pool.idle, pool.active) == (0, 0)
        await until(lambda: server.open == 0)


async def test_aclose_by_force_ends_everything_at_once() -> None:
    async with scripted(silent) as server:
        pool = ConnectionPool(server.origin, max_connections=2)
        unused, busy = await pool.acquire(1), await pool.acquire(1)
        recorder = send(busy)
        waiter = asyncio.create_task(pool.acquire(PATIENCE_S))
        await until(lambda: pool.waiting == 1)
        await pool.aclose(force=True)
        with pytest.raises(PoolClosed, match="closed by force") as caught:
            await recorder.result()
        assert not caught.value.retry_safe
        with pytest.raises(PoolClosed):
            await waiter
        with pytest.raises(Disconnected, match="before the request was sent"):
            await send(unused).result()
        assert (pool.idle, pool.active, pool.waiting) == (0, 0, 0)


async def test_connection_made_while_the_pool_closes_is_not_used() -> None:
    async with scripted(serve_ok) as server:
        pool = ConnectionPool(server.origin)
        task = asyncio.create_task(pool.acquire(PATIENCE_S))
        await asyncio.sleep(0)
        pool.close_when_idle()
        with pytest.raises(PoolClosed):
            await task
        await pool.aclose()
        assert pool.active == 0


# -- property

MAX = 3
steps = st.lists(
    st.sampled_from(["ok", "ok", "ok", "reset", "half", "garbage", "close", "detach", "cancel", "unused", "nap"]),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=steps)
async def test_no_mix_of_outcomes_leaks_a_connection(plan: list[str]) -> None:
    async def script(peer: Peer) -> None:
        while True:
            kind = (await peer.request()).split()[1][1:].decode()
            if kind == "reset":
                peer.reset()
                return
            if kind in ("detach", "cancel"):
                await peer.gone()
                return
            answer = {
                "half": OK[:-1],
                "garbage": b"garbage\r\n",
                "close": OK.replace(b"OK", b"OK\r\nconnection: close"),
            }
            await peer.send(answer.get(kind, OK))
            if kind in ("half", "close"):
                return

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin, max_connections=MAX, idle_s=0.02, ticker=Ticker(interval_s=0.005))
        worst = 0

        async def run(kind: str) -> None:
            nonlocal worst
            connection: Connection = await pool.acquire(PATIENCE_S)
            worst = max(worst, pool.idle + pool.active)
            if kind == "unused":
                connection.detach()
                return
            recorder = send(connection, GET.replace(b"/x", b"/" + kind.encode()))
            try:
                if kind == "detach":
                    await asyncio.sleep(0.001)
                    return
                await recorder.result()
            except UpstreamError:
                assert kind in ("reset", "half", "garbage") or recorder.error is not None
            finally:
                worst = max(worst, pool.idle + pool.active)
                connection.detach()

        tasks = []
        for kind in plan:
            if kind == "nap":
                await asyncio.sleep(0.003)
                continue
            tasks.append(asyncio.create_task(run(kind)))
            if kind == "cancel":
                asyncio.get_running_loop().call_later(0.002, tasks[-1].cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert worst <= MAX
        assert (pool.active, pool.waiting) == (0, 0)
        await pool.aclose()
        assert (pool.idle, pool.active, pool.waiting) == (0, 0, 0)
        await until(lambda: server.open == 0)


async def test_limit_of_no_connections_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ConnectionPool(Origin("http", "127.0.0.1", 1), max_connections=0)


async def test_recorder_is_a_strict_consumer() -> None:
    """The tests rely on it: a second end, or data after the end, must fail."""
    recorder = Recorder()
    recorder.on_head(200, [])
    recorder.on_end()
    with pytest.raises(AssertionError):
        recorder.on_end()
    with pytest.raises(AssertionError):
        recorder.on_data(b"x")
