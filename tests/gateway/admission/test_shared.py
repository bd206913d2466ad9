"""Two gateways that share a real Redis: one limit, one queue; and what becomes of both when Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.order import CHAT
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import OTHER, admitting, bearer, body, keyed, static
from tests.support.client import connect, post, until
from tests.support.http import ask
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving

LONG_S = 10.0


def shared(
    folder: Path, urls: list[str], redis: RedisServer, *keys: dict[str, Any], timeout_ms: int = 500, **sections: Any
) -> Settings:
    """The machine is busy: half a second for Redis, not the default's 50 ms, where nothing is to fail."""
    return keyed(folder, urls, *keys, store=redis.url, redis={"timeout_ms": timeout_ms}, **sections)


@asynccontextmanager
async def two(settings: Settings) -> AsyncIterator[tuple[Serving, Serving]]:
    async with admitting(settings) as one, admitting(settings) as other:
        await until(lambda: one.runtime.gate.home.gateways == other.runtime.gate.home.gateways == 2, LONG_S)
        yield one, other


async def decided_by(store: str, *gates: Serving) -> None:
    """Ask until the replies say so."""
    async with asyncio.timeout(LONG_S):
        for gate in gates:
            while (await ask(gate, body(), CHAT, bearer(OTHER))).headers["x-tidegate-store"] != store:
                pass


async def test_two_gateways_let_through_what_one_limit_allows(tmp_path: Path, redis_server: RedisServer) -> None:
    limits = {"requests_per_minute": 60, "burst_s": 20}
    async with FakeEngine() as engine, two(shared(tmp_path, [engine.url], redis_server, static(limits=limits))) as both:
        begun = asyncio.get_running_loop().time()
        replies = await asyncio.gather(*(ask(both[number % 2], body(), CHAT, bearer()) for number in range(60)))
        took_s = asyncio.get_running_loop().time() - begun
        passed = sum(reply.status == 200 for reply in replies)
        assert 20 <= passed <= 20 + int(took_s) + 1
        assert {reply.status for reply in replies} == {200, 429}
        assert {reply.headers["x-tidegate-store"] for reply in replies} == {"redis"}


async def test_concurrency_is_counted_over_both_and_given_back(tmp_path: Path, redis_server: RedisServer) -> None:
    limits = {"concurrent_requests": 1}
    async with (
        FakeEngine(hang=True) as engine,
        two(shared(tmp_path, [engine.url], redis_server, static(limits=limits))) as (one, other),
        connect(one.host, one.port) as holder,
    ):
        await holder.send(post(CHAT, body(), bearer()))
        await engine.received(1)
        assert (await ask(other, body(), CHAT, bearer())).status == 429
        engine.script = FakeEngine().script
        holder.leave("reset")
        async with asyncio.timeout(LONG_S):
            while (await ask(other, body(), CHAT, bearer())).status != 200:
                pass


async def test_a_place_freed_at_one_gateway_goes_to_a_request_that_waits_at_the_other(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with FakeEngine(hang=True) as engine:
        backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}]}
        settings = shared(tmp_path, [engine.url], redis_server, backend=backend)
        async with two(settings) as (one, other), connect(one.host, one.port) as holder:
            await holder.send(post(CHAT, body(), bearer()))
            await engine.received(1)
            engine.script = FakeEngine().script
            waiting = asyncio.create_task(ask(other, body(), CHAT, bearer()))
            await until(lambda: other.runtime.gate.waiting == 1, LONG_S)
            begun = asyncio.get_running_loop().time()
            holder.leave("reset")
            reply = await waiting
            assert reply.status == 200
            assert asyncio.get_running_loop().time() - begun < 0.9  # told at once, not at the next sign of life
            assert int(reply.headers["x-tidegate-queue-ms"]) > 0


async def test_without_redis_each_goes_on_with_its_share_and_comes_back(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 60, "burst_s": 20}
    keys = [static(limits=limits), static("b", OTHER)]
    with RedisServer() as redis:
        async with FakeEngine() as engine, two(shared(tmp_path, [engine.url], redis, *keys)) as (one, other):
            assert (await ask(one, body(), CHAT, bearer(OTHER))).headers["x-tidegate-store"] == "redis"
            redis.kill()
            await decided_by("local", one, other)
            begun = asyncio.get_running_loop().time()
            replies = [await ask(gate, body(), CHAT, bearer()) for _ in range(25) for gate in (one, other)]
            took_s = asyncio.get_running_loop().time() - begun
            passed = sum(reply.status == 200 for reply in replies)
            assert {reply.status for reply in replies} == {200, 429}
            assert 18 <= passed <= 22 + took_s  # one burst for both together, not one for each
            redis.start()
            begun = asyncio.get_running_loop().time()
            await decided_by("redis", one, other)
            assert asyncio.get_running_loop().time() - begun < 3.0


async def test_who_runs_and_who_waits_lose_nothing_when_redis_dies_and_returns(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine(hang=True) as engine:
            backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}]}
            settings = shared(tmp_path, [engine.url], redis, backend=backend)
            async with admitting(settings) as gate, connect(gate.host, gate.port) as holder:
                await holder.send(post(CHAT, body(), bearer()))
                await engine.received(1)
                first = asyncio.create_task(ask(gate, body(), CHAT, bearer()))
                second = asyncio.create_task(ask(gate, body(), CHAT, bearer()))
                await until(lambda: gate.runtime.gate.waiting == 2, LONG_S)
                redis.kill()
                await until(lambda: gate.runtime.gate.home.mode == "local", LONG_S)
                assert gate.runtime.gate.waiting == 2
                assert len(engine.requests) == 1  # the place is still taken
                redis.start()
                await until(lambda: gate.runtime.gate.home.mode == "redis", LONG_S)
                engine.script = FakeEngine().script
                holder.leave("reset")
                assert {(await first).status, (await second).status} == {200}
                assert not gate.runtime.gate.visits
                assert len(engine.requests) == 3


async def test_a_place_freed_while_redis_is_away_goes_to_who_waits_here(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine(hang=True) as engine:
            backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}]}
            async with (
                admitting(shared(tmp_path, [engine.url], redis, backend=backend)) as gate,
                connect(gate.host, gate.port) as holder,
            ):
                await holder.send(post(CHAT, body(), bearer()))
                await engine.received(1)
                waiting = asyncio.create_task(ask(gate, body(), CHAT, bearer()))
                await until(lambda: gate.runtime.gate.waiting == 1, LONG_S)
                redis.kill()
                await until(lambda: gate.runtime.gate.home.mode == "local", LONG_S)
                engine.script = FakeEngine().script
                holder.leave("reset")
                assert (await waiting).status == 200


async def test_a_frozen_redis_costs_a_request_its_time_out_and_no_error(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine() as engine:
            key = static(limits={"requests_per_minute": 6000})
            async with admitting(shared(tmp_path, [engine.url], redis, key, timeout_ms=50)) as gate:
                redis.freeze()
                try:
                    took_s = []
                    for _ in range(20):
                        begun = asyncio.get_running_loop().time()
                        assert (await ask(gate, body(), CHAT, bearer())).status == 200
                        took_s.append(asyncio.get_running_loop().time() - begun)
                    assert sorted(took_s)[10] < 0.05  # after five failed calls nothing is waited for
                finally:
                    redis.thaw()
