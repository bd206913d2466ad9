"""Two attempts at one answer, at once or one after the other, when they meet at the worst moment."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from backends.dialects.protocol import Fault
from backends.errors import Disconnected
from gateway.record import Outcome
from gateway.relay import Relay
from gateway.upstream_errors import from_status
from loadtests.behaviour import Behaviour
from loadtests.counting import counted
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.support.client import until
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
PIECES = 40
DELAY_S = 0.05
STREAM = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])


@dataclass
class Hedged:
    """A gateway that sends late requests to a second replica; all come to the first as long as it is there."""

    gateway: Serving
    engines: list[FakeEngine]

    @property
    def relay(self) -> Relay:
        (relay,) = self.gateway.runtime._relays
        return relay

    async def at_rest(self) -> None:
        replicas = self.gateway.runtime.fleet.pools["pool"].replicas
        await until(lambda: [each.in_flight for each in replicas] == list(range(len(replicas))), 10.0)


@asynccontextmanager
async def hedged(*scripts: Behaviour, continuation: bool = False, edge: str = "protocol") -> AsyncIterator[Hedged]:
    engines = [FakeEngine(script) for script in scripts]
    for engine in engines:
        await engine.start()
    model = {"backend": "pool", "continuation": continuation, "hedge": {"share": 0.5, "min_delay_ms": DELAY_S * 1000}}
    replicas = [{"url": each.url, "max_in_flight": 20} for each in engines]
    pool = {"engine": "sglang", "replicas": replicas, "queue": {"enabled": False}, "connections": {"max": 4}}
    try:
        async with serving(settings_for([], edge=edge, models={"m": model}, backends={"pool": pool})) as gateway:
            found = Hedged(gateway, engines)
            for number, replica in enumerate(gateway.runtime.fleet.pools["pool"].replicas):
                replica.in_flight += number
            hedges = gateway.runtime.fleet.models["m"].hedges
            assert hedges is not None
            for _ in range(128):
                for power in range(14):
                    hedges.note(2**power, 0.001)
            yield found
    finally:
        for engine in engines:
            await engine.stop()


def events(reply: Reply | bytes) -> Iterator[dict[str, Any]]:
    body = reply if isinstance(reply, bytes) else reply.body
    for line in body.decode().split("\n\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text_of(reply: Reply | bytes) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events(reply) for choice in event.get("choices", ())
    )


def counting(**more: Any) -> Behaviour:
    return Behaviour(chunks=PIECES, counting=True, **more)


# -- hedged requests


@EDGES
async def test_an_attempt_that_was_outrun_before_it_was_sent_is_never_sent(edge: str) -> None:
    """The second still waits for a connection when the first has content: nothing of its may get into the answer."""
    async with hedged(counting(ttft_s=0.3, interval_s=0.02), counting(), edge=edge) as both:
        replica = both.gateway.runtime.fleet.pools["pool"].replicas[1]
        pool = both.gateway.runtime.fleet.pools["pool"].upstreams[replica].pool
        taken = [await pool.acquire(1.0) for _ in range(pool._max_connections)]
        async with streaming(both.gateway, STREAM) as stream:
            await until(lambda: pool.waiting == 1, 10.0)
            await stream.until(b"000003 ")
            for each in taken:
                each.detach()
            await stream.rest()
        assert text_of(stream.body) == counted(PIECES)
        assert stream.body.count(b"data: [DONE]") == 1
        assert not both.engines[1].requests
        await both.at_rest()


@EDGES
async def test_a_first_attempt_that_waits_for_a_connection_does_not_hold_up_the_end_of_the_other(edge: str) -> None:
    async with hedged(counting(), counting(), edge=edge) as both:
        replica = both.gateway.runtime.fleet.pools["pool"].replicas[0]
        pool = both.gateway.runtime.fleet.pools["pool"].upstreams[replica].pool
        taken = [await pool.acquire(1.0) for _ in range(pool._max_connections)]
        reply = await ask(both.gateway, STREAM)
        assert pool.waiting == 0
        assert text_of(reply) == counted(PIECES)
        assert reply.headers["x-tidegate-replica"] == "pool-1"
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.COMPLETED, "pool-1")
        assert record.duration_s < 0.9
        for each in taken:
            each.detach()
        await both.at_rest()


async def test_the_second_goes_on_with_its_own_text_after_the_first_has_broken() -> None:
    """The first breaks without content, the second brings some and breaks, too: what it sent is not sent again."""
    cut = counting(ttft_s=0.3, cut_after=7)
    async with hedged(Behaviour(role_only_then_hang=True), cut, counting(), continuation=True) as both:
        asking = asyncio.create_task(ask(both.gateway, STREAM))
        await both.engines[1].received(1)
        await both.engines[0].stop()
        reply = await asking
        assert text_of(reply) == counted(PIECES)
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.continuations) == (Outcome.COMPLETED, 1)
        await both.at_rest()


async def test_a_first_that_breaks_in_the_moment_the_second_has_content_does_not_end_it() -> None:
    async with hedged(Behaviour(hang=True), counting(ttft_s=0.3), counting()) as both:
        asking = asyncio.create_task(ask(both.gateway, STREAM))
        await both.engines[1].received(1)
        await until(lambda: both.relay.rival is not None and both.relay.rival.reader is not None, 10.0)
        first, rival = both.relay.leg, both.relay.rival
        assert first is not None and rival is not None  # noqa: PT018
        first.on_error(Disconnected("pool-0", "head", "reset", sent=True))
        chunk = {"id": "x", "choices": [{"index": 0, "delta": {"content": "+"}, "finish_reason": None}]}
        rival.on_data(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        reply = await asking
        assert text_of(reply) == "+" + counted(PIECES)
        assert b'"error"' not in reply.body
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.COMPLETED, "pool-1")
        await both.at_rest()


# -- answers that are gone on with


def in_pieces(tokens: int) -> str:
    """An answer that breaks off, whose chunks tell their tokens as vLLM and SGLang do when they are asked to."""
    head = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    found = ["HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"]
    for number in range(tokens):
        chunk = {
            **head,
            "choices": [{"index": 0, "delta": {"content": f"{number:06d} "}, "finish_reason": None}],
            "usage": {"prompt_tokens": 9, "completion_tokens": number + 1, "total_tokens": number + 10},
        }
        found.append(f"data: {json.dumps(chunk)}\n\n")
    return "".join(found)


def continuing(*engines: FakeEngine, edge: str = "protocol", queue: Any = None, **sections: Any) -> Any:
    if queue is not None:
        replicas = [{"url": each.url, "max_in_flight": 1} for each in engines]
        sections["backend"] = {"replicas": replicas, "queue": queue}
    models = {"m": {"backend": "pool", "continuation": True, "price": {"input": 1.0, "output": 1.0}}}
    return settings_for([each.url for each in engines], engine="sglang", edge=edge, models=models, **sections)


def prefer_first(gateway: Serving) -> None:
    for number, replica in enumerate(gateway.runtime.fleet.pools["pool"].replicas):
        replica.in_flight += number * 5


@EDGES
async def test_the_usage_is_that_of_all_legs_where_each_chunk_tells_its_own(edge: str) -> None:
    async with (
        FakeEngine(Behaviour(raw=in_pieces(10))) as ill,
        FakeEngine(counting()) as well,
        serving(continuing(ill, well, edge=edge)) as gateway,
    ):
        prefer_first(gateway)
        reply = await ask(gateway, {**STREAM, "stream_options": {"include_usage": True}})
        assert text_of(reply) == counted(PIECES)
        shown = [event["usage"] for event in events(reply) if event.get("usage")]
        assert [(each["prompt_tokens"], each["completion_tokens"]) for each in shown] == [(9, PIECES)]
        (record,) = await gateway.settled()
        assert record.usage is not None
        assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (9, PIECES)
        assert record.cost_usd == pytest.approx((9 + PIECES) / 1e6)


async def test_a_later_leg_without_a_usage_is_not_given_away() -> None:
    limits = {"key": {"tokens_per_minute": 100_000}, "tenant": {"tokens_per_minute": 1_000_000}}
    async with (
        FakeEngine(Behaviour(raw=in_pieces(10))) as ill,
        FakeEngine(counting(cut_after=20)) as other,
        serving(continuing(ill, other, limits=limits)) as gateway,
    ):
        prefer_first(gateway)
        reply = await ask(gateway, STREAM)
        assert text_of(reply) == counted(30)
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.UPSTREAM_INTERRUPTED
        assert record.usage is not None
        assert record.usage.completion_tokens >= 25


async def test_the_time_to_first_token_is_that_of_the_first_leg() -> None:
    async with (
        FakeEngine(counting(cut_after=5)) as ill,
        FakeEngine(counting(ttft_s=0.1)) as well,
        serving(continuing(ill, well)) as gateway,
    ):
        prefer_first(gateway)
        await ask(gateway, STREAM)
        (record,) = await gateway.settled()
        assert record.continuations == 1
        assert record.replica_ttft_s is not None
        assert record.replica_ttft_s >= 0


async def test_what_an_engine_says_of_a_break_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It may quote the prompt, and its line ends may look like lines of the log."""
    said = {"error": {"message": "cannot go on with 'the prompt'\n2026 ERROR forged", "type": "x", "code": 500}}
    raw = in_pieces(3) + f"data: {json.dumps(said)}\n\n"
    caplog.set_level(logging.INFO)
    async with (
        FakeEngine(Behaviour(raw=raw)) as ill,
        FakeEngine(counting()) as well,
        serving(continuing(ill, well)) as gateway,
    ):
        prefer_first(gateway)
        assert text_of(await ask(gateway, STREAM)) == counted(PIECES)
    assert "goes on after" in caplog.text
    assert "the prompt" not in caplog.text
    assert "forged" not in caplog.text


@EDGES
@pytest.mark.parametrize("code", [400, 422, 500])
async def test_content_that_was_delivered_is_charged_however_the_answer_ends(code: int, edge: str) -> None:
    said = {"error": {"message": "no", "type": "x", "code": code}}
    raw = in_pieces(10) + f"data: {json.dumps(said)}\n\n"
    async with FakeEngine(Behaviour(raw=raw)) as ill, serving(continuing(ill, edge=edge)) as gateway:
        reply = await ask(gateway, STREAM)
        assert text_of(reply) == counted(10)
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.UPSTREAM_INTERRUPTED
        assert record.usage is not None
        assert record.usage.completion_tokens == 10


@EDGES
async def test_an_answer_that_breaks_off_late_may_wait_for_a_place_as_long_as_any(edge: str) -> None:
    """The line's longest wait is counted from the break, not from when the request came."""
    queue = {"max_wait_s": 5.0}
    async with FakeEngine(counting(cut_after=10, interval_s=0.05)) as ill, FakeEngine(counting()) as well:
        settings = continuing(ill, well, edge=edge, queue=queue)
        async with serving(settings) as gateway:
            first, second = gateway.runtime.fleet.pools["pool"].replicas
            second.in_flight += 1
            asking = asyncio.create_task(ask(gateway, STREAM))
            await ill.received(1)
            (visit,) = gateway.runtime.gate.visits.values()
            visit.entered_at -= 30.0  # it has been answered for so long
            await until(lambda: first.in_flight == 0, 10.0)
            await asyncio.sleep(0.2)
            second.in_flight -= 1
            assert text_of(await asking) == counted(PIECES)
            (record,) = await gateway.settled()
            assert record.queue_s < 1.0


# -- deadlines, and what engines say


@EDGES
async def test_a_question_that_comes_before_the_request_is_part_of_its_time(edge: str) -> None:
    """llama.cpp is asked for its adapters first; an engine that does not answer that either costs no more time."""
    silent = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with silent, serving(settings_for([url], engine="llamacpp", edge=edge)) as gateway:
        reply = await ask(gateway, STREAM, "/v1/chat/completions", "x-tidegate-deadline-ms: 300")
        assert reply.status == 504
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.TIMEOUT
        assert record.duration_s < 2.0


@EDGES
async def test_a_client_that_reads_nothing_for_a_while_does_not_use_up_the_time_to_first_token(edge: str) -> None:
    async with (
        FakeEngine(counting(cut_after=5)) as ill,
        FakeEngine(counting(ttft_s=1.2)) as well,
        serving(continuing(ill, well, edge=edge, backend={"timeouts": {"first_token_s": 0.6}})) as gateway,
    ):
        prefer_first(gateway)
        asking = asyncio.create_task(ask(gateway, STREAM))
        await well.received(1)
        (relay,) = gateway.runtime._relays
        relay._pause(True)
        await asyncio.sleep(0.9)
        relay._pause(False)
        assert text_of(await asking) == counted(PIECES)


async def test_an_ejection_is_logged_without_the_engines_words(caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"error": {"message": "cannot render 'the prompt'\n2026 ERROR forged", "code": "a\nforged"}})
    async with (
        FakeEngine(Behaviour(status=500, error_body=body)) as ill,
        FakeEngine() as well,
        serving(settings_for([ill.url, well.url])) as gateway,
    ):
        for _ in range(20):
            await ask(gateway, {**STREAM, "stream": False})
    assert "is ejected" in caplog.text
    assert "the prompt" not in caplog.text
    assert "forged" not in caplog.text


def test_a_code_that_is_no_word_is_nobodys() -> None:
    """It is logged, and told apart by."""
    for code in ("a\nb", "x" * 200, "", "a b"):
        error = from_status(400, [], {"message": "no", "code": code}, Fault.REQUEST, 0.0)
        assert error.code is None
    error = from_status(429, [], {"message": "no", "code": "rate\nlimit"}, Fault.OVERLOAD, 0.0)
    assert error.code == "rate_limit_exceeded"
    assert (
        from_status(400, [], {"code": "context_length_exceeded"}, Fault.REQUEST, 0.0).code == "context_length_exceeded"
    )


@pytest.mark.parametrize(("status", "outcome"), [(200, Outcome.COMPLETED), (500, Outcome.CLIENT_LEFT)])
async def test_a_client_that_leaves_in_the_moment_that_the_answer_comes(status: int, outcome: Outcome) -> None:
    """An answer counts, with its own usage; an error is none."""
    async with FakeEngine(Behaviour(hang=True)) as engine, serving(settings_for([engine.url])) as gateway:
        asking = asyncio.create_task(ask(gateway, {**STREAM, "stream": False}))
        await engine.received(1)
        (relay,) = gateway.runtime._relays
        (connection,) = gateway.listener.server_state.connections
        leg, task = relay.leg, connection._open[0].task  # type: ignore[union-attr]
        assert leg is not None
        task.cancel()
        leg.on_head(status, [])
        leg.on_data(b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}')
        leg.on_end()
        (record,) = await gateway.settled()
        assert record.outcome is outcome
        assert (record.usage is None) == (status != 200)
        if record.usage is not None:
            assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (3, 4)
        asking.cancel()
