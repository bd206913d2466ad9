"""The memory store behind a socket: what only a connection can do wrong."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.listener import bind_uds
from gateway.store import START, Fact, MemoryStore, StoreFull, StoreUnavailable
from gateway.store.frames import MAX_REQUEST_BYTES, Done, FrameError, Read, Request, Splitter, framed
from gateway.store.remote import FIRST_DELAY_S, LONGEST_DELAY_S, RemoteStore
from gateway.store.server import MAX_READS, StoreServer
from tests.gateway.store.halves import Clock, Remote

LOOPS = ("asyncio", "uvloop")
PATIENCE_S = 10.0


@pytest.fixture
async def half(folder: Path) -> AsyncIterator[Remote]:
    made = Remote(folder)
    await made.start()
    yield made
    await made.stop()


@asynccontextmanager
async def listening(
    path: str, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]
) -> AsyncIterator[None]:
    """Somebody else at the store's address, who does `answer` with the first request of each connection."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(1)
        answer(reader, writer)

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - it is in callbacks of the same loop
            await asyncio.sleep(0)


async def raw(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path)


def encoded(*requests: Request) -> bytes:
    return b"".join(framed(msgspec.msgpack.Encoder(), request) for request in requests)


# -- losing and finding the other end


async def test_a_lost_connection_is_opened_again(half: Remote) -> None:
    store = half.open()
    await store.post("x", b"1")
    cursor = (await store.read_since(START)).cursor
    await half.restart()
    with pytest.raises(StoreUnavailable, match="the connection was lost") as failed:
        await store.claim("job", "a", 1.0)
    assert failed.value.address == half.path
    assert half.path in str(failed.value)
    half.clock.now += failed.value.retry_after_s
    assert await store.claim("job", "a", 1.0)
    facts = await store.read_since(cursor)
    assert (facts.changes, facts.reset) == ((), True)


async def test_operations_under_way_hear_of_a_lost_connection_at_once(half: Remote) -> None:
    store = half.open()
    cursor = (await store.read_since(START)).cursor
    reading = [asyncio.create_task(store.read_since(cursor, 60.0)) for _ in range(3)]
    await until(lambda: "waiting=3" in repr(half.store))
    await half.stop_server()
    async with asyncio.timeout(PATIENCE_S):
        ended = await asyncio.gather(*reading, return_exceptions=True)
    assert [type(error) for error in ended] == [StoreUnavailable] * 3
    assert "waiting=0" in repr(half.store)
    assert repr(store) == f"<RemoteStore {half.path} connected=False waiting=0>"


async def test_attempts_to_connect_are_spaced_out(folder: Path) -> None:
    clock, path = Clock(), str(folder / "store.sock")
    store = RemoteStore(path, clock=clock)
    delays: list[float] = []
    for _ in range(7):
        with pytest.raises(StoreUnavailable, match="No such file or directory") as failed:
            await store.withdraw("x")
        delays.append(failed.value.retry_after_s)
        clock.now += delays[-1]
    assert delays == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert (FIRST_DELAY_S, LONGEST_DELAY_S) == (0.05, 1.0)
    with pytest.raises(StoreUnavailable, match="No such file or directory"):
        await store.withdraw("x")
    server = StoreServer(MemoryStore(), bind_uds(path, "store"))
    await server.start()
    clock.now += 0.9
    with pytest.raises(StoreUnavailable, match="too early") as failed:
        await store.withdraw("x")
    assert failed.value.retry_after_s == pytest.approx(0.1)
    clock.now += 0.11
    await store.withdraw("x")
    await store.aclose()
    await server.aclose()


async def test_somebody_who_hangs_up_at_once_is_not_asked_without_end(folder: Path) -> None:
    clock, path = Clock(), str(folder / "store.sock")
    store = RemoteStore(path, clock=clock)
    delays: list[float] = []
    async with listening(path, lambda _, writer: writer.close()):
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="the connection was lost") as failed:
                await store.withdraw("x")
            delays.append(failed.value.retry_after_s)
            clock.now += delays[-1]
    assert delays == pytest.approx([0.05, 0.1, 0.2])


async def test_somebody_who_never_answers_holds_nobody_up(folder: Path) -> None:
    path = str(folder / "store.sock")
    store = RemoteStore(path, timeout_s=0.05)
    async with listening(path, lambda *_: None), asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.05 s"):
            await store.claim("job", "a", 1.0)
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.1 s"):
            await store.read_since(START, 0.05)
        assert "waiting=0" in repr(store)
        for _ in range(100):  # what piles up unsent is bounded too
            with pytest.raises((StoreUnavailable, TimeoutError)):
                async with asyncio.timeout(0):
                    await store.post("x", b"x" * 60_000)
        with pytest.raises(StoreUnavailable, match="does not take what it is sent"):
            await store.post("x", b"")
        await store.aclose()


async def test_an_answer_that_comes_too_late_disturbs_no_other(folder: Path) -> None:
    path = str(folder / "store.sock")
    store = RemoteStore(path, timeout_s=0.05)
    connected: list[asyncio.StreamWriter] = []
    async with listening(path, lambda _, writer: connected.append(writer)):
        with pytest.raises(StoreUnavailable):
            await store.claim("job", "a", 1.0)
        asking = asyncio.create_task(store.claim("job", "a", 1.0))
        await until(lambda: "waiting=1" in repr(store))
        encoder = msgspec.msgpack.Encoder()
        connected[0].write(framed(encoder, Done(1, claimed=True)) + framed(encoder, Done(2, claimed=False)))
        assert await asking is False
        await store.aclose()


async def test_closing_while_connecting_leaves_no_connection(half: Remote) -> None:
    store = half.open()
    asking = asyncio.create_task(store.withdraw("x"))
    await asyncio.sleep(0)
    await store.aclose()
    with pytest.raises(StoreUnavailable, match="closed"):
        await asking
    assert half.server is not None
    server = half.server
    await until(lambda: not server._connections)


# -- what the server puts up with


async def test_a_read_that_is_cancelled_or_abandoned_ends_in_the_store(half: Remote) -> None:
    store, other = half.open(), half.open()
    cursor = (await store.read_since(START)).cursor
    reading = asyncio.create_task(store.read_since(cursor, 60.0))
    leaving = asyncio.create_task(other.read_since(cursor, 60.0))
    await until(lambda: "waiting=2" in repr(half.store))
    reading.cancel()
    await until(lambda: "waiting=1" in repr(half.store))
    await other.aclose()
    await until(lambda: "waiting=0" in repr(half.store))
    assert await store.claim("job", "a", 1.0)
    assert "waiting=0" in repr(store)
    for task in (reading, leaving):
        with pytest.raises((asyncio.CancelledError, StoreUnavailable)):
            await task


async def test_a_waiting_read_holds_up_nothing_else(half: Remote) -> None:
    store = half.open()
    cursor = (await store.read_since(START)).cursor
    reading = asyncio.create_task(store.read_since(cursor, 60.0))
    claimed = await asyncio.gather(*(store.claim(f"job {number}", "a", 1.0) for number in range(500)))
    assert all(claimed)
    await store.post("x", b"1")
    async with asyncio.timeout(PATIENCE_S):
        assert (await reading).changes == (Fact("x", b"1"),)


async def test_a_refusal_for_want_of_room_reaches_the_caller(folder: Path) -> None:
    path = str(folder / "store.sock")
    server = StoreServer(MemoryStore(max_leases=1, max_facts_bytes=200), bind_uds(path, "store"))
    await server.start()
    store = RemoteStore(path)
    assert await store.claim("job 1", "a", 1.0)
    with pytest.raises(StoreFull, match="1 leases"):
        await store.claim("job 2", "a", 1.0)
    with pytest.raises(StoreFull, match="200 bytes"):
        await store.post("x", b"x" * 200)
    await store.post("x", b"1")
    await store.aclose()
    await server.aclose()


async def test_too_many_waiting_reads_are_refused_and_the_others_wait_on(half: Remote) -> None:
    store = half.open()
    cursor = (await store.read_since(START)).cursor
    reading = [asyncio.create_task(store.read_since(cursor, 60.0)) for _ in range(MAX_READS)]
    await until(lambda: f"waiting={MAX_READS}" in repr(half.store))
    with pytest.raises(StoreFull, match="64 reads wait"):
        await store.read_since(cursor, 60.0)
    await store.post("x", b"1")
    assert all([(await task).changes for task in reading])


@pytest.mark.parametrize(
    "said",
    [
        (MAX_REQUEST_BYTES + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x03\x92\x09\x01",
        encoded(Read(1, "", 60.0)).replace(b"\x01", b"\xc0"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["too long", "far too long", "empty", "not msgpack", "unknown request", "wrong type", "HTTP"],
)
async def test_nonsense_is_cut_off_and_harms_nobody_else(
    half: Remote, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = half.open()
    await store.post("x", b"1")
    reader, writer = await raw(half.path)
    writer.write(said)
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(PATIENCE_S):
            assert await end_of(reader) == b""
    assert "store: a worker is cut: " in caplog.text
    writer.close()
    assert (await store.read_since(START)).changes == (Fact("x", b"1"),)


async def end_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_limits_hold_for_whoever_does_not_check_them(half: Remote) -> None:
    """Here the arguments are wrong, not the message: the answer says so, and the connection goes on."""
    reader, writer = await raw(half.path)
    writer.write(encoded(Read(1, START, 61.0), Read(2, START, 0.0)))
    async with asyncio.timeout(PATIENCE_S):
        answers = await reader.readuntil(b"\xc3")  # `reset` of the second answer
        answers += await reader.read(1000) if b"wait_s" not in answers else b""
    assert b"wait_s must be 0 to 60" in answers
    writer.close()


async def test_a_request_that_comes_byte_by_byte_is_understood(half: Remote) -> None:
    reader, writer = await raw(half.path)
    writer.transport.set_write_buffer_limits(0)
    request = encoded(Read(1, START, 0.0))
    for each in request[:-1]:
        writer.write(bytes([each]))
        await writer.drain()
        await half.open().claim("round trip", "test", 1.0)
    writer.write(request[-1:])
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.readexactly(5)
    writer.close()


async def test_who_does_not_take_answers_is_cut_before_they_fill_the_memory(
    half: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    store = half.open()
    for number in range(100):
        await store.post(f"key {number}", b"x" * 65_000)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock, caplog.at_level(logging.ERROR):
        sock.setblocking(False)
        await loop.sock_connect(sock, half.path)
        await loop.sock_sendall(sock, encoded(*(Read(number, START, 60.0) for number in range(20))))
        await until(lambda: "it does not take its answers" in caplog.text)
    assert await store.claim("job", "a", 1.0)


# -- what the client puts up with


@pytest.mark.parametrize(
    ("said", "reason"),
    [(b"\x7f\xff\xff\xff", "a message of 2147483647 bytes"), (b"\x00\x00\x00\x01\xc1", "unintelligible")],
)
async def test_a_server_that_talks_nonsense_is_left(folder: Path, said: bytes, reason: str) -> None:
    path = str(folder / "store.sock")
    store = RemoteStore(path)
    async with listening(path, lambda _, writer: writer.write(said)):
        with pytest.raises(StoreUnavailable, match=reason):
            await store.claim("job", "a", 1.0)


@given(st.lists(st.binary(max_size=20), max_size=6), st.lists(st.integers(1, 30), min_size=1))
def test_messages_are_the_same_however_their_bytes_arrive(messages: list[bytes], sizes: list[int]) -> None:
    data = b"".join(len(message).to_bytes(4, "big") + message for message in messages)
    splitter = Splitter(20)
    found: list[bytes] = []
    for size in sizes * len(data):
        found += splitter.feed(data[:size])
        data = data[size:]
    assert found == messages


def test_a_message_that_is_too_long_is_refused_by_its_length_alone() -> None:
    splitter = Splitter(20)
    with pytest.raises(FrameError, match="21 bytes; 20 are allowed"):
        list(splitter.feed(b"\x00\x00\x00\x15"))


def test_the_error_survives_a_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StoreUnavailable("/run/store.sock", "it is closed", 0.5)))
    assert (str(error), error.retry_after_s) == (
        "the store at /run/store.sock is unavailable: it is closed",
        0.5,
    )
