"""A client that goes takes its request with it: at once, in every phase, on every route, over both edges."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from gateway.edges.asgi import AsgiReply
from gateway.edges.socket_reply import SocketReply
from gateway.exchange import serve
from gateway.order import CHAT, COMPLETIONS, EMBEDDINGS, Call
from gateway.record import Exchange, Outcome
from gateway.relay import Relay
from gateway.reply import Headers
from loadtests.connection import Request
from loadtests.engine import FakeEngine
from tests.support.client import Leaving, RawClient, connect, post, until
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)

LIMIT_S = 0.25
"""How soon the model server must see the connection closed."""
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    EMBEDDINGS: {"model": "m", "input": "hi"},
}
EDGES = ("protocol", "asgi")
WAYS: tuple[Leaving, ...] = ("close", "reset", "half-close")


@dataclass(frozen=True)
class Phase:
    """Where a request is when its client goes."""

    name: str
    script: dict[str, Any] = field(default_factory=dict)
    """What the model server does with it."""
    stream: bool | None = None
    """Only for streams, only for whole answers, or (None) for both."""
    dispatched: bool = True
    """The model server has the request."""
    seen: bytes = b""
    """What the client has read by then."""
    hold_s: float = 15.0


BODY = Phase("reading the body", dispatched=False)
POOL = Phase("waiting for a connection", dispatched=False)
CONNECTING = Phase("connecting", dispatched=False)
PHASES = (
    BODY,
    POOL,
    CONNECTING,
    Phase("before the first byte", {"hang": True}),
    Phase("held before content", {"role_only_then_hang": True}, stream=True),
    Phase("heartbeats before content", {"hang": True}, stream=True, seen=b": ping\n\n", hold_s=0.0),
    Phase("mid-stream", {"hang_mid": 2}, stream=True, seen=b"\n\n"),
    Phase("mid-stream, events flowing", {"chunks": 500, "interval_s": 0.005}, stream=True, seen=b"\n\n"),
)
CELLS = [
    pytest.param(path, stream, phase, id=f"{path[4:]}-{'stream' if stream else 'whole'}-{phase.name}")
    for path in BODIES
    for stream in (False, True)
    for phase in PHASES
    if phase.stream in (None, stream) and not (stream and path == EMBEDDINGS)
]


@contextlib.contextmanager
def nobody_accepts() -> Any:
    """A port on which connecting neither succeeds nor fails: the queue of its listener is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):  # two do on Linux; the rest just hang too
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def gateway_for(engine_url: str, edge: str, *, hold_s: float = 15.0, **pool: Any) -> AsyncIterator[Serving]:
    backend = {"timeouts": {"connect_s": 30}, "connections": {"max": 1024, **pool}}
    settings = settings_for(
        [engine_url], edge=edge, engine="sglang", backend=backend, stream={"hold_s": hold_s, "heartbeat_s": 0.1}
    )
    async with serving(settings) as gateway:
        yield gateway


async def gone(request: Request) -> float:
    """Wait until the model server has lost the peer; returns when that was."""
    async with asyncio.timeout(5.0):
        await request.gone.wait()
    assert request.closed_at is not None
    return request.closed_at


def pool_of(gateway: Serving) -> Any:
    (upstream,) = gateway.runtime.fleet.upstreams()
    return upstream.pool


async def assert_nothing_held(gateway: Serving) -> None:
    """Every place, byte and connection that was reserved has been given back; the replica bears no mark."""
    runtime = gateway.runtime
    pool = pool_of(gateway)
    held = runtime.body_budget
    await until(lambda: not (runtime.in_flight or held.used_bytes or pool.active or pool.waiting))
    assert not runtime._relays
    (replica,) = runtime.fleet.pools["pool"].replicas
    assert (replica.in_flight, replica.in_flight_bytes) == (0, 0)
    assert not replica.cooldown.active(time.monotonic())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("path", "stream", "phase"), CELLS)
async def test_a_client_that_goes_takes_its_request_with_it(
    path: str, stream: bool, phase: Phase, edge: str, how: Leaving
) -> None:
    body = {**BODIES[path], **({"stream": True} if stream else {})}
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(FakeEngine(**phase.script))
        url = stack.enter_context(nobody_accepts()) if phase is CONNECTING else engine.url
        limit = {"max": 1} if phase is POOL else {}
        gateway = await stack.enter_async_context(gateway_for(url, edge, hold_s=phase.hold_s, **limit))
        client = await stack.enter_async_context(connect(gateway.host, gateway.port))

        request: Request | None = None
        if phase is BODY:
            await client.send(post(path, body)[:-5])
            await until(lambda: gateway.runtime.body_budget.used_bytes > 0)
        elif phase is POOL:
            await _leave_from_the_queue(client, gateway, engine, path, body, how)
            return
        elif phase is CONNECTING:
            await client.send(post(path, body))
            await until(lambda: pool_of(gateway).active == 1)
        else:
            await client.send(post(path, body))
            async with asyncio.timeout(5.0):
                request = await engine.received()
            if phase.seen:
                await client.until(phase.seen)

        left_at = time.monotonic()
        client.leave(how)
        if request is not None:
            assert await gone(request) - left_at <= LIMIT_S
        await assert_nothing_held(gateway)
        assert time.monotonic() - left_at <= LIMIT_S

        if phase is BODY:
            assert gateway.records == []  # no request ever was
            assert engine.accepted == 0
            return
        (record,) = gateway.records
        assert record.outcome is Outcome.CLIENT_LEFT
        assert record.error_code is None
        if request is None:
            assert engine.accepted == 0
            return
        await until(lambda: bool(engine.aborted_rids))
        assert engine.aborted_rids == [request.json()["rid"]] == [record.request_id]


async def _leave_from_the_queue(
    client: RawClient, gateway: Serving, engine: FakeEngine, path: str, body: Any, how: Leaving
) -> None:
    """The phase that needs a second client: it has the only connection."""
    engine.queue.extend([engine.script.updated({"hang": True})])
    async with connect(gateway.host, gateway.port) as other:
        await other.send(post(CHAT, BODIES[CHAT]))
        await engine.received()
        await client.send(post(path, body))
        await until(lambda: pool_of(gateway).waiting == 1)
        left_at = time.monotonic()
        client.leave(how)
        await until(lambda: len(gateway.records) == 1)
        assert time.monotonic() - left_at <= LIMIT_S
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        assert (gateway.runtime.in_flight, replica.in_flight, pool_of(gateway).waiting) == (1, 1, 0)
    await assert_nothing_held(gateway)
    assert [record.outcome for record in gateway.records] == [Outcome.CLIENT_LEFT] * 2
    assert len(engine.requests) == 1


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("edge", EDGES)
async def test_a_client_with_a_second_request_in_the_pipe_is_missed_as_well(edge: str, how: Leaving) -> None:
    async with FakeEngine(hang=True) as engine, gateway_for(engine.url, edge) as gateway:
        async with connect(gateway.host, gateway.port) as client:
            await client.send(post(CHAT, BODIES[CHAT]))
            request = await engine.received()
            await client.send(post(CHAT, BODIES[CHAT]))
            await asyncio.sleep(0.05)  # nothing tells when the second one has been read
            left_at = time.monotonic()
            client.leave(how)
            assert await gone(request) - left_at <= LIMIT_S
        await assert_nothing_held(gateway)
        assert [record.outcome for record in gateway.records] == [Outcome.CLIENT_LEFT]
        assert len(engine.requests) == 1  # the second was never sent


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("edge", EDGES)
async def test_a_client_that_has_stopped_reading_can_still_leave(edge: str, how: Leaving) -> None:
    """Bytes that nobody fetches wait in our buffers; they must not keep the connection alive."""
    async with FakeEngine(chunks=200_000, chunk_bytes=2000) as engine, gateway_for(engine.url, edge) as gateway:
        async with connect(gateway.host, gateway.port, receive_buffer_bytes=4096) as client:
            await client.send(post(CHAT, {**BODIES[CHAT], "stream": True}))
            request = await engine.received()
            await client.until(b"\n\n")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            (connection,) = gateway.listener.server_state.connections
            await until(lambda: getattr(connection, "stalled_since", None) is not None)
            left_at = time.monotonic()
            client.leave(how)
            assert await gone(request) - left_at <= LIMIT_S
            await assert_nothing_held(gateway)
        assert [record.outcome for record in gateway.records] == [Outcome.CLIENT_LEFT]


# -- completion wins


@contextlib.asynccontextmanager
async def engine_that_never_ends_its_body() -> AsyncIterator[str]:
    """Sends a complete stream, `[DONE]` included, but not the last chunk."""
    events = (
        b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}\n\n'
        b"data: [DONE]\n\n"
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head + b"%x\r\n%b\r\n" % (len(events), events))
            while await reader.read(65536):
                pass
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("edge", EDGES)
async def test_a_client_that_leaves_on_done_has_its_whole_answer(edge: str) -> None:
    async with engine_that_never_ends_its_body() as url, gateway_for(url, edge) as gateway:
        async with connect(gateway.host, gateway.port) as client:
            await client.send(post(CHAT, {**BODIES[CHAT], "stream": True}))
            await client.until(b"data: [DONE]\n\n")
            client.leave("close")
            (record,) = await gateway.settled()
        assert record.outcome is Outcome.COMPLETED
        assert record.usage is not None
        assert record.usage.prompt_tokens == 3
        await assert_nothing_held(gateway)


class KeptReply:
    """A client's side that only remembers."""

    def __init__(self) -> None:
        self.started = False
        self.on_pause: Callable[[bool], None] | None = None
        self.written: list[bytes] = []

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.written.append(body)

    def start(self, status: int, headers: Headers) -> None:
        self.started = True

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def finish(self) -> None: ...

    def abort(self) -> None: ...


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_came_before_the_client_left_counts_as_complete(stream: bool) -> None:
    """The disconnect falls between the last byte from the model server and the waking of the exchange."""
    async with FakeEngine() as engine, gateway_for(engine.url, "protocol") as gateway:
        body = post(CHAT, {**BODIES[CHAT], "stream": stream}).partition(b"\r\n\r\n")[2]
        runtime = gateway.runtime
        task = asyncio.create_task(serve(Call(CHAT, [], body, time.monotonic()), KeptReply(), runtime))
        async with asyncio.timeout(5.0):
            while not any(relay.leg is not None and relay.leg.completed for relay in runtime._relays):  # noqa: ASYNC110 - not one turn later
                await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        (record,) = gateway.records
        assert record.outcome is Outcome.COMPLETED
        assert record.status == 200
        assert record.usage is not None  # the tokens were spent
        await assert_nothing_held(gateway)
        assert engine.aborted_rids == []


# -- many at once


@dataclass
class Storm:
    """What many clients did, and when the model server noticed."""

    rng: Random
    gateway: Serving
    left_at: dict[str, float] = field(default_factory=dict)

    async def client(self, number: int) -> None:
        rng = self.rng
        path = rng.choice(list(BODIES))
        name = f"client {number}"
        body = {**BODIES[path], "user": name, "stream": rng.random() < 0.6}
        how = rng.choice(WAYS)
        leaves_after_s = rng.uniform(0.0, 0.3)
        whole = rng.random() < 0.9
        async with connect(self.gateway.host, self.gateway.port) as client:
            await client.send(post(path, body)[: None if whole else -5])
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(leaves_after_s):
                    await client.reader.read()
            self.left_at[name] = time.monotonic()
            client.leave(how)


def leftovers(*kinds: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


@pytest.mark.parametrize("edge", EDGES)
async def test_two_hundred_clients_that_leave_at_random_moments_leave_nothing_behind(
    edge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script: dict[str, Any] = {"chunks": 12, "interval_s": 0.02, "delay_head_s": 0.05}
    async with FakeEngine(**script) as engine, gateway_for(engine.url, edge, max=40, idle_s=0.2) as gateway:
        tasks = len(asyncio.all_tasks())
        descriptors = len(os.listdir("/proc/self/fd"))
        objects = leftovers(Relay, Exchange, SocketReply, AsgiReply)
        storm = Storm(Random(5), gateway)
        async with asyncio.TaskGroup() as clients:
            for number in range(200):
                clients.create_task(storm.client(number))
        await assert_nothing_held(gateway)
        await until(lambda: not engine.running)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)

        outcomes = {record.outcome for record in gateway.records}
        assert Outcome.CLIENT_LEFT in outcomes
        assert outcomes <= {Outcome.CLIENT_LEFT, Outcome.COMPLETED, Outcome.UNAVAILABLE}
        gateway.runtime.ledger.recent.clear()
        lags = sorted(
            request.closed_at - storm.left_at[request.json()["user"]]
            for request in engine.requests
            if request.closed_at is not None
        )
        assert lags
        assert lags[-1] <= LIMIT_S
        with capsys.disabled():
            p50, worst = lags[len(lags) // 2], lags[-1]
            print(f"\n{edge}: {len(lags)} cut upstream; median {p50 * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms")
        assert leftovers(Relay, Exchange, SocketReply, AsgiReply) <= objects
