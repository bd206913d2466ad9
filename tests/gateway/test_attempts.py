"""One attempt after another: what the first one left behind must not be taken for the second one's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.errors import Draining
from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.client import connect, post, until
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
ERROR_WITH_200 = Behaviour(raw="HTTP/1.1 200 OK\r\ncontent-length: 36\r\n\r\n" + '{"error":{"code":502,"message":"x"}}')


def in_order(gateway: Serving) -> None:
    """Have the replicas tried in the order of the configuration."""
    for place, replica in enumerate(gateway.runtime.fleet.pools["pool"].replicas):
        replica.in_flight += place


@EDGES
@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("failing", [Behaviour(status=500), ERROR_WITH_200])
async def test_a_shutdown_in_the_second_attempt_is_no_answer(
    edge: str, body: dict[str, Any], failing: Behaviour
) -> None:
    async with (
        FakeEngine(failing) as bad,
        FakeEngine(hang=True) as good,
        serving(settings_for([bad.url, good.url], edge=edge)) as gateway,
    ):
        in_order(gateway)
        asked = asyncio.create_task(ask(gateway, body))
        await good.received()
        gateway.runtime.interrupt_all(Draining("bye"))
        reply = await asked
        assert (reply.status, error_of(reply.body)["code"]) == (503, "gateway_draining")
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.DRAINED


@EDGES
async def test_a_shutdown_amid_the_second_attempts_stream_is_told(edge: str) -> None:
    async with (
        FakeEngine(status=500) as bad,
        FakeEngine(hang_mid=2) as good,
        serving(settings_for([bad.url, good.url], edge=edge)) as gateway,
    ):
        in_order(gateway)
        async with streaming(gateway, STREAM) as stream:
            await stream.chunk()
            gateway.runtime.interrupt_all(Draining("bye"))
            assert b'"gateway_draining"' in await stream.rest()
        (record,) = await gateway.settled()
        assert record.outcome is Outcome.DRAINED


@EDGES
@pytest.mark.parametrize("failing", [Behaviour(status=500), Behaviour(cut_after=0), ERROR_WITH_200])
async def test_whoever_leaves_in_the_second_attempt_has_left_and_the_engine_is_told(
    edge: str, failing: Behaviour
) -> None:
    async with (
        FakeEngine(failing) as bad,
        FakeEngine(hang=True) as good,
        serving(settings_for([bad.url, good.url], edge=edge, engine="sglang")) as gateway,
    ):
        in_order(gateway)
        async with connect(gateway.host, gateway.port) as client:
            await client.send(post("/v1/chat/completions", STREAM if failing.cut_after == 0 else CHAT))
            request = await good.received()
            client.leave("close")
        await until(lambda: good.aborted_rids == [json.loads(request.body)["rid"]])
        (record,) = await gateway.settled()
        assert (record.outcome, record.status, record.usage) == (Outcome.CLIENT_LEFT, 0, None)


async def test_a_bad_request_cannot_talk_the_gateway_out_of_a_field() -> None:
    """The engine's message quotes what the client sent, which may contain the name of any field."""
    quoted = Behaviour(status=400, error_body='{"message":"temperature: not a number: grid","code":400}')
    async with FakeEngine(quoted) as engine, serving(settings_for([engine.url], engine="sglang")) as gateway:
        assert (await ask(gateway, {**CHAT, "temperature": "grid"})).status == 400
        engine.script = Behaviour()
        assert (await ask(gateway, {**CHAT, "rid": "mine"})).status == 200
        assert json.loads(engine.requests[-1].body)["rid"] != "mine"


async def test_of_many_dead_kept_alive_connections_one_is_tried() -> None:
    async with (
        FakeEngine(ttft_s=0.1) as engine,
        serving(settings_for([engine.url])) as gateway,
    ):
        await asyncio.gather(*(ask(gateway, CHAT) for _ in range(4)))
        (upstream,) = gateway.runtime.fleet.upstreams()
        assert upstream.pool.idle == 4
        engine.script = Behaviour(raw="")
        sent = len(engine.requests)
        assert (await ask(gateway, CHAT)).status == 502
        assert len(engine.requests) == sent + 2
        assert upstream.pool.idle == 0


@pytest.mark.parametrize(("engines", "status"), [(("anthropic", "openai"), 200), (("anthropic", "anthropic"), 400)])
async def test_what_one_engine_has_no_words_for_another_may_do(engines: Sequence[str], status: int) -> None:
    async with FakeEngine() as first, FakeEngine() as second:
        entries = [{"url": each.url, "engine": kind} for each, kind in zip((first, second), engines, strict=True)]
        async with serving(settings_for([first.url], backend={"replicas": entries})) as gateway:
            in_order(gateway)
            reply = await ask(gateway, {**CHAT, "n": 2, "max_tokens": 5})
            assert reply.status == status
            assert first.requests == []
            if status == 400:
                assert error_of(reply.body)["param"] == "n"
