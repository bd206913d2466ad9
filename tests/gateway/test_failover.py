"""What goes elsewhere when a replica fails before its answer was seen, and what becomes of that replica."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import pytest

from backends.dialects.protocol import Adapter
from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.retry_budget import Ruling
from routing.types import Replica
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
QUEUE_FULL = '{"object":"error","message":"The request queue is full.","type":"ServiceUnavailable","code":503}'


def replicas(gateway: Serving) -> tuple[Replica, ...]:
    return gateway.runtime.fleet.pools["pool"].replicas


def prefer_first(gateway: Serving) -> None:
    """Have the first replica chosen while both are free."""
    for other in replicas(gateway)[1:]:
        other.in_flight += 1


@EDGES
@pytest.mark.parametrize(
    ("body", "failing"),
    [
        (CHAT, Behaviour(status=500)),
        (CHAT, Behaviour(status=503, error_body=QUEUE_FULL)),
        (CHAT, Behaviour(status=429, retry_after="3")),
        (CHAT, Behaviour(status=401)),
        (CHAT, Behaviour(raw="")),
        (CHAT, Behaviour(raw="HTTP/9 oops\r\n\r\n")),
        (CHAT, Behaviour(content_length_short=10)),
        (CHAT, Behaviour(raw="HTTP/1.1 200 OK\r\ncontent-length: 36\r\n\r\n" + '{"error":{"code":502,"message":"x"}}')),
        (STREAM, Behaviour(status=500)),
        (STREAM, Behaviour(error_first=True)),
        (STREAM, Behaviour(cut_after=0)),
        (STREAM, Behaviour(truncate_after=0)),
        (STREAM, Behaviour(early_done=0)),
        (STREAM, Behaviour(empty_stream=True)),
    ],
)
async def test_it_goes_elsewhere_and_the_client_notices_nothing(
    edge: str, body: dict[str, Any], failing: Behaviour
) -> None:
    async with (
        FakeEngine(failing) as bad,
        FakeEngine(chunks=2) as good,
        serving(settings_for([bad.url, good.url], edge=edge)) as gateway,
    ):
        prefer_first(gateway)
        reply = await ask(gateway, body)
        assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "2")
        assert reply.headers["x-tidegate-replica"] == "pool-1"
        assert (len(bad.requests), len(good.requests)) == (1, 1)
        if "stream" in body:
            assert reply.body.endswith(b"data: [DONE]\n\n")
            assert b'"error"' not in reply.body
        (record,) = await gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.COMPLETED, "pool-1")


@EDGES
async def test_a_stream_whose_head_is_out_already_still_moves(edge: str) -> None:
    """After the hold the client has status 200 and pings; what has no content yet can still come from elsewhere."""
    async with (
        FakeEngine(role_only_then_hang=True) as bad,
        FakeEngine(chunks=2) as good,
        serving(settings_for([bad.url, good.url], edge=edge, stream={"hold_s": 0.1, "heartbeat_s": 0.1})) as gateway,
    ):
        prefer_first(gateway)
        async with streaming(gateway, STREAM) as stream:
            await stream.until(b": ping")
            bad.drop_connections()
            await stream.rest()
        assert stream.body.endswith(b"data: [DONE]\n\n")
        assert len(good.requests) == 1


@EDGES
async def test_what_the_client_has_seen_a_part_of_is_not_repeated(edge: str) -> None:
    async with (
        FakeEngine(cut_after=2) as bad,
        FakeEngine() as good,
        serving(settings_for([bad.url, good.url], edge=edge)) as gateway,
    ):
        prefer_first(gateway)
        reply = await ask(gateway, STREAM)
        assert b"upstream_disconnected" in reply.body
        assert good.requests == []


@EDGES
@pytest.mark.parametrize("failing", [Behaviour(raw=""), Behaviour(cut_after=0), Behaviour(truncate_after=0)])
async def test_a_hosted_api_is_asked_once_more_for_what_it_may_bill(edge: str, failing: Behaviour) -> None:
    async with (
        FakeEngine(failing, ports=(0, 0, 0)) as engine,
        serving(settings_for(engine.urls, edge=edge, backend={"hosted": True})) as gateway,
    ):
        reply = await ask(gateway, STREAM)
        assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
        assert len(engine.requests) == 2


ABORTED = '{"id":"1","choices":[{"index":0,"message":{"content":"say \\"abort\\""},"finish_reason":"%s"}]}'


@pytest.mark.parametrize(("reason", "attempts"), [("abort", "2"), ("insufficient_system_resource", "2"), ("stop", "1")])
async def test_an_answer_that_the_engine_gave_up_is_no_answer(reason: str, attempts: str) -> None:
    """vLLM and SGLang end like this when they are stopped; a client would take it for the whole."""
    body = ABORTED % reason
    event = body.replace("message", "delta")
    whole = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    stream = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    stream += f"data: {event}\n\ndata: [DONE]\n\n"
    async with FakeEngine() as stopped, FakeEngine() as good, serving(settings_for([stopped.url, good.url])) as gateway:
        prefer_first(gateway)
        for asked, answer in ((CHAT, whole), (STREAM, stream)):
            stopped.script = Behaviour(raw=answer)
            reply = await ask(gateway, asked)
            assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, attempts)
            assert b'"abort"' not in reply.body.replace(b'\\"abort\\"', b"")


async def test_a_stream_that_the_engine_gives_up_after_content_ends_in_an_error() -> None:
    def event(delta: str, reason: str) -> str:
        return f'data: {{"choices":[{{"index":0,"delta":{delta},"finish_reason":{reason}}}]}}\n\n'

    events = event('{"content":"x"}', "null") + event("{}", '"abort"') + "data: [DONE]\n\n"
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with FakeEngine(raw=head + events) as engine, serving(settings_for([engine.url])) as gateway:
        reply = await ask(gateway, STREAM)
        (record,) = await gateway.settled()
    assert b'"code":"upstream_error"' in reply.body
    assert b"[DONE]" not in reply.body
    assert record.outcome is Outcome.UPSTREAM_INTERRUPTED


async def test_a_refused_request_is_not_repeated_and_no_mark() -> None:
    async with FakeEngine(status=400, ports=(0, 0)) as engine, serving(settings_for(engine.urls)) as gateway:
        for _ in range(20):
            assert (await ask(gateway, CHAT)).status == 400
        assert len(engine.requests) == 20
        assert all(each.available(time.monotonic()) for each in replicas(gateway))


async def test_a_replica_that_keeps_failing_is_left_alone_and_the_last_one_never() -> None:
    async with (
        FakeEngine(status=500) as bad,
        FakeEngine() as good,
        serving(settings_for([bad.url, good.url])) as gateway,
    ):
        prefer_first(gateway)
        for _ in range(20):
            assert (await ask(gateway, CHAT)).status == 200
        assert len(bad.requests) == 5
        assert replicas(gateway)[0].unavailable_reason(time.monotonic()) == "ejected"
        good.script = Behaviour(raw="")
        for _ in range(20):
            assert (await ask(gateway, CHAT)).status == 502
        assert replicas(gateway)[1].available(time.monotonic())
        assert gateway.runtime.witness.changes == {("pool", "pool-0", "ejected"): 1, ("pool", "pool-1", "spared"): 1}


async def test_a_request_that_fails_wherever_it_goes_is_to_blame_itself() -> None:
    """Else a handful of them would have half of a pool ejected for everybody."""
    async with FakeEngine(ports=(0, 0, 0, 0)) as engine, serving(settings_for(engine.urls)) as gateway:
        for _ in range(40):
            assert (await ask(gateway, {**CHAT, "fake": {"status": 500}})).status == 502
        counts = gateway.runtime.fleet.pools["pool"].retries.counts
        assert len(engine.requests) == 40 + counts[Ruling.ALLOWED] + counts[Ruling.MOVED]
        assert counts[Ruling.REFUSED] > 10, "without a second opinion nobody is blamed either"
        assert all(each.available(time.monotonic()) for each in replicas(gateway))


async def test_every_attempt_has_an_id_of_its_own_for_the_engine() -> None:
    async with FakeEngine(ports=(0, 0)) as engine, serving(settings_for(engine.urls, engine="sglang")) as gateway:
        await ask(gateway, {**CHAT, "fake": {"status": 500}})
        ids = [json.loads(each.body)["rid"] for each in engine.requests]
        assert len(set(ids)) == 2
        assert len({len(each) for each in ids}) == 1  # SGLang aborts by prefix


@EDGES
async def test_a_llamacpp_that_cannot_be_asked_for_its_adapters_is_asked_nothing_else(edge: str) -> None:
    """Without the scales of its adapters a request for the base model would be answered by all of them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        backend = {"health": {"timeout_s": 0.2}}
        async with (
            FakeEngine() as good,
            serving(settings_for([url, good.url], edge=edge, engine="llamacpp", backend=backend)) as gateway,
        ):
            prefer_first(gateway)
            reply = await ask(gateway, CHAT)
            assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-1")
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1000).startswith(b"GET /lora-adapters")


async def test_a_full_queue_is_load_and_no_failure() -> None:
    async with (
        FakeEngine(status=503, error_body=QUEUE_FULL) as busy,
        FakeEngine() as free,
        serving(settings_for([busy.url, free.url])) as gateway,
    ):
        prefer_first(gateway)
        for _ in range(20):
            assert (await ask(gateway, CHAT)).status == 200
        assert replicas(gateway)[0].available(time.monotonic())


async def test_a_refused_key_pauses_the_key_and_not_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-of-ours")
    async with FakeEngine(status=401, ports=(0, 0)) as engine:
        settings = settings_for(engine.urls, backend={"api_key": "sk-of-ours"})
        async with serving(settings) as gateway:
            first = await ask(gateway, CHAT)
            then = await ask(gateway, CHAT)
            assert (first.status, error_of(first.body)["code"]) == (502, "upstream_auth_failed")
            assert (then.status, error_of(then.body)["code"]) == (502, "upstream_auth_failed")
            assert len(engine.requests) == 1
            assert all(each.health.unavailable_reason(time.monotonic()) is None for each in replicas(gateway))


async def test_a_field_of_ours_that_a_server_refuses_is_left_out_from_then_on() -> None:
    refusal = '{"detail":[{"loc":["body","stream_options"],"msg":"Extra inputs are not permitted"}]}'
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        engine.queue.append(Behaviour(status=422, error_body=refusal))
        reply = await ask(gateway, STREAM)
        assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "1")
        await ask(gateway, STREAM)
        assert ["stream_options" in json.loads(each.body) for each in engine.requests] == [True, False, False]


async def test_fields_that_steer_the_engine_are_the_gateways_to_set() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url], engine="sglang")) as gateway:
        for name in ("lora_path", "bootstrap_host", "routed_dp_rank"):
            reply = await ask(gateway, {**CHAT, name: "x"})
            assert (reply.status, error_of(reply.body)["param"]) == (400, name)
        assert engine.requests == []


async def test_a_pool_of_two_engines_asks_each_in_its_own_words() -> None:
    async with FakeEngine() as one, FakeEngine() as other:
        backend = {
            "engine": "sglang",
            "replicas": [{"url": one.url}, {"url": other.url, "engine": "vllm", "upstream_model": "theirs"}],
        }
        async with serving(settings_for([], backend=backend)) as gateway:
            for busy in replicas(gateway):
                busy.in_flight += 1
                assert (await ask(gateway, CHAT)).status == 200
                busy.in_flight -= 1
        assert "rid" in json.loads(one.requests[0].body)
        theirs = json.loads(other.requests[0].body)
        assert ("rid" in theirs, theirs["model"]) == (False, "theirs")


async def test_an_adapter_is_asked_for_where_it_is_and_nowhere_else() -> None:
    async with FakeEngine() as one, FakeEngine() as other:
        async with serving(settings_for([one.url, other.url], engine="sglang")) as gateway:
            unknown = await ask(gateway, {**CHAT, "model": "m:support"})
            assert (unknown.status, error_of(unknown.body)["code"]) == (404, "model_not_found")
            holder, without = replicas(gateway)
            holder.adapters, without.adapters = frozenset({"support"}), frozenset()
            holder.in_flight += 5
            reply = await ask(gateway, {**CHAT, "model": "m:support"})
            assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-0")
            assert json.loads(one.requests[0].body)["model"] == "m:support"
            holder.adapters = frozenset()
            assert (await ask(gateway, {**CHAT, "model": "m:support"})).status == 404
        assert other.requests == []


async def test_a_model_with_an_adapter_names_the_base_and_the_adapter() -> None:
    async with FakeEngine() as engine:
        models = {"support": {"backend": "pool", "upstream_model": "base", "adapter": "s1"}}
        async with serving(settings_for([engine.url], engine="sglang", models=models)) as gateway:
            replicas(gateway)[0].adapters = frozenset({"s1"})
            assert (await ask(gateway, {**CHAT, "model": "support"})).status == 200
        assert json.loads(engine.requests[0].body)["model"] == "base:s1"


async def test_adapters_are_listed_with_the_models() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url], engine="sglang")) as gateway:
        replicas(gateway)[0].adapters = frozenset({"support"})
        names = [name for name, _ in gateway.runtime.fleet.listed()]
        assert names == ["m", "m:support", "support"]


@EDGES
async def test_llamacpp_is_asked_to_stream_and_the_client_gets_it_whole(edge: str) -> None:
    async with FakeEngine(chunks=3) as engine:
        async with serving(settings_for([engine.url], edge=edge, engine="llamacpp")) as gateway:
            reply = await ask(gateway, CHAT)
            (record,) = await gateway.settled()
        asked = json.loads(engine.requests[0].body)
    answer = json.loads(reply.body)
    assert asked["stream"] is True
    assert reply.headers["content-type"] == "application/json"
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    assert record.usage is not None
    assert record.usage.completion_tokens == 3


@EDGES
async def test_a_client_of_llamacpp_that_leaves_a_whole_answer_frees_the_slot(edge: str) -> None:
    async with (
        FakeEngine(hang_mid=2) as engine,
        serving(settings_for([engine.url], edge=edge, engine="llamacpp")) as gateway,
    ):
        asking = asyncio.create_task(ask(gateway, CHAT))
        request = await engine.received()
        asking.cancel()
        async with asyncio.timeout(1.0):
            await request.gone.wait()


@EDGES
async def test_what_waits_at_a_stopped_engine_is_moved(edge: str) -> None:
    """llama.cpp, once told to stop, keeps its connections open and never answers."""
    async with (
        FakeEngine(role_only_then_hang=True) as stopped,
        FakeEngine(chunks=2) as good,
        serving(settings_for([stopped.url, good.url], edge=edge, engine="llamacpp")) as gateway,
    ):
        prefer_first(gateway)
        waiting = [asyncio.create_task(ask(gateway, body)) for body in (CHAT, STREAM)]
        await stopped.received(2)
        gateway.runtime.abandon(replicas(gateway)[0])
        replies = await asyncio.gather(*waiting)
        assert [each.status for each in replies] == [200, 200]
        assert len(good.requests) == 2


async def test_a_stream_that_answers_counts_from_its_first_content() -> None:
    """Not from its end: a trial would else take as long as the longest answer."""
    async with FakeEngine(hang_mid=1) as engine, serving(settings_for([engine.url])) as gateway:
        (replica,) = replicas(gateway)
        for _ in range(4):
            replica.health.failed(time.monotonic(), room=True)
        async with streaming(gateway, STREAM) as stream:
            await stream.until(b"content")
            assert replica.health.ejection.consecutive == 0


async def test_an_engine_without_cached_tokens_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with FakeEngine(no_usage=False) as engine, serving(settings_for([engine.url])) as gateway:
        (upstream,) = gateway.runtime.fleet.upstreams()
        upstream.adapters = (Adapter("x"),)
        usage = '{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}'
        engine.script = Behaviour(raw=f"HTTP/1.1 200 OK\r\ncontent-length: {len(usage)}\r\n\r\n{usage}")
        for _ in range(3):
            assert (await ask(gateway, CHAT)).status == 200
        assert "cached_tokens" in upstream.signals.lacking
        engine.script = Behaviour()
        await ask(gateway, CHAT)
        assert upstream.signals.lacking == {}
    assert sum("gives no cached_tokens" in each.getMessage() for each in caplog.records) == 1
