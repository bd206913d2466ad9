"""What a collector gets of requests: one span each, one below it per attempt, and what engines go on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from gateway.record import Exchange
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.http import ask, streaming
from tests.support.otlp import Collector, attributes, events
from tests.support.serving import Serving, serving, settings_for

EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@asynccontextmanager
async def traced(
    collector: Collector, *engines: FakeEngine, telemetry: dict[str, Any] | None = None, **sections: Any
) -> AsyncIterator[Serving]:
    """A gateway that traces everything, unless told otherwise."""
    told = {"endpoint": collector.url, "ratio": 1.0, **(telemetry or {})}
    async with serving(settings_for([each.url for each in engines], telemetry=told, **sections)) as gateway:
        yield gateway


async def last(gateway: Serving, collector: Collector, count: int = 1) -> tuple[Exchange, list[Span]]:
    record = (await gateway.settled(count))[-1]
    return record, await collector.request(record.request_id)


def traceparent(engine: FakeEngine, request: int = -1) -> list[str]:
    """Version, trace, parent and flags, as the engine got them."""
    value = engine.requests[request].header("traceparent")
    assert value is not None
    return value.split("-")


@EDGES
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_a_request_is_a_server_span_with_a_client_span_below_that_the_engine_goes_on_with(
    collector: Collector, edge: str, body: dict[str, Any]
) -> None:
    async with FakeEngine(chunks=3, prompt_tokens=40, cached_tokens=8) as engine:
        async with traced(collector, engine, edge=edge) as gateway:
            assert (await ask(gateway, body)).status == 200
            record, (own, attempt) = await last(gateway, collector)
        version, trace, parent, flags = traceparent(engine)
    assert (own.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert (own.name, attempt.name) == ("POST /v1/chat/completions", "chat m")
    assert own.parent_span_id == b""
    assert own.trace_id == attempt.trace_id
    assert attempt.parent_span_id == own.span_id
    assert (version, trace, parent, flags) == ("00", own.trace_id.hex(), attempt.span_id.hex(), "01")
    assert own.start_time_unix_nano <= attempt.start_time_unix_nano < attempt.end_time_unix_nano
    assert attempt.end_time_unix_nano <= own.end_time_unix_nano
    assert abs(own.start_time_unix_nano / 1e9 - record.started_unix_s) < 0.001
    assert abs((own.end_time_unix_nano - own.start_time_unix_nano) / 1e9 - record.duration_s) < 0.001
    said, its = attributes(own), attributes(attempt)
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "tidegate.outcome": "completed",
        "tidegate.tenant": record.tenant,
        "tidegate.class": "standard",
        "tidegate.replica": "pool-0",
        "tidegate.route.reason": record.route_reason,
        "tidegate.hedged": False,
        "tidegate.continuations": 0,
        "tidegate.sampling.kept": "sampled",
    }
    assert {name: said.get(name) for name in expected} == expected
    host, port = engine.url.removeprefix("http://").split(":")
    expected = {
        "gen_ai.provider.name": "openai",
        "gen_ai.operation.name": "chat",
        "server.address": host,
        "server.port": int(port),
        "tidegate.replica": "pool-0",
        "gen_ai.usage.input_tokens": 40,
    }
    assert {name: its.get(name) for name in expected} == expected
    assert "error.type" not in said | its
    content = ["tidegate.first_content"] if body is STREAM else []
    assert events(own) == ["tidegate.read", *content, "tidegate.end"]
    assert events(attempt) == [
        "tidegate.decided",
        "tidegate.connected",
        "tidegate.sent",
        *content,
        "tidegate.end",
    ]
    assert "gen_ai.input.messages" not in said


@EDGES
async def test_a_callers_trace_is_joined_and_its_state_passed_on(collector: Collector, edge: str) -> None:
    async with FakeEngine() as engine, traced(collector, engine, edge=edge) as gateway:
        given = (f"traceparent: 00-{TRACE}-{PARENT}-00", "tracestate: a=1", "tracestate: b=2")
        await ask(gateway, CHAT, "/v1/chat/completions", *given)
        _, (own, attempt) = await last(gateway, collector)
        assert (own.trace_id.hex(), own.parent_span_id.hex()) == (TRACE, PARENT)
        assert traceparent(engine) == ["00", TRACE, attempt.span_id.hex(), "01"]
        assert engine.requests[0].header("tracestate") == "a=1,b=2"
        assert own.trace_state.replace(" ", "") == "a=1,b=2"


@pytest.mark.parametrize(
    "given",
    [
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        "nonsense",
    ],
)
async def test_a_malformed_parent_is_ignored_and_never_reaches_an_engine(collector: Collector, given: str) -> None:
    async with FakeEngine() as engine, traced(collector, engine) as gateway:
        await ask(gateway, CHAT, "/v1/chat/completions", f"traceparent: {given}", "tracestate: a=1")
        _, (own, attempt) = await last(gateway, collector)
        assert own.parent_span_id == b""
        assert traceparent(engine) == ["00", own.trace_id.hex(), attempt.span_id.hex(), "01"]
        assert engine.requests[0].header("tracestate") is None
        assert own.trace_id.hex() != TRACE


async def test_a_retry_is_a_second_span_and_the_first_says_why_it_failed(collector: Collector) -> None:
    async with FakeEngine(status=503) as ill, FakeEngine() as well:
        models = {"m": {"backend": "pool", "policy": "round_robin"}}
        async with traced(collector, ill, well, models=models) as gateway:
            for _ in range(2):
                assert (await ask(gateway, CHAT)).status == 200
            record = next(each for each in await gateway.settled(2) if each.attempts == 2)
            own, first, second = await collector.request(record.request_id)
        parents = [{traceparent(each, number)[2] for number in range(len(each.requests))} for each in (ill, well)]
        assert first.span_id.hex() in parents[0]
        assert second.span_id.hex() in parents[1]
    assert attributes(first)["error.type"] == record.tries[0].code != ""
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert first.end_time_unix_nano <= second.start_time_unix_nano
    assert "error.type" not in attributes(second)
    assert own.status.code == second.status.code == Status.STATUS_CODE_UNSET
    assert attributes(own)["tidegate.attempts"] == 2
    assert "gen_ai.usage.input_tokens" not in attributes(first)


async def test_both_of_a_hedged_pair_are_there_and_which_has_won(collector: Collector) -> None:
    async with FakeEngine(hang=True) as slow, FakeEngine(chunks=2) as quick:
        sections: dict[str, Any] = {
            "models": {"m": {"backend": "pool", "hedge": {"share": 0.5, "min_delay_ms": 50}}},
            "backend": {
                "queue": {"enabled": False},
                "replicas": [{"url": each.url, "max_in_flight": 10} for each in (slow, quick)],
            },
        }
        async with traced(collector, slow, quick, **sections) as gateway:
            route, pool = gateway.runtime.fleet.models["m"], gateway.runtime.fleet.pools["pool"]
            pool.replicas[1].in_flight += 1
            assert route.hedges is not None
            for _ in range(128):
                for power in range(14):
                    route.hedges.note(2**power, 0.001)
            assert (await ask(gateway, STREAM)).status == 200
            record, (own, first, second) = await last(gateway, collector)
            pool.replicas[1].in_flight -= 1
        assert (traceparent(slow)[2], traceparent(quick)[2]) == (first.span_id.hex(), second.span_id.hex())
    assert record.hedged
    assert attributes(own)["tidegate.hedged"] is True
    assert [attributes(each).get("tidegate.attempt.code") for each in (first, second)] == ["outrun", None]
    assert first.status.code == Status.STATUS_CODE_UNSET
    assert first.start_time_unix_nano < second.start_time_unix_nano < first.end_time_unix_nano
    assert "tidegate.first_content" in events(second)


async def test_an_answer_that_is_gone_on_with_has_two_spans_with_content(collector: Collector) -> None:
    async with (
        FakeEngine(chunks=8, counting=True, cut_after=3) as ill,
        FakeEngine(chunks=8, counting=True) as well,
    ):
        sections: dict[str, Any] = {
            "models": {"m": {"backend": "pool", "policy": "round_robin", "continuation": True}},
            "engine": "sglang",
        }
        async with traced(collector, ill, well, **sections) as gateway:
            for _ in range(2):
                assert (await ask(gateway, STREAM)).status == 200
            record = next(each for each in await gateway.settled(2) if each.continuations)
            own, first, second = await collector.request(record.request_id)
    assert attributes(own)["tidegate.continuations"] == 1
    assert attributes(first)["gen_ai.provider.name"] == "sglang"
    assert "tidegate.first_content" in events(first)
    assert "tidegate.first_content" in events(second)
    assert attributes(first)["error.type"]


async def test_a_wait_in_line_is_on_the_requests_span(collector: Collector) -> None:
    async with FakeEngine(ttft_s=0.3) as engine:
        backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}], "queue": {"headroom": 0}}
        async with traced(collector, engine, backend=backend) as gateway:
            await asyncio.gather(ask(gateway, CHAT), ask(gateway, CHAT))
            record = next(each for each in await gateway.settled(2) if each.queued_at is not None)
            own, attempt = await collector.request(record.request_id)
    assert events(own)[:3] == ["tidegate.read", "tidegate.queued", "tidegate.admitted"]
    queued, admitted = own.events[1].time_unix_nano, own.events[2].time_unix_nano
    assert (admitted - queued) / 1e9 == pytest.approx(record.queue_s, abs=0.001)
    assert attributes(own)["tidegate.queue.wait_ms"] == pytest.approx(record.queue_s * 1000)
    assert admitted <= attempt.start_time_unix_nano


@EDGES
async def test_a_request_that_fails_is_an_error_and_one_that_is_refused_is_none(
    collector: Collector, edge: str
) -> None:
    async with FakeEngine(status=500) as engine, traced(collector, engine, edge=edge) as gateway:
        assert (await ask(gateway, CHAT)).status == 502
        failed, (own, _) = await last(gateway, collector)
        assert own.status.code == Status.STATUS_CODE_ERROR
        assert attributes(own)["error.type"] == failed.error_code
        assert (await ask(gateway, {"model": "other"})).status == 404
        _, (refused,) = await last(gateway, collector, 2)
        assert refused.status.code == Status.STATUS_CODE_UNSET
        assert attributes(refused)["error.type"] == "model_not_found"
        assert attributes(refused)["http.response.status_code"] == 404


async def test_a_client_that_leaves_is_no_error(collector: Collector) -> None:
    async with FakeEngine(chunks=3, hang_mid=1) as engine, traced(collector, engine) as gateway:
        async with streaming(gateway, STREAM) as stream:
            await stream.until(b"content")
        _, (own, attempt) = await last(gateway, collector)
    assert attributes(own)["tidegate.outcome"] == "client_left"
    assert attributes(attempt)["tidegate.attempt.code"] == "client_left"
    assert own.status.code == attempt.status.code == Status.STATUS_CODE_UNSET


@pytest.mark.parametrize(
    ("engine", "propagate", "told"),
    [("openai", "own", True), ("openai", "none", False), ("openrouter", "own", False), ("openrouter", "all", True)],
)
async def test_rented_apis_are_told_of_the_trace_only_if_asked(
    collector: Collector, engine: str, propagate: str, told: bool
) -> None:
    async with FakeEngine() as fake:
        telemetry = {"propagate": propagate}
        backend = {"engine": engine, "hosted": engine == "openrouter"}
        async with traced(collector, fake, backend=backend, telemetry=telemetry) as gateway:
            given = f"traceparent: 00-{TRACE}-{PARENT}-01"
            assert (await ask(gateway, CHAT, "/v1/chat/completions", given)).status == 200
            hosted = next(iter(gateway.runtime.fleet.upstreams())).hosted
            assert hosted == (engine == "openrouter")
            assert (fake.requests[0].header("traceparent") is not None) == told


@EDGES
async def test_replies_say_their_trace_where_they_are_to(collector: Collector, edge: str) -> None:
    async with FakeEngine() as engine:
        async with traced(collector, engine, edge=edge) as gateway:
            assert "traceresponse" not in (await ask(gateway, CHAT)).headers
        async with traced(collector, engine, edge=edge, telemetry={"response_header": True}) as gateway:
            for body, status in ((CHAT, 200), (STREAM, 200), ({"model": "other"}, 404)):
                reply = await ask(gateway, body)
                record = (await gateway.settled())[-1]
                assert record.traced is not None
                assert reply.status == status
                assert reply.headers["traceresponse"] == record.traced.parent_of(record.traced.span_id).decode()


async def test_the_older_names_are_a_switch_away(collector: Collector) -> None:
    async with FakeEngine() as engine, traced(collector, engine, telemetry={"semconv": "1.36"}) as gateway:
        await ask(gateway, CHAT)
        _, (own, attempt) = await last(gateway, collector)
        assert attributes(attempt)["gen_ai.system"] == "openai"
        assert "gen_ai.provider.name" not in attributes(attempt)
        assert attributes(own)["tidegate.usage.cached_tokens"] == 128
