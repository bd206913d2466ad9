"""Answers that break off and are gone on with elsewhere: over sockets, with engines whose text says where it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.errors import StreamInterrupted
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.leg import Leg
from gateway.order import Call, read_order
from gateway.record import Attempt, Outcome
from gateway.resumption import Resumption
from gateway.verdict import Again, Verdict
from loadtests.behaviour import Behaviour
from loadtests.counting import counted
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from routing.health import Evidence
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

CHAT = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
PIECES = 40


def settings(*engines: FakeEngine, continuation: bool = True, **sections: Any) -> Any:
    models = {"m": {"backend": "pool", "policy": "round_robin", "continuation": continuation}}
    return settings_for([each.url for each in engines], engine="sglang", models=models, **sections)


def events(reply: Reply) -> Iterator[dict[str, Any]]:
    for line in reply.body.decode().split("\n\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text_of(reply: Reply) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events(reply) for choice in event.get("choices", ())
    )


def is_whole(reply: Reply, pieces: int = PIECES) -> None:
    """One unbroken stream with the whole text, as far as a client can see."""
    assert text_of(reply) == counted(pieces)
    found = list(events(reply))
    assert not [event for event in found if "error" in event]
    assert len({event["id"] for event in found}) == 1
    assert len([1 for event in found for each in event["choices"] if each["delta"].get("role")]) == 1
    assert reply.body.count(b"data: [DONE]") == 1
    assert [each["finish_reason"] for event in found for each in event["choices"] if each["finish_reason"]] == ["stop"]


async def ask_all(gateway: Serving, count: int, **fields: Any) -> list[Reply]:
    return await asyncio.gather(*(ask(gateway, {**CHAT, **fields}) for _ in range(count)))


@EDGES
@pytest.mark.parametrize("cut", [1, 2, 17, PIECES - 1])
async def test_an_answer_that_breaks_off_goes_on_elsewhere(edge: str, cut: int) -> None:
    async with FakeEngine(chunks=PIECES, counting=True) as well, FakeEngine(chunks=PIECES, counting=True) as ill:
        ill.script = Behaviour(chunks=PIECES, counting=True, cut_after=cut)
        async with serving(settings(ill, well, edge=edge)) as gateway:
            replies = await ask_all(gateway, 4, stream_options={"include_usage": True})
            for reply in replies:
                is_whole(reply)
            records = await gateway.settled(4)
            assert all(record.outcome is Outcome.COMPLETED for record in records)
            broken = [record for record in records if record.continuations]
            assert len(broken) == 2
            assert all(record.attempts == 2 for record in broken)
            assert {record.usage.completion_tokens for record in records if record.usage} == {PIECES}


async def test_it_ends_with_an_error_event_where_continuation_is_off() -> None:
    async with (
        FakeEngine(chunks=PIECES, counting=True, cut_after=5) as ill,
        FakeEngine() as other,
        serving(settings(ill, other, continuation=False)) as gateway,
    ):
        broken = [reply for reply in await ask_all(gateway, 2) if b'"error"' in reply.body]
        (reply,) = broken
        assert text_of(reply) == counted(5)
        assert list(events(reply))[-1]["error"]["code"] == "upstream_disconnected"
        assert b"[DONE]" not in reply.body


async def test_a_request_that_kills_at_one_place_is_not_carried_through_the_fleet() -> None:
    engines = [FakeEngine(chunks=PIECES, counting=True) for _ in range(4)]
    for engine in engines:
        await engine.start()
    try:
        # Each dies as soon as it would have to write the sixth piece, whoever began.
        engines[0].script = Behaviour(chunks=PIECES, counting=True, cut_after=5)
        for engine in engines[1:]:
            engine.script = Behaviour(chunks=PIECES, counting=True, cut_after=0)
        async with serving(settings(*engines)) as gateway:
            reply = await ask(gateway, CHAT)
            assert text_of(reply) == counted(5)
            assert list(events(reply))[-1]["error"]["code"] == "upstream_disconnected"
            bodies = [json.loads(request.body) for engine in engines for request in engine.requests]
            assert [body["messages"][-1]["role"] for body in bodies].count("assistant") == 1
            (record,) = await gateway.settled()
            assert record.outcome is Outcome.UPSTREAM_INTERRUPTED
    finally:
        for engine in engines:
            await engine.stop()


async def test_each_continuation_that_brings_text_may_be_followed_by_another() -> None:
    engines = [FakeEngine(chunks=PIECES, counting=True, cut_after=10) for _ in range(3)]
    engines.append(FakeEngine(chunks=PIECES, counting=True))
    for engine in engines:
        await engine.start()
    try:
        async with serving(settings(*engines)) as gateway:
            reply = await ask(gateway, CHAT)
            is_whole(reply)
            (record,) = await gateway.settled()
            assert record.content_events == PIECES
            assert record.continuations == record.attempts - 1 <= 3
    finally:
        for engine in engines:
            await engine.stop()


@pytest.mark.parametrize(
    "ending",
    [
        {"truncate_after": 5},
        {"error_event_after": 5},
        {"early_done": 5},
        {"hang_mid": 5},
        {"raw": "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"},
    ],
    ids=str,
)
async def test_however_it_breaks_off(ending: dict[str, Any]) -> None:
    async with FakeEngine(chunks=PIECES, counting=True) as ill, FakeEngine(chunks=PIECES, counting=True) as well:
        ill.script = Behaviour(chunks=PIECES, counting=True).updated(ending)
        timeouts = {"idle_s": 0.3, "first_token_s": 5.0}
        async with serving(settings(ill, well, backend={"timeouts": timeouts})) as gateway:
            for reply in await ask_all(gateway, 2):
                is_whole(reply)


async def test_a_slow_reader_is_gone_on_with_as_well() -> None:
    async with FakeEngine(chunks=PIECES, counting=True) as ill, FakeEngine(chunks=PIECES, counting=True) as well:
        ill.script = Behaviour(chunks=PIECES, counting=True, big_event_bytes=0, cut_after=30, interval_s=0.01)
        async with serving(settings(ill, well)) as gateway:
            for reply in await ask_all(gateway, 6):
                is_whole(reply)


async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind() -> None:
    async with (
        FakeEngine(chunks=PIECES, counting=True, cut_after=5) as ill,
        FakeEngine(hang=True) as other,
        serving(settings(ill, other)) as gateway,
    ):
        async with streaming(gateway, CHAT) as stream:
            await stream.until(b"000004 ")
            gone = (await other.received(1)).gone
        async with asyncio.timeout(10):
            await gone.wait()
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.CLIENT_LEFT
        assert all(replica.in_flight == 0 for replica in gateway.runtime.fleet.pools["pool"].replicas)


async def test_replicas_that_refuse_are_passed_over_on_the_way() -> None:
    async with (
        FakeEngine(chunks=PIECES, counting=True, cut_after=5) as ill,
        FakeEngine(status=503, retry_after="1") as busy,
        FakeEngine(chunks=PIECES, counting=True) as well,
        serving(settings(ill, busy, well)) as gateway,
    ):
        is_whole(await ask(gateway, CHAT))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
async def test_what_cannot_be_gone_on_with_ends_honestly(fields: dict[str, Any]) -> None:
    async with (
        FakeEngine(chunks=PIECES, cut_after=5) as ill,
        FakeEngine(chunks=PIECES) as other,
        serving(settings(ill, other)) as gateway,
    ):
        reply = await ask(gateway, {**CHAT, **fields})
        assert list(events(reply))[-1]["error"]["code"] == "upstream_disconnected"
        assert not other.requests


async def test_the_remaining_tokens_are_what_is_left_of_them() -> None:
    async with FakeEngine(chunks=PIECES, counting=True, cut_after=5) as ill, FakeEngine() as well:
        well.script = Behaviour(chunks=PIECES, counting=True)
        async with serving(settings(ill, well)) as gateway:
            reply = await ask(gateway, {**CHAT, "max_tokens": 12, "seed": 7})
            assert text_of(reply) == counted(12)
            body = json.loads(well.requests[0].body)
            assert (body["max_tokens"], body["seed"]) == (7, 7)
            assert body["messages"][-1] == {"role": "assistant", "content": counted(5)}


async def test_what_a_hard_limit_bounds_goes_on_only_where_tokens_are_counted() -> None:
    async with (
        FakeEngine(chunks=PIECES, counting=True, cut_after=5) as ill,
        FakeEngine(chunks=PIECES, counting=True) as well,
        serving(settings(ill, well)) as gateway,
    ):
        call = Call("/v1/chat/completions", [], json.dumps(CHAT).encode(), 0.0)
        order = read_order(call, gateway.runtime.fleet, "req_1", Principal(None, ANONYMOUS))
        resumption = Resumption(order, 30)
        observe = resumption.begin_leg(first=True, rival=False)
        assert observe is not None
        pool = gateway.runtime.fleet.pools["pool"]
        leg = Leg(None, pool.replicas[0], Attempt("pool", "pool-0", "", 0.0), [], observe)  # type: ignore[arg-type]
        leg.passing = True
        verdict = Verdict(StreamInterrupted("broken"), Evidence.FAILED, Again.ONCE)
        chunk = {"id": "a", "choices": [{"index": 0, "delta": {"content": "one two"}}]}
        observe({**chunk, "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
        assert resumption.goes_on(leg, verdict, pool) == ""
        observe(chunk)
        assert resumption.goes_on(leg, verdict, pool) == "uncounted"
        free = Resumption(order, None)
        observe = free.begin_leg(first=True, rival=False)
        assert observe is not None
        observe(chunk)
        assert free.goes_on(leg, verdict, pool) == ""
