"""Money and a Redis that loses its memory: what is on record in the database counts all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.gateway.admission.keyed import OTHER, admitting, bearer, static
from tests.gateway.admission.outage import LONG_S, away, back, call, limited, two
from tests.support.client import until
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving

MODELS: dict[str, Any] = {"m": {"backend": "pool", "price": {"input": 0.0, "output": 6250.0}}}
"""The engine answers with 16 tokens: ten cents a request."""
LIMITS = {"usd_per_day": 1.0}


async def ask(gate: Serving, key: str = "") -> Reply:
    return await call(gate, bearer(key) if key else bearer(), max_tokens=16)


async def on_record(*gates: Serving) -> None:
    await until(lambda: not any(gate.runtime.gate.spend.waiting_micros for gate in gates), LONG_S)


async def spend(gate: Serving, requests: int) -> None:
    for _ in range(requests):
        assert (await ask(gate)).status == 200


async def passes(gate: Serving) -> int:
    """How many go through until the budget is spent."""
    for number in range(30):
        reply = await ask(gate)
        if reply.status == 429:
            assert reply.json["error"]["code"] == "insufficient_quota"
            return number
        assert reply.status == 200
    raise AssertionError("nothing was refused")


async def test_an_empty_redis_goes_on_from_the_spend_of_record(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine(prompt_tokens=10) as engine:
            settings = limited(tmp_path, engine.url, redis.url, static(limits=LIMITS), models=MODELS)
            async with two(settings) as (one, other):
                await spend(one, 4)
                await spend(other, 2)
                await on_record(one, other)
                redis.kill()
                await away(one, other)
                redis.start()
                await back(one, other)
                assert redis.command("KEYS", "*:k:*") == []
                assert await passes(one) == 4
                assert await passes(other) == 0


async def test_redis_that_is_emptied_in_a_moment_forgives_nothing(tmp_path: Path) -> None:
    """No gateway notices that it was away."""
    with RedisServer() as redis:
        async with FakeEngine(prompt_tokens=10) as engine:
            settings = limited(tmp_path, engine.url, redis.url, static(limits=LIMITS), models=MODELS)
            async with admitting(settings) as gate:
                await spend(gate, 7)
                await on_record(gate)
                redis.empty()
                assert await passes(gate) == 3


async def test_requests_that_run_when_redis_dies_are_paid_after_its_return(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine(prompt_tokens=10, ttft_s=2.0) as engine:
            keys = [static(limits=LIMITS), static("b", OTHER)]
            settings = limited(tmp_path, engine.url, redis.url, *keys, models=MODELS)
            async with admitting(settings) as gate:
                running = [asyncio.create_task(ask(gate)) for _ in range(5)]
                await engine.received(5)
                redis.kill()
                engine.script = FakeEngine(prompt_tokens=10).script
                await away(gate)
                assert {reply.status for reply in await asyncio.gather(*running)} == {200}
                redis.start()
                await back(gate)
                await on_record(gate)
                assert await passes(gate) == 5


async def test_a_gateway_that_starts_with_an_empty_redis_knows_what_was_spent(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine(prompt_tokens=10) as engine:
            settings = limited(tmp_path, engine.url, redis.url, static(limits=LIMITS), models=MODELS)
            async with admitting(settings) as gate:
                await spend(gate, 6)
            redis.restart()
            async with admitting(settings) as gate:
                assert await passes(gate) == 4
