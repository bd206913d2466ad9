"""Pools that grow and shrink under requests that wait: as engines say, as replicas come and go."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway.config import Settings
from routing.types import Replica
from tests.gateway.admission.keyed import admitting
from tests.gateway.admission.outage import HANG, LONG_S, Crowd, Watched, away, call, leave, stands, two, waiting_at
from tests.support.client import until
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving, settings_for

SOON_S = 4.0
"""For what takes a second, on a busy machine."""


def stated(url: str, store: str = "memory") -> Settings:
    """One replica that takes as many as its engine says."""
    backend = {"replicas": [{"url": url}], "queue": {"headroom": 0}}
    redis: dict[str, Any] = {} if store == "memory" else {"redis": {"timeout_ms": 500}}
    return settings_for([url], backend=backend, store=store, **redis)


def replica_of(gate: Serving) -> Replica:
    return gate.runtime.fleet.models["m"].pool.replicas[0]


async def say(requests: int, *gates: Serving) -> None:
    """The engine tells each gateway that it runs so many at once; until a sum over the pool is made anew."""
    for gate in gates:
        replica_of(gate).meter.state(requests, None)
    await until(lambda: all(room_at(gate) == requests for gate in gates))


def room_at(gate: Serving) -> int | None:
    room = gate.runtime.gate.rooms.room(gate.runtime.fleet.models["m"].pool, time.monotonic())
    return None if room is None else room.requests


async def test_a_pool_that_grows_takes_in_who_waits_though_nobody_comes_or_goes() -> None:
    async with Watched() as engine, admitting(stated(engine.url)) as gate, Crowd() as crowd:
        await say(1, gate)
        crowd.send(gate, 20, **HANG)
        await engine.received(1)
        await until(lambda: gate.runtime.gate.waiting == 19, LONG_S)
        await say(16, gate)
        async with asyncio.timeout(SOON_S):
            await engine.received(16)
        await until(lambda: gate.runtime.gate.waiting == 4, LONG_S)
        assert engine.running == engine.peak == 16


async def test_a_pool_that_grows_takes_in_who_waits_at_any_gateway(redis_server: RedisServer) -> None:
    async with Watched() as engine, two(stated(engine.url, redis_server.url)) as both, Crowd() as crowd:
        await say(1, *both)
        crowd.send(both[0], 1, **HANG)
        await engine.received(1)
        crowd.send(both[0], 9, **HANG)
        crowd.send(both[1], 10, **HANG)
        await until(lambda: waiting_at(*both) == 19, LONG_S)
        await say(16, *both)
        async with asyncio.timeout(SOON_S):
            await engine.received(16)
        await stands(both[0], 16, 4)
        assert engine.running == engine.peak == 16


async def test_a_pool_that_grows_while_redis_is_away_takes_in_a_share() -> None:
    with RedisServer() as redis:
        async with Watched() as engine, two(stated(engine.url, redis.url)) as both, Crowd() as crowd:
            await say(2, *both)
            redis.kill()
            await away(*both)
            crowd.send(both[0], 12, **HANG)
            await engine.received(1)
            await until(lambda: waiting_at(*both) == 11, LONG_S)
            await say(16, *both)
            async with asyncio.timeout(SOON_S):
                await engine.received(8)
            await until(lambda: waiting_at(*both) == 4, LONG_S)
            assert engine.running == 8


async def test_a_pool_that_shrinks_is_not_filled_up_again() -> None:
    async with Watched() as engine, admitting(stated(engine.url)) as gate:
        await say(16, gate)
        runners = [asyncio.create_task(call(gate, fake={"ttft_s": 1.0 + number * 0.05})) for number in range(16)]
        await engine.received(16)
        waiters = [asyncio.create_task(call(gate, fake={"ttft_s": 0.05})) for _ in range(24)]
        await until(lambda: gate.runtime.gate.waiting == 24, LONG_S)
        await say(6, gate)
        replies = await asyncio.gather(*runners, *waiters)
        assert {reply.status for reply in replies} == {200}
        assert max(engine.at_begin[16:]) == 6


async def test_a_pool_that_shrinks_is_not_filled_up_again_by_any_gateway(redis_server: RedisServer) -> None:
    async with Watched() as engine, two(stated(engine.url, redis_server.url)) as both:
        await say(16, *both)
        runners = [
            asyncio.create_task(call(both[number % 2], fake={"ttft_s": 1.5 + number * 0.05})) for number in range(16)
        ]
        await engine.received(16)
        waiters = [asyncio.create_task(call(both[number % 2], fake={"ttft_s": 0.05})) for number in range(24)]
        await until(lambda: waiting_at(*both) == 24, LONG_S)
        await say(6, *both)
        replies = await asyncio.gather(*runners, *waiters)
        assert {reply.status for reply in replies} == {200}
        assert max(engine.at_begin[16:]) == 6
        await stands(both[0], 0, 0)


async def test_a_pool_that_shrinks_while_redis_is_away_is_not_filled_up_again() -> None:
    with RedisServer() as redis:
        async with Watched() as engine, admitting(stated(engine.url, redis.url)) as gate, Crowd() as crowd:
            await say(8, gate)
            runners = crowd.send(gate, 8, **HANG)
            await engine.received(8)
            waiters = crowd.send(gate, 6)
            await until(lambda: gate.runtime.gate.waiting == 6, LONG_S)
            redis.kill()
            await away(gate)
            await say(4, gate)
            await leave(runners[:4])
            await until(lambda: len(gate.runtime.gate.visits) == 10, LONG_S)
            await until(lambda: engine.running == 4, LONG_S)
            assert gate.runtime.gate.waiting == 6
            await leave(runners[4:])
            assert {(await waiter).status for waiter in waiters} == {200}


async def test_a_pool_that_nobody_serves_any_more_does_not_keep_its_line_waiting() -> None:
    """Once nothing can be waited for, those in the line are told so by routing, as those that come now are."""
    async with Watched() as engine, admitting(stated(engine.url)) as gate, Crowd() as crowd:
        await say(1, gate)
        crowd.send(gate, 1, **HANG)
        await engine.received(1)
        waiters = crowd.send(gate, 2)
        await until(lambda: gate.runtime.gate.waiting == 2, LONG_S)
        replica_of(gate).draining = True
        async with asyncio.timeout(SOON_S):
            assert {(await waiter).status for waiter in waiters} == {503}


def regional(*urls: str) -> Settings:
    replicas = [
        {"url": url, "region": region, "max_in_flight": 1} for url, region in zip(urls, ("eu", "us"), strict=True)
    ]
    return settings_for(urls, backend={"replicas": replicas})


async def test_who_waits_for_a_replica_of_its_own_region_keeps_nobody_from_the_other() -> None:
    async with (
        Watched() as eu,
        Watched() as us,
        admitting(regional(eu.url, us.url)) as gate,
        Crowd() as crowd,
    ):
        runner = crowd.send(gate, 1, "x-tidegate-region: eu", **HANG)
        await eu.received(1)
        waiter = crowd.send(gate, 1, "x-tidegate-region: eu")[0]  # the pool has a place, its region has none
        await until(lambda: len(gate.runtime.gate.visits) == 2, LONG_S)
        for _ in range(20):
            assert (await call(gate, "x-tidegate-region: us")).status == 200
        assert not waiter.done()
        await leave(runner)
        assert (await waiter).status == 200
        assert int((await waiter).headers["x-tidegate-queue-ms"]) > 0
        assert (eu.peak, us.peak) == (1, 1)
        assert sum((gate.runtime.gate.home.near.standing("pool")).running) == 0
        assert not gate.runtime.gate.visits


async def test_many_who_wait_for_their_region_hold_no_places_of_the_pool(redis_server: RedisServer) -> None:
    async with Watched() as eu, Watched() as us:
        settings = regional(eu.url, us.url).model_copy(update={"store": redis_server.url})
        async with admitting(settings) as gate, Crowd() as crowd:
            crowd.send(gate, 1, "x-tidegate-region: eu", **HANG)
            await eu.received(1)
            waiters = crowd.send(gate, 5, "x-tidegate-region: eu")
            await until(lambda: len(gate.runtime.gate.visits) == 6, LONG_S)
            for _ in range(10):
                assert (await call(gate, "x-tidegate-region: us")).status == 200
            await leave(crowd.tasks[:1])
            assert [(await waiter).status for waiter in waiters] == [200] * 5
            assert eu.peak == 1
            await stands(gate, 0, 0)
