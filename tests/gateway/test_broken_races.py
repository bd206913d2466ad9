"""Hedged requests whose answers break off and are gone on with, at replicas that fail in every way, with clients that
leave: whatever the order, what a client has is the beginning of one answer, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.counting import counted
from loadtests.engine import FakeEngine
from loadtests.rawclient import read_reply
from tests.support.client import connect, post, until
from tests.support.serving import serving, settings_for

LOOPS = ("uvloop",)
PIECES = 40
ROUNDS, AT_ONCE = 5, 12
STREAM = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}
ENDINGS = ("cut_after", "truncate_after", "error_event_after", "early_done", "hang_mid")
REFUSALS: tuple[dict[str, Any], ...] = (
    {"role_only_then_hang": True},
    {"hang": True},
    {"status": 503, "retry_after": "0"},
    {"status": 500},
    {"crlf": True, "split": 7},
)


def check(body: bytes) -> None:
    """One answer, whole with its end, or as far as it came with an error."""
    events = [
        json.loads(event.removeprefix("data: "))
        for event in body.decode().replace("\r\n", "\n").split("\n\n")
        if event.startswith("data: {")
    ]
    said = [event for event in events if "error" not in event]
    deltas = [choice["delta"] for event in said for choice in event["choices"]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert counted(PIECES).startswith(text)
    assert len({event["id"] for event in said}) <= 1
    assert len([delta for delta in deltas if delta.get("role")]) <= 1
    failed = len(said) < len(events)
    assert failed or text == counted(PIECES)
    assert body.count(b"data: [DONE]") == (not failed)
    assert len(events) - len(said) <= 1


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_whatever_breaks_when_a_client_has_the_beginning_of_one_answer(edge: str) -> None:
    rng = Random(3)

    def any_way(body: bytes, behaviour: Behaviour, at: float) -> Behaviour:
        timed = replace(behaviour, ttft_s=rng.choice((0, 0.01, 0.05, 0.08)), interval_s=rng.choice((0, 0.002)))
        kind = rng.random()
        if kind < 0.5:
            return timed
        if kind < 0.8:
            return timed.updated({rng.choice(ENDINGS): rng.randrange(PIECES)})
        return timed.updated(rng.choice(REFUSALS))

    engines = [FakeEngine(chunks=PIECES, counting=True) for _ in range(4)]
    for engine in engines:
        await engine.start()
        engine.pace = any_way
    hedge = {"share": 0.5, "min_delay_ms": 30, "max_busy": 1.0}
    model = {"backend": "pool", "continuation": True, "hedge": hedge, "price": {"input": 1.0, "output": 1.0}}
    pool = {
        "engine": "sglang",
        "replicas": [{"url": each.url, "max_in_flight": 8} for each in engines],
        "connections": {"max": 6},
        "timeouts": {"first_token_s": 0.4, "idle_s": 0.4},
    }
    sections: dict[str, Any] = {"models": {"m": model}, "backends": {"pool": pool}}
    settings = settings_for([], edge=edge, stream={"hold_s": 0.1, "heartbeat_s": 0.1}, **sections)
    try:
        async with serving(settings) as gateway:
            runtime = gateway.runtime
            hedges = runtime.fleet.models["m"].hedges
            assert hedges is not None

            async def client() -> None:
                async with connect(gateway.host, gateway.port) as connection:
                    await connection.send(post("/v1/chat/completions", STREAM))
                    if rng.random() < 0.2:
                        await asyncio.sleep(rng.random() * 0.2)
                        return
                    async with asyncio.timeout(20.0):
                        reply = await read_reply(connection.reader)
                if reply.status == 200:
                    check(reply.body)

            for _ in range(ROUNDS):
                for _ in range(40):
                    for power in range(14):
                        hedges.note(2**power, 0.001)
                await asyncio.gather(*(client() for _ in range(AT_ONCE)))
            records = await gateway.settled(ROUNDS * AT_ONCE // 2, 20.0)
            assert any(record.hedged for record in records)
            assert any(record.continuations for record in records)
            for record in records:
                if record.outcome is Outcome.COMPLETED:
                    assert record.usage is not None
                    assert record.usage.completion_tokens == PIECES
            assert all(each.in_flight == 0 for each in runtime.fleet.pools["pool"].replicas)
            assert not runtime.gate.visits
            assert not runtime._relays
            for upstream in runtime.fleet.pools["pool"].upstreams.values():
                await until(lambda: upstream.pool.active == 0, 10.0)  # noqa: B023 - called before the next one
    finally:
        for engine in engines:
            await engine.stop()
