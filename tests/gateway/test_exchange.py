"""Which replica answers, what is tried again, and what the client and the record are told of it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.types import Replica
from tests.backends.scripted import Peer, scripted
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
BOTH = pytest.mark.parametrize("body", [CHAT, {**CHAT, "stream": True}], ids=["whole", "stream"])


@contextmanager
def refusing(count: int = 1) -> Iterator[list[str]]:
    """URLs at which connections are refused: the ports are taken, and nobody listens."""
    sockets = []
    try:
        for _ in range(count):
            sockets.append(socket.socket())
            sockets[-1].bind(("127.0.0.1", 0))
        yield [f"http://127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def nobody_accepts() -> Iterator[str]:
    """A URL at which connecting neither succeeds nor fails: the listener's queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        for each in fillers:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for each in fillers:
            each.close()


def replicas(gateway: Serving) -> tuple[Replica, ...]:
    return gateway.runtime.fleet.pools["pool"].replicas


# Refused connections.


@EDGES
@BOTH
async def test_another_replica_is_tried_before_the_client_notices(edge: str, body: dict[str, Any]) -> None:
    with refusing() as dead:
        async with FakeEngine() as engine, serving(settings_for([*dead, engine.url], edge=edge)) as gateway:
            replicas(gateway)[1].in_flight += 1  # so that the dead one is preferred
            reply = await ask(gateway, body)
            (record,) = await gateway.settled()
    assert (reply.status, reply.complete) == (200, True)
    assert (reply.headers["x-tidegate-attempts"], reply.headers["x-tidegate-replica"]) == ("2", "pool-1")
    assert (record.attempts, record.replica, record.outcome) == (2, "pool-1", Outcome.COMPLETED)


@EDGES
async def test_a_replica_that_refused_is_left_alone_for_a_moment_and_then_tried_again(edge: str) -> None:
    async with (
        FakeEngine() as first,
        FakeEngine() as second,
        serving(settings_for([first.url, second.url], edge=edge)) as gateway,
    ):
        await first.stop()
        replicas(gateway)[1].in_flight += 1
        assert (await ask(gateway, CHAT)).headers["x-tidegate-attempts"] == "2"
        replicas(gateway)[1].in_flight -= 1
        assert replicas(gateway)[0].unavailable_reason(time.monotonic()) == "cooling_down"
        for _ in range(10):
            assert (await ask(gateway, CHAT)).headers["x-tidegate-attempts"] == "1"
        await first.start()
        replicas(gateway)[0].cooldown.until = 0.0  # the moment is over
        replicas(gateway)[1].in_flight += 1
        assert (await ask(gateway, CHAT)).headers["x-tidegate-replica"] == "pool-0"
        assert replicas(gateway)[0].cooldown.failures == 0


@EDGES
async def test_many_dead_replicas_do_not_hide_the_living_one(edge: str) -> None:
    with refusing(6) as dead:
        async with FakeEngine() as engine, serving(settings_for([*dead, engine.url], edge=edge)) as gateway:
            replicas(gateway)[6].in_flight += 1
            reply = await ask(gateway, CHAT)
    assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "7")


@EDGES
@BOTH
async def test_when_all_refuse_it_is_a_502_in_openais_shape(edge: str, body: dict[str, Any]) -> None:
    with refusing(2) as dead:
        async with serving(settings_for(dead, edge=edge)) as gateway:
            reply = await ask(gateway, body)
            (record,) = await gateway.settled()
            again = await ask(gateway, body)
    assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_unreachable")
    assert reply.headers["x-tidegate-attempts"] == "2"
    assert reply.headers["x-request-id"] == record.request_id
    assert "127.0.0.1" not in error_of(reply.body)["message"]
    assert record.outcome is Outcome.UPSTREAM_ERROR
    assert again.status == 502  # cooling down is no reason to stop trying when nothing else is left
    assert again.headers["x-tidegate-attempts"] == "2"


async def test_the_log_says_why_a_replica_fails_and_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with refusing() as (dead,):
        async with serving(settings_for([dead])) as gateway:
            for _ in range(3):
                assert (await ask(gateway, CHAT)).status == 502
    said = [each.getMessage() for each in caplog.records if each.name == "gateway.watch.witness"]
    assert said == [f"replica pool-0 fails: {dead.removeprefix('http://')}: connection refused (connect)"]


# Kept-alive connections.


@EDGES
@BOTH
async def test_a_stale_connection_is_replaced_unnoticed(edge: str, body: dict[str, Any]) -> None:
    """The engine closes the kept-alive connection just when the second request is on its way."""
    text = b'{"choices":[]}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
    requests: list[int] = []

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            requests.append(peer.number)
            if requests == [0, 0]:
                peer.reset()
                return
            await peer.send(answer)

    async with (
        scripted(script) as engine,
        serving(settings_for([f"http://127.0.0.1:{engine.origin.port}"], edge=edge)) as gateway,
    ):
        await ask(gateway, body)
        reply = await ask(gateway, body)
        assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "2")
        assert replicas(gateway)[0].cooldown.failures == 0
    assert requests == [0, 0, 1]


@EDGES
async def test_a_connection_that_the_engine_closed_while_idle_is_not_used(edge: str) -> None:
    async with FakeEngine(keepalive_s=0.0) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        for _ in range(20):
            assert (await ask(gateway, CHAT)).status == 200
        assert len(engine.requests) == 20
        assert replicas(gateway)[0].cooldown.failures == 0


@EDGES
@BOTH
async def test_what_may_have_been_worked_on_goes_elsewhere_once_and_no_further(edge: str, body: dict[str, Any]) -> None:
    """A request that kills engines must not be carried through the whole fleet."""
    async with FakeEngine(raw="", ports=(0, 0, 0)) as engine, serving(settings_for(engine.urls, edge=edge)) as gateway:
        reply = await ask(gateway, body)
        assert len(engine.requests) == 2
    assert reply.headers["x-tidegate-attempts"] == "2"
    assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_disconnected")


@EDGES
async def test_an_answer_cut_in_its_middle_is_a_502_and_never_a_short_200(edge: str) -> None:
    async with FakeEngine(content_length_short=10) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        reply = await ask(gateway, CHAT)
    assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_disconnected")


# Statuses.


@EDGES
@BOTH
@pytest.mark.parametrize(
    ("status", "expected", "outcome"),
    [
        (400, 400, Outcome.UPSTREAM_REJECTED),
        (401, 502, Outcome.UPSTREAM_ERROR),
        (403, 502, Outcome.UPSTREAM_ERROR),
        (404, 404, Outcome.UPSTREAM_REJECTED),
        (422, 422, Outcome.UPSTREAM_REJECTED),
        (429, 429, Outcome.UPSTREAM_ERROR),
        (499, 499, Outcome.UPSTREAM_REJECTED),
        (500, 502, Outcome.UPSTREAM_ERROR),
        (503, 503, Outcome.UPSTREAM_ERROR),
        (529, 503, Outcome.UPSTREAM_ERROR),
    ],
)
async def test_statuses_of_the_engine(
    edge: str, body: dict[str, Any], status: int, expected: int, outcome: Outcome
) -> None:
    async with (
        FakeEngine(status=status, retry_after="7") as engine,
        serving(settings_for([engine.url], edge=edge)) as gateway,
    ):
        reply = await ask(gateway, body)
        (record,) = await gateway.settled()
        # An answer of any status is an answer: the replica bears no mark, and the request is not repeated.
        assert len(engine.requests) == 1
        assert replicas(gateway)[0].available(time.monotonic())
    error_of(reply.body)
    assert (reply.status, record.status, record.outcome) == (expected, expected, outcome)
    # Up to a fifth later than the engine said, so that not all come back at once.
    assert reply.headers.get("retry-after") in ({"7", "8", "9"} if status in (429, 503, 529) else {None})
    assert reply.headers["x-tidegate-replica"] == "pool-0"


# Choosing.


async def test_requests_go_where_the_fewest_are_under_way() -> None:
    async with (
        FakeEngine(hang=True) as slow,
        FakeEngine() as fast,
        serving(settings_for([slow.url, fast.url])) as gateway,
    ):
        for each in (slow, fast):  # whichever is drawn first: keep the slow one busy with one request
            each.queue.append(Behaviour(hang=True))
        hanging = [asyncio.create_task(ask(gateway, CHAT)) for _ in range(2)]
        await slow.received()
        await fast.received()
        fast.drop_connections()
        await slow.received(2)  # what had no content yet has moved
        answers = [(await ask(gateway, CHAT)).headers["x-tidegate-replica"] for _ in range(8)]
        assert set(answers) == {"pool-1"}
        assert [each.in_flight for each in replicas(gateway)] == [2, 0]
        slow.drop_connections()
        await asyncio.wait(hanging)
        await gateway.settled(10)
        assert [(each.in_flight, each.in_flight_bytes) for each in replicas(gateway)] == [(0, 0), (0, 0)]


async def test_an_idle_fleet_is_used_evenly() -> None:
    async with FakeEngine(ports=(0, 0)) as engine, serving(settings_for(engine.urls)) as gateway:
        counts = Counter([(await ask(gateway, CHAT)).headers["x-tidegate-replica"] for _ in range(60)])
    assert set(counts) == {"pool-0", "pool-1"}
    assert min(counts.values()) > 10


@EDGES
async def test_a_full_pool_without_a_queue_is_a_503_that_says_when_to_come_back(edge: str) -> None:
    async with FakeEngine(hang=True) as engine:
        backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}], "queue": {"enabled": False}}
        async with serving(settings_for([], edge=edge, backend=backend)) as gateway:
            first = asyncio.create_task(ask(gateway, CHAT))
            await engine.received()
            reply = await ask(gateway, CHAT)
            (record,) = gateway.records
            engine.drop_connections()
            await first
    assert (reply.status, error_of(reply.body)["code"]) == (503, "no_replica_available")
    assert "1 full" in error_of(reply.body)["message"]
    # A second, and up to another, so that not all come back together.
    assert 1000 <= int(reply.headers["retry-after-ms"]) <= 2000
    assert reply.headers["retry-after"] in ("1", "2")
    assert record.outcome is Outcome.UNAVAILABLE


# The client's own conditions.


@EDGES
@BOTH
async def test_a_request_stays_in_its_region(edge: str, body: dict[str, Any]) -> None:
    async with FakeEngine(ports=(0, 0)) as engine:
        placed = [{"url": engine.urls[0], "region": "eu-west"}, {"url": engine.urls[1], "region": "us-east"}]
        async with serving(settings_for([], edge=edge, backend={"replicas": placed})) as gateway:
            for region, wanted in (("eu-west", "eu-west"), ("US, us-east", "us-east")):
                for _ in range(5):
                    reply = await ask(gateway, body, "/v1/chat/completions", f"x-tidegate-region: {region}")
                    assert (reply.status, reply.headers["x-tidegate-region"]) == (200, wanted)
            refused = await ask(gateway, body, "/v1/chat/completions", "x-tidegate-region: mars")
    error = error_of(refused.body)
    assert refused.status == 403
    assert (error["type"], error["code"], error["param"]) == (
        "request_forbidden",
        "data_residency_mismatch",
        "x-tidegate-region",
    )
    assert "retry-after" not in refused.headers


@EDGES
async def test_a_dead_region_is_never_left_for_another(edge: str) -> None:
    with refusing() as dead:
        async with FakeEngine() as engine:
            placed = [{"url": dead[0], "region": "eu-west"}, {"url": engine.url, "region": "us-east"}]
            async with serving(settings_for([], edge=edge, backend={"replicas": placed})) as gateway:
                reply = await ask(gateway, CHAT, "/v1/chat/completions", "x-tidegate-region: eu-west")
                assert engine.requests == []
    assert reply.status == 502


@EDGES
@BOTH
async def test_a_deadline_that_passes_is_a_504(edge: str, body: dict[str, Any]) -> None:
    async with FakeEngine(hang=True) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        started_at = time.monotonic()
        reply = await ask(gateway, body, "/v1/chat/completions", "x-tidegate-deadline-ms: 200")
        assert 0.15 < time.monotonic() - started_at < 1.0
        (record,) = await gateway.settled()
        await asyncio.wait_for(engine.requests[0].gone.wait(), 1)
        assert replicas(gateway)[0].available(time.monotonic())
    assert (reply.status, error_of(reply.body)["code"]) == (504, "upstream_timeout")
    assert record.outcome is Outcome.TIMEOUT


@EDGES
async def test_a_deadline_that_passes_mid_stream_ends_it_with_an_error_event(edge: str) -> None:
    async with (
        FakeEngine(chunks=200, interval_s=0.02) as engine,
        serving(settings_for([engine.url], edge=edge)) as gateway,
    ):
        body = {**CHAT, "stream": True}
        async with streaming(gateway, body, "/v1/chat/completions", "x-tidegate-deadline-ms: 300") as stream:
            text = await stream.rest()
        (record,) = await gateway.settled()
    assert b'"code":"upstream_timeout"' in text.split(b"\n\n")[-2]
    assert b"[DONE]" not in text
    assert (record.status, record.outcome) == (200, Outcome.TIMEOUT)


@EDGES
async def test_a_deadline_counts_while_connecting_too_and_marks_nobody(edge: str) -> None:
    with nobody_accepts() as url:
        async with serving(settings_for([url], edge=edge, backend={"timeouts": {"connect_s": 5}})) as gateway:
            started_at = time.monotonic()
            reply = await ask(gateway, CHAT, "/v1/chat/completions", "x-tidegate-deadline-ms: 200")
            assert time.monotonic() - started_at < 1.0
            assert replicas(gateway)[0].available(time.monotonic())
    assert reply.status == 504


@EDGES
async def test_a_replica_that_cannot_be_reached_in_time_is_passed_over(edge: str) -> None:
    with nobody_accepts() as url:
        async with FakeEngine() as engine:
            settings = settings_for([url, engine.url], edge=edge, backend={"timeouts": {"connect_s": 0.2}})
            async with serving(settings) as gateway:
                replicas(gateway)[1].in_flight += 1
                reply = await ask(gateway, CHAT)
                assert not replicas(gateway)[0].available(time.monotonic())
    assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "2")


@EDGES
@BOTH
async def test_an_answer_that_is_compressed_all_the_same_is_a_502(edge: str, body: dict[str, Any]) -> None:
    raw = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc"
    async with FakeEngine(Behaviour(raw=raw)) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        answer = await ask(gateway, body)
        assert answer.status == 502
        assert error_of(answer.body)["code"] == "upstream_compressed"


@EDGES
@pytest.mark.parametrize("status", ["201 Created", "204 No Content", "206 Partial Content"])
async def test_a_success_that_is_no_answer_is_a_502(edge: str, status: str) -> None:
    length = "" if status.startswith("204") else "content-length: 2\r\n"
    raw = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{length}\r\n{'{}' if length else ''}"
    async with FakeEngine(Behaviour(raw=raw)) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        answer = await ask(gateway, CHAT)
        assert (answer.status, error_of(answer.body)["code"]) == (502, "upstream_error")


@EDGES
async def test_a_stream_answered_with_nothing_is_a_502(edge: str) -> None:
    raw = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 0\r\n\r\n"
    async with FakeEngine(Behaviour(raw=raw)) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        answer = await ask(gateway, {**CHAT, "stream": True})
        assert (answer.status, error_of(answer.body)["code"]) == (502, "upstream_truncated")
