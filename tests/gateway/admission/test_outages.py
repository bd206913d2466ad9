"""Places and lines while Redis goes away and returns, by real processes of it: killed, frozen, slow.

What counts is what the engine sees: never more at once than the pool has places, and everybody served in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.gateway.admission.keyed import admitting
from tests.gateway.admission.outage import (
    HANG,
    LONG_S,
    Crowd,
    Watched,
    away,
    back,
    call,
    leave,
    queueing,
    standing,
    stands,
    two,
    waiting_at,
)
from tests.support.client import until
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving

LATE_S = 0.06


class Trouble:
    """A Redis behind a proxy, and two opposite things that can be done to it."""

    def __init__(self, kind: str, redis: RedisServer, proxy: RedisProxy) -> None:
        doings: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "killed": (redis.kill, redis.start),
            "frozen": (redis.freeze, redis.thaw),
            "slow": (self._slow, self._quick),
            "mute": (self._mute, self._speak),
        }
        self.begin, self.end = doings[kind]
        self.url = proxy.url
        self._proxy = proxy

    def _slow(self) -> None:
        self._proxy.delay_s = LATE_S

    def _quick(self) -> None:
        self._proxy.delay_s = 0.0

    def _mute(self) -> None:
        self._proxy.drop_replies = True

    def _speak(self) -> None:
        self._proxy.drop_replies = False
        self._proxy.cut()


@asynccontextmanager
async def troubled(kind: str) -> AsyncIterator[Trouble]:
    with RedisServer() as redis:
        async with RedisProxy("127.0.0.1", redis.port) as proxy:
            yield Trouble(kind, redis, proxy)


async def always_busy(gates: tuple[Serving, ...], clients: int, stop: asyncio.Event) -> dict[int, int]:
    """So many clients, each of which sends its next request when it has its answer; how often each status came."""
    statuses: dict[int, int] = {}

    async def one(gate: Serving) -> None:
        while not stop.is_set():
            status = (await call(gate)).status
            statuses[status] = statuses.get(status, 0) + 1

    await asyncio.gather(*(one(gates[number % len(gates)]) for number in range(clients)))
    return statuses


@pytest.mark.parametrize("kind", ["killed", "frozen", "slow", "mute"])
async def test_a_busy_pool_is_never_overfull_in_two_outages_in_a_row(kind: str) -> None:
    async with (
        troubled(kind) as trouble,
        Watched(ttft_s=0.02) as engine,
        admitting(queueing(engine.url, trouble.url, 4, timeout_ms=50)) as gate,
    ):
        stop = asyncio.Event()
        load = asyncio.create_task(always_busy((gate,), 12, stop))
        for _ in range(2):
            await engine.received(len(engine.requests) + 20)
            trouble.begin()
            await away(gate)
            await engine.received(len(engine.requests) + 20)
            trouble.end()
            await back(gate)
        await engine.received(len(engine.requests) + 20)
        stop.set()
        assert (await load).keys() == {200}
        assert engine.peak == 4
        await stands(gate, 0, 0)
        assert not gate.runtime.gate.visits
        assert not gate.runtime.gate.waiting


async def test_one_late_answer_does_not_let_in_more_than_there_are_places() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 4, timeout_ms=200)) as gate,
            Crowd() as crowd,
        ):
            runners = crowd.send(gate, 4, **HANG)
            await engine.received(4)
            waiters = []
            for number in range(1, 4):
                redis.freeze()
                waiters += crowd.send(gate)
                await until(lambda count=number: gate.runtime.gate.waiting == count, LONG_S)  # type: ignore[misc]
                redis.thaw()
                await stands(gate, 4, number)  # it is told to Redis, and answers in a row are counted anew
            assert engine.running == engine.peak == 4
            await leave(runners)
            assert {(await waiter).status for waiter in waiters} == {200}
            await stands(gate, 0, 0)


async def test_who_asks_while_redis_is_frozen_waits_for_real_and_is_served_after_it_thaws() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 1, timeout_ms=100)) as gate,
            Crowd() as crowd,
        ):
            runner = crowd.send(gate, 1, **HANG)
            await engine.received(1)
            redis.freeze()
            waiters = crowd.send(gate, 6)  # Redis will find their questions, after they were taken back
            await until(lambda: gate.runtime.gate.waiting == 6, LONG_S)
            await away(gate)
            redis.thaw()
            await back(gate)
            await stands(gate, 1, 6)
            assert engine.peak == 1
            await leave(runner)
            newcomer = crowd.send(gate)
            assert [(await waiter).status for waiter in waiters + newcomer] == [200] * 7
            await stands(gate, 0, 0)


async def test_the_places_of_two_gateways_are_not_granted_twice_in_two_outages_in_a_row() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            two(queueing(engine.url, redis.url, 2)) as (one, other),
            Crowd() as crowd,
        ):
            runners = crowd.send(one, 1, **HANG)
            await engine.received(1)
            runners += crowd.send(other, 1, **HANG)
            await engine.received(2)
            waiters = crowd.send(one, 4) + crowd.send(other, 4)
            await until(lambda: waiting_at(one, other) == 8, LONG_S)
            for _ in range(2):
                redis.kill()
                await away(one, other)
                assert (waiting_at(one, other), engine.running) == (8, 2)
                redis.start()
                await back(one, other)
                await stands(one, 2, 8)
                assert engine.peak == 2
            await leave(runners)
            assert [(await waiter).status for waiter in waiters] == [200] * 8
            await stands(one, 0, 0)


async def test_a_place_taken_in_an_outage_is_known_to_the_other_gateway_after_it() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            two(queueing(engine.url, redis.url, 2)) as (one, other),
            Crowd() as crowd,
        ):
            redis.kill()
            await away(one, other)
            crowd.send(one, 1, **HANG)
            await engine.received(1)
            crowd.send(other, 1, **HANG)
            await engine.received(2)
            waiter = crowd.send(one, 1)  # one of two places is this gateway's
            await until(lambda: waiting_at(one) == 1, LONG_S)
            redis.start()
            await back(one, other)
            late = crowd.send(other, 1)
            await stands(other, 2, 2)
            assert engine.peak == 2
            await leave(crowd.tasks[:2])
            assert [(await waiter[0]).status, (await late[0]).status] == [200, 200]


async def test_who_is_back_first_does_not_take_the_places_of_who_is_not_yet() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            RedisProxy("127.0.0.1", redis.port) as proxy,
            admitting(queueing(engine.url, redis.url, 2)) as one,
            admitting(queueing(engine.url, proxy.url, 2)) as other,
            Crowd() as crowd,
        ):
            await until(lambda: one.runtime.gate.home.gateways == 2, LONG_S)
            for number, gate in enumerate((one, other), 1):
                crowd.send(gate, 1, **HANG)
                await engine.received(number)
            waiters = crowd.send(one, 2)
            await until(lambda: waiting_at(one) == 2, LONG_S)
            proxy.refusing_connections = True
            redis.kill()
            await away(one, other)
            redis.start()
            await stands(one, 1, 0)  # it has carried its own there
            assert engine.peak == 2
            proxy.refusing_connections = False
            await back(one, other)
            await stands(one, 2, 2)
            assert engine.peak == 2
            await leave(crowd.tasks[:2])
            assert [(await waiter).status for waiter in waiters] == [200, 200]


async def test_the_line_keeps_its_order_over_outages() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 1)) as gate,
            Crowd() as crowd,
        ):
            runner = crowd.send(gate, 1, **HANG)
            await engine.received(1)
            names: list[str] = []

            async def join(name: str) -> None:
                names.append(name)
                crowd.send(gate, 1, user=name)
                await until(lambda: gate.runtime.gate.waiting == len(names), LONG_S)

            for name in ("first", "second", "third"):
                await join(name)
            redis.kill()
            await away(gate)
            await join("in the outage")
            redis.start()
            await back(gate)
            await join("after it")
            await leave(runner)
            await asyncio.gather(*crowd.tasks[1:])
            assert engine.notes()[1:] == names


async def test_everybody_is_in_redis_when_it_decides_again() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 130)) as gate,
            Crowd() as crowd,
        ):
            redis.kill()
            await away(gate)
            crowd.send(gate, 130, **HANG)  # more than are told in one go
            await engine.received(130)
            crowd.send(gate, 110, **HANG)
            await until(lambda: gate.runtime.gate.waiting == 110, LONG_S)
            redis.start()
            await back(gate)
            with redis.client() as client:  # blocks this loop: nothing is put there in between
                held = client.hlen("tidegate:{pool:pool}:held")
                queued = client.hlen("tidegate:{pool:pool}:queued")
            assert (held, queued) == (130, 110)
            assert engine.peak == 130


async def test_one_that_finds_no_place_in_the_line_on_the_return_is_told_so() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            two(queueing(engine.url, redis.url, 2, queue={"max_waiting": 2})) as (one, other),
            Crowd() as crowd,
        ):
            redis.kill()
            await away(one, other)
            for number, gate in enumerate((one, other), 1):
                crowd.send(gate, 1, **HANG)
                await engine.received(number)
            waiters = crowd.send(one, 2) + crowd.send(other, 2)
            await until(lambda: waiting_at(one, other) + sum(task.done() for task in waiters) == 4, LONG_S)
            redis.start()
            await back(one, other)
            await until(lambda: sum(task.done() for task in waiters) == 2, LONG_S)  # there is room for two to wait
            refused = [task.result() for task in waiters if task.done()]
            assert [(reply.status, reply.json["error"]["code"]) for reply in refused] == [(503, "overloaded")] * 2
            await stands(one, 2, 2)
            await leave(crowd.tasks[:2])
            assert sorted([(await waiter).status for waiter in waiters]) == [200, 200, 503, 503]


async def test_a_client_that_leaves_in_an_outage_leaves_nothing_behind() -> None:
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 2, timeout_ms=100)) as gate,
            Crowd() as crowd,
        ):
            crowd.send(gate, 2, **HANG)
            await engine.received(2)
            crowd.send(gate, 2)
            await stands(gate, 2, 2)
            redis.freeze()  # so that Redis remembers them all
            await away(gate)
            crowd.send(gate, 2)
            await until(lambda: gate.runtime.gate.waiting == 4, LONG_S)
            running, waiting, local = crowd.tasks[:2], crowd.tasks[2:4], crowd.tasks[4:]
            await leave([waiting[0], local[0]])
            await until(lambda: gate.runtime.gate.waiting == 2, LONG_S)
            await leave([running[0]])
            assert (await waiting[1]).status == (await local[1]).status == 200
            redis.thaw()
            await back(gate)
            await stands(gate, 1, 0)
            assert len(engine.requests) == 4


async def test_a_redis_that_comes_after_the_gateway_is_told_who_runs_and_grants_to_who_waits() -> None:
    with RedisServer() as redis:
        redis.kill()
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 1)) as one,
            admitting(queueing(engine.url, redis.url, 1)) as other,
            Crowd() as crowd,
        ):
            assert one.runtime.gate.home.mode == other.runtime.gate.home.mode == "local"
            crowd.send(one, 1, **HANG)
            await engine.received(1)
            waiter = crowd.send(one, 1)
            await until(lambda: waiting_at(one) == 1, LONG_S)
            redis.start()
            await back(one, other)
            await stands(one, 1, 1)
            newcomer = crowd.send(other, 1)
            await stands(other, 1, 2)
            assert engine.peak == 1
            await leave(crowd.tasks[:1])
            assert (await waiter[0]).status == (await newcomer[0]).status == 200


async def test_a_redis_that_loses_its_data_and_is_back_at_once_grants_no_place_twice() -> None:
    """As a replica that became the master without having heard of anything: nobody noticed that it was away."""
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 2)) as gate,
            Crowd() as crowd,
        ):
            crowd.send(gate, 2, **HANG)
            await engine.received(2)
            waiter = crowd.send(gate, 1)
            await until(lambda: gate.runtime.gate.waiting == 1, LONG_S)
            redis.command("FLUSHALL")
            await stands(gate, 2, 1)
            assert engine.peak == 2
            await leave(crowd.tasks[:1])
            assert (await waiter[0]).status == 200


async def test_with_every_answer_late_a_request_is_decided_here_and_the_pool_is_kept() -> None:
    async with troubled("slow") as trouble:
        trouble.begin()
        async with (
            Watched(ttft_s=0.02) as engine,
            admitting(queueing(engine.url, trouble.url, 3, timeout_ms=50)) as gate,
        ):
            replies = await asyncio.gather(*(call(gate) for _ in range(40)))
            assert {reply.status for reply in replies} == {200}
            assert {reply.headers["x-tidegate-store"] for reply in replies} == {"local"}
            assert engine.peak == 3
            trouble.end()
            await back(gate)
            await stands(gate, 0, 0)
            assert (await call(gate)).headers["x-tidegate-store"] == "redis"


async def test_two_busy_gateways_run_no_more_than_their_shares_in_an_outage_and_all_places_after_it() -> None:
    with RedisServer() as redis:
        async with Watched(ttft_s=0.02) as engine, two(queueing(engine.url, redis.url, 4)) as both:
            stop = asyncio.Event()
            load = asyncio.create_task(always_busy(both, 16, stop))
            await engine.received(40)
            assert engine.peak <= 4
            redis.kill()
            await away(*both)
            calm = len(engine.requests) + 40  # those of before have ended by then
            await engine.received(calm + 40)
            assert max(engine.at_begin[calm:]) <= 4
            redis.start()
            await back(*both)
            back_at = len(engine.requests)
            await engine.received(back_at + 80)
            stop.set()
            assert (await load).keys() == {200}
            assert max(engine.at_begin[back_at + 40 :]) == 4
            assert max(engine.at_begin) <= 6  # who held three of four when Redis went keeps them
            await stands(both[0], 0, 0)
            assert await standing(both[1]) == (0, 0)


async def test_a_pool_of_an_idle_engine_is_not_overfull_at_the_moment_that_redis_dies() -> None:
    """Nobody waits, all places are taken: the first that asks afterwards has to wait."""
    with RedisServer() as redis:
        async with (
            Watched() as engine,
            admitting(queueing(engine.url, redis.url, 3)) as gate,
            Crowd() as crowd,
        ):
            runners = crowd.send(gate, 3, **HANG)
            await engine.received(3)
            redis.kill()
            waiters = crowd.send(gate, 2)  # the breaker is still closed
            await until(lambda: gate.runtime.gate.waiting == 2, LONG_S)
            await away(gate)
            waiters += crowd.send(gate, 2)
            await until(lambda: gate.runtime.gate.waiting == 4, LONG_S)
            assert engine.peak == 3
            await leave(runners)
            assert {(await waiter).status for waiter in waiters} == {200}
