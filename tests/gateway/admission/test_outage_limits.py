"""Limits while Redis is away and after it: shares of rates, concurrency and money, and what replies say of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.admission.gate import Gate
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.gateway.admission.keyed import admitting, bearer, static
from tests.gateway.admission.outage import (
    HANG,
    LONG_S,
    Crowd,
    Watched,
    away,
    back,
    call,
    leave,
    limited,
    sooner_or_later,
    two,
)
from tests.support.client import until
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving

CENTS_A_REQUEST = 10
DEAR: dict[str, Any] = {
    "models": {"m": {"backend": "pool", "price": {"input": 0.0, "output": CENTS_A_REQUEST / 100 * 1_000_000 / 16}}}
}
"""The engine answers with 16 tokens."""


async def ask(gate: Serving, **fields: Any) -> Reply:
    return await call(gate, bearer(), max_tokens=16, **fields)


async def passes(gate: Serving, at_most: int, **fields: Any) -> int:
    """Ask until the first refusal; how many went through."""
    for number in range(at_most):
        reply = await ask(gate, **fields)
        if reply.status == 429:
            return number
        assert reply.status == 200, reply
    return at_most


async def accepts(gate: Serving) -> None:
    """Until a request is let in again: places that were given up are told in passing."""

    async def let_in() -> bool:
        return (await ask(gate)).status == 200

    await sooner_or_later(let_in, lambda: "nobody is let in any more")


async def on_record(*gates: Serving) -> None:
    """Until all that was spent at these gateways is in the database, and they know what else is."""
    await until(lambda: not any(gate.runtime.gate.spend.waiting_micros for gate in gates), LONG_S)


async def test_concurrency_is_not_doubled_by_an_outage_nor_by_its_end(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"concurrent_requests": 3})
        async with (
            Watched() as engine,
            admitting(limited(tmp_path, engine.url, redis.url, key)) as gate,
            Crowd() as crowd,
        ):
            runners = crowd.send(gate, 3, bearer(), **HANG)
            await engine.received(3)
            for _ in range(2):
                redis.kill()
                await away(gate)
                assert [(await ask(gate)).status for _ in range(3)] == [429] * 3
                redis.start()
                await back(gate)
                assert [(await ask(gate)).status for _ in range(3)] == [429] * 3
            await leave(runners[:1])
            await accepts(gate)
            crowd.send(gate, 1, bearer(), **HANG)
            await engine.until(lambda: engine.running == 3)
            assert (await ask(gate)).status == 429
            assert engine.peak == 3


async def test_each_gateway_has_its_share_of_concurrency_and_redis_counts_both_afterwards(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"concurrent_requests": 5})
        async with (
            Watched() as engine,
            two(limited(tmp_path, engine.url, redis.url, key)) as both,
            Crowd() as crowd,
        ):
            redis.kill()
            await away(*both)
            for gate in both:
                before = len(engine.requests)
                replies = crowd.send(gate, 4, bearer(), **HANG)
                await engine.received(before + 2)
                await until(lambda tasks=replies: sum(task.done() for task in tasks) == 2, LONG_S)  # type: ignore[misc]
            assert engine.running == 4
            redis.start()
            await back(*both)
            crowd.send(both[0], 1, bearer(), **HANG)
            await engine.received(5)
            assert [(await ask(gate)).status for gate in both] == [429, 429]
            assert engine.peak == 5


async def test_who_runs_at_both_over_a_limit_of_one_keeps_running_and_nobody_else_comes(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"concurrent_requests": 1})
        async with (
            Watched() as engine,
            two(limited(tmp_path, engine.url, redis.url, key)) as both,
            Crowd() as crowd,
        ):
            redis.kill()
            await away(*both)
            for number, gate in enumerate(both, 1):  # everybody has one at least
                crowd.send(gate, 1, bearer(), **HANG)
                await engine.received(number)
                assert (await ask(gate)).status == 429
            redis.start()
            await back(*both)
            assert [(await ask(gate)).status for gate in both] == [429, 429]
            await leave(crowd.tasks[:1])
            await engine.until(lambda: engine.running == 1)
            assert [(await ask(gate)).status for gate in both] == [429, 429]
            await leave(crowd.tasks)
            await accepts(both[0])
            assert len(engine.requests) == 3


async def test_leases_of_a_frozen_redis_are_given_back_by_requests_that_ended_meanwhile(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"concurrent_requests": 2})
        async with (
            Watched() as engine,
            admitting(limited(tmp_path, engine.url, redis.url, key, timeout_ms=100)) as gate,
            Crowd() as crowd,
        ):
            crowd.send(gate, 2, bearer(), **HANG)
            await engine.received(2)
            redis.freeze()
            await away(gate)
            await leave(crowd.tasks)
            await until(lambda: not gate.runtime.gate.visits, LONG_S)
            assert [(await ask(gate)).status for _ in range(3)] == [200] * 3
            redis.thaw()
            await back(gate)
            crowd.send(gate, 2, bearer(), **HANG)
            await engine.until(lambda: engine.running == 2)
            assert (await ask(gate)).status == 429


class Tap(list[bytes]):
    """What a proxy keeps of what clients say; from the first of it with this mark in it no more answers come."""

    def __init__(self, proxy: RedisProxy, mark: str) -> None:
        super().__init__()
        self.heard = False
        self._proxy = proxy
        self._mark = mark.encode()

    def append(self, data: bytes) -> None:
        if self._mark in data:
            self.heard = self._proxy.drop_replies = True


async def test_leases_that_redis_renews_unheard_are_given_back(tmp_path: Path) -> None:
    """Who ends after a renewal of which nobody knows whether Redis heard it may have a lease there."""
    with RedisServer() as redis:
        key = static(limits={"concurrent_requests": 4})
        async with (
            Watched() as engine,
            RedisProxy("127.0.0.1", redis.port) as proxy,
            admitting(limited(tmp_path, engine.url, proxy.url, key, timeout_ms=300)) as gate,
            Crowd() as crowd,
        ):
            proxy.drop_commands = True
            await away(gate)
            crowd.send(gate, 4, bearer(), **HANG)
            await engine.received(4)
            tap = Tap(proxy, ":leases")  # by script or by name: what is said of leases now is the renewal
            proxy.writes, proxy.keep, proxy.drop_commands = tap, True, False
            proxy.cut()
            await until(lambda: tap.heard, LONG_S)
            await away(gate)
            await leave(crowd.tasks)
            await engine.until(lambda: engine.running == 0)
            proxy.keep = proxy.drop_replies = False
            proxy.cut()
            await back(gate)
            again = crowd.send(gate, 4, bearer(), **HANG)
            await until(lambda: engine.running == 4 or any(task.done() for task in again), LONG_S)
            assert engine.running == 4
            assert (await ask(gate)).status == 429


async def test_tokens_are_shared_out_and_not_given_twice(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"output_tokens_per_minute": 960, "burst_s": 60})
        async with FakeEngine(prompt_tokens=1) as engine, two(limited(tmp_path, engine.url, redis.url, key)) as both:
            redis.kill()
            await away(*both)
            begun = asyncio.get_running_loop().time()
            passed = [await passes(gate, 60) for gate in both]
            took_s = asyncio.get_running_loop().time() - begun
            for each in passed:  # 16 tokens each, 480 at each gateway, and half a request a second
                assert 29 <= each <= 31 + took_s / 2


async def test_what_is_said_to_remain_is_what_this_gateway_will_let_through(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"requests_per_minute": 60, "burst_s": 40})
        async with FakeEngine() as engine, two(limited(tmp_path, engine.url, redis.url, key)) as both:
            redis.kill()
            await away(*both)
            begun = asyncio.get_running_loop().time()
            first = await ask(both[0])
            assert first.headers["x-tidegate-store"] == "local"
            remaining = int(first.headers["x-ratelimit-remaining-requests"])
            assert remaining == 19
            passed = await passes(both[0], 60)
            took_s = asyncio.get_running_loop().time() - begun
            assert remaining <= passed <= remaining + 1 + took_s / 2


async def test_a_reply_says_local_when_redis_was_too_late_for_its_request(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"requests_per_minute": 6000})
        async with (
            FakeEngine() as engine,
            admitting(limited(tmp_path, engine.url, redis.url, key, timeout_ms=100)) as gate,
        ):
            assert (await ask(gate)).headers["x-tidegate-store"] == "redis"
            redis.freeze()
            reply = await ask(gate)  # the first: the breaker is closed
            redis.thaw()
            assert (reply.status, reply.headers["x-tidegate-store"]) == (200, "local")

            async def far_again() -> bool:
                return (await ask(gate)).headers["x-tidegate-store"] == "redis"

            await sooner_or_later(far_again, lambda: "Redis is not asked again")


async def test_requests_that_redis_heard_of_too_late_are_charged_once(tmp_path: Path) -> None:
    """It carries them out when it thaws, after they were taken back."""
    with RedisServer() as redis:
        key = static(limits={"requests_per_minute": 60, "burst_s": 30, "concurrent_requests": 3})
        async with (
            FakeEngine() as engine,
            admitting(limited(tmp_path, engine.url, redis.url, key, timeout_ms=100)) as gate,
        ):
            begun = asyncio.get_running_loop().time()
            redis.freeze()
            replies = await asyncio.gather(*(ask(gate) for _ in range(3)))
            assert [reply.status for reply in replies] == [200] * 3
            redis.thaw()
            await away_or_not(gate)
            await until(lambda: not gate.runtime.gate.home.untold, LONG_S)
            reply = await ask(gate)
            took_s = asyncio.get_running_loop().time() - begun
            assert reply.headers["x-tidegate-store"] == "redis"
            # Of Redis' burst nothing, of this process' share three were taken: neither is less than it was.
            assert 26 <= int(reply.headers["x-ratelimit-remaining-requests"]) <= 29 + took_s
            assert reply.status == 200


async def away_or_not(gate: Serving) -> None:
    """Until the present mode is Redis, and it answers."""
    await back(gate)

    async def answers() -> bool:
        return (await ask(gate)).headers["x-tidegate-store"] == "redis"

    await sooner_or_later(answers, lambda: "Redis is not asked again")


# -- money


async def test_a_gateway_alone_spends_the_whole_budget_over_an_outage_and_no_more(tmp_path: Path) -> None:
    """Twice ten cents before it, once over its begin, twice in it; so five more, whatever was settled when."""
    with RedisServer() as redis:
        key = static(limits={"usd_per_day": 1.0})
        async with (
            FakeEngine(prompt_tokens=1) as engine,
            admitting(limited(tmp_path, engine.url, redis.url, key, **DEAR)) as gate,
            Crowd() as crowd,
        ):
            assert await passes(gate, 2) == 2
            await on_record(gate)
            over = crowd.send(gate, 1, bearer(), max_tokens=16, fake={"ttft_s": 2.5})
            await engine.received(3)
            redis.kill()
            await away(gate)
            assert await passes(gate, 2) == 2
            assert (await over[0]).status == 200
            await on_record(gate)  # Redis has lost its count: what was not written yet would be spent again
            redis.start()
            await back(gate)
            assert await passes(gate, 20) == 5
            refused = await ask(gate)
            assert refused.json["error"]["code"] == "insufficient_quota"


async def test_a_request_settled_while_redis_is_frozen_is_paid_once_though_others_read_it_from_the_record(
    tmp_path: Path,
) -> None:
    """Redis keeps the reservation; the record has the money before Redis hears of the settlement."""
    with RedisServer() as redis:
        key = static(limits={"usd_per_day": 1.0})
        async with (
            FakeEngine(prompt_tokens=1) as engine,
            RedisProxy("127.0.0.1", redis.port) as proxy,
            admitting(limited(tmp_path, engine.url, redis.url, key, **DEAR)) as one,
            admitting(limited(tmp_path, engine.url, proxy.url, key, timeout_ms=100, **DEAR)) as other,
        ):
            assert await passes(one, 1) == 1
            async with Crowd() as crowd:
                over = crowd.send(other, 3, bearer(), max_tokens=16, fake={"ttft_s": 1.0})
                await engine.received(4)
                proxy.drop_replies = proxy.drop_commands = True
                await away(other)
                assert [(await task).status for task in over] == [200] * 3
            await on_record(other)
            assert await passes(one, 1) == 1  # and this one's next batch reads it there
            await on_record(one)
            assert await passes(one, 1) == 1
            proxy.drop_replies = proxy.drop_commands = False
            proxy.cut()
            await back(other)
            await until(lambda: not other.runtime.gate.home.untold, LONG_S)
            assert sum([await passes(one, 2), await passes(other, 20)]) == 4  # ten in all
            assert len(engine.requests) == 10


async def test_two_gateways_share_what_is_left_of_a_budget(tmp_path: Path) -> None:
    with RedisServer() as redis:
        key = static(limits={"usd_per_day": 2.0})
        async with (
            FakeEngine(prompt_tokens=1) as engine,
            two(limited(tmp_path, engine.url, redis.url, key, **DEAR)) as both,
        ):
            for gate in both:
                assert await passes(gate, 4) == 4
            await on_record(*both)
            redis.kill()
            await away(*both)
            spent = sum([await passes(gate, 40) for gate in both])
            # 1.20 USD are left, 60 cents for each by what is on record; what is written meanwhile is shared anew.
            assert 10 <= spent <= 12 + 4
            redis.start()
            await back(*both)
            total = 8 + spent
            for _ in range(2):  # each reads what the other has spent when it writes down something itself
                await on_record(*both)
                total += sum([await passes(gate, 1) for gate in both])
            await on_record(*both)
            total += sum([await passes(gate, 40) for gate in both])
            assert 20 <= total <= 24


async def test_a_second_outage_knows_what_was_spent_since_the_first(tmp_path: Path) -> None:
    """Nothing of an earlier outage's shares stays: what counts is what is on record now."""
    with RedisServer() as redis:
        key = static(limits={"usd_per_day": 2.0})
        async with (
            FakeEngine(prompt_tokens=1) as engine,
            two(limited(tmp_path, engine.url, redis.url, key, **DEAR)) as both,
        ):
            passed = 0
            for _ in range(2):
                redis.kill()
                await away(*both)
                passed += await passes(both[0], 4)
                redis.start()
                await back(*both)
                passed += await passes(both[0], 2)
            assert passed == 12  # a share of one dollar each in the first outage, and of 1.40 in the second
            await on_record(both[0])
            assert await passes(both[0], 20) == 8


# -- how many share


async def test_a_share_does_not_grow_as_soon_as_another_gateway_is_not_heard_of(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with FakeEngine() as engine:
            settings = limited(tmp_path, engine.url, redis.url)
            async with admitting(settings) as one:
                async with admitting(settings):
                    await until(lambda: one.runtime.gate.home.gateways == 2, LONG_S)
                home = one.runtime.gate.home
                assert home.far is not None
                far = home.far
                redis.empty()

                async def alone() -> bool:
                    return (await far.store.beat(home.gateway, 3.0)).live == 1

                await sooner_or_later(alone, lambda: "another gateway is still counted")
                for _ in range(2):  # it has heard that it is alone
                    await home_beats(one.runtime.gate)
                assert home.gateways == 2


async def home_beats(gate: Gate) -> None:
    """One sign of life more, out of turn."""
    await gate.home.beat(asyncio.get_running_loop().time())


@pytest.mark.parametrize("workers", [1, 4])
async def test_a_share_is_never_more_than_that_of_one_worker(tmp_path: Path, workers: int) -> None:
    from gateway.admission.opening import Admission
    from gateway.config import Settings

    with RedisServer() as redis:
        settings: Settings = limited(tmp_path, "http://127.0.0.1:9", redis.url)
        admission = Admission(settings, workers=workers)
        await admission.start()
        try:
            home = admission.gate.home
            await until(lambda: home.mode == "redis", LONG_S)
            await home_beats(admission.gate)
            assert home.gateways == workers
            redis.kill()
            await until(lambda: home.mode == "local", LONG_S)
            assert home.gateways == workers
        finally:
            await admission.aclose()
            await admission.store.aclose()
