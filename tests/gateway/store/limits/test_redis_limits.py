"""The limiter in Redis over the real client, the scripts being as they are: clock, keys, callers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import redis

from gateway.store.limits import Budget, Cost, Held, Rate, Scope, Unit
from gateway.store.redis.address import parse_address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.limits import HELD_PER_CALL, RedisLimits
from tests.gateway.store.limits.limiter_halves import START_US, Lua, Unused
from tests.support.redis_server import RedisServer

LEASE_US = 30_000_000


def unix_us() -> int:
    return time.time_ns() // 1000


@pytest.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[RedisClient]:
    made = RedisClient(parse_address(redis_server.url), timeout_s=10.0)  # the machine may be busy
    await made.connect()
    yield made
    await made.aclose()


def three_scopes() -> tuple[Scope, ...]:
    rates = (Rate(Unit.REQUESTS, 600, 100, 100), Rate(Unit.TOTAL, 60_000, 10_000, 10_000))
    budgets = (Budget("d1", 10**9, 0, unix_us() + 5_000_000),)
    return Scope("{a}:key:k", rates, 50, budgets), Scope("{a}:tenant", rates), Scope("{m}:model:x", rates[:1], 80)


async def test_time_is_redis_own(client: RedisClient) -> None:
    limits = RedisLimits(client)
    before_us = unix_us()
    admission = await limits.admit("a", three_scopes(), Cost(), LEASE_US)
    assert before_us - 1000 <= admission.now_us <= unix_us() + 1000
    assert admission.admitted


async def test_a_request_from_admission_to_settlement(client: RedisClient) -> None:
    limits, scopes = RedisLimits(client), three_scopes()
    cost = Cost(1, total=500, micros=70)
    first = await limits.admit("a", scopes, cost, LEASE_US)
    assert await limits.admit("a", scopes, cost, LEASE_US) == first
    await limits.renew([Held("a", scopes, cost)], LEASE_US)
    assert await limits.settle("a", scopes, cost, Cost(1, total=300, micros=50))
    assert not await limits.settle("a", scopes, cost, cost)
    assert not await limits.cancel("a", scopes, cost)
    seen = await limits.admit("b", scopes, Cost(0), LEASE_US)
    assert (seen.in_use, seen.spent_micros) == ((1, 1), (50,))
    assert seen.marks_us[1] - first.now_us == 300_000


async def test_callers_at_once_get_a_burst_and_no_more(client: RedisClient) -> None:
    limits = RedisLimits(client)
    scopes = (Scope("{a}:k", (Rate(Unit.REQUESTS, 1, 50, 50),), 500),)
    answers = await asyncio.gather(*(limits.admit(f"{n}", scopes, Cost(), LEASE_US) for n in range(200)))
    assert sum(answer.admitted for answer in answers) == 50
    assert {refusal.limit for answer in answers for refusal in answer.refusals} == {"requests"}


async def test_many_leases_are_renewed_in_several_calls(client: RedisClient) -> None:
    limits = RedisLimits(client)
    scopes = (Scope("{a}:k", concurrent=1000),)
    held = [Held(f"{n}", scopes, Cost()) for n in range(3 * HELD_PER_CALL + 1)]
    await limits.renew(held, LEASE_US)
    assert (await limits.admit("x", scopes, Cost(), LEASE_US)).in_use == (len(held) + 1,)
    await limits.renew([], LEASE_US)


async def test_every_key_expires_and_bears_the_prefix_and_a_tag(client: RedisClient, redis_server: RedisServer) -> None:
    limits, scopes = RedisLimits(client, "pre"), three_scopes()
    for name in "abcd":
        await limits.admit(name, scopes, Cost(), LEASE_US)
    await limits.settle("a", scopes, Cost(), Cost())
    await limits.cancel("b", scopes, Cost())
    await limits.renew([Held(name, scopes, Cost()) for name in "ce"], LEASE_US)
    with redis_server.client() as reader:
        keys = {key.decode(): reader.pttl(key) for key in reader.scan_iter()}
    assert {f"pre:{{a}}:request:{name}" for name in "abcde"} < set(keys)
    assert len(keys) == 5 + 3 + 2
    assert all(key.startswith(("pre:{a}:", "pre:{m}:")) for key in keys)
    assert all(0 < ttl_ms <= 26 * 3600 * 1000 for ttl_ms in keys.values())
    assert keys["pre:{a}:request:a"] <= 61_000
    assert 30_000 < keys["pre:{m}:model:x:leases"] <= 91_000


def test_a_clock_that_steps_back_is_survived(redis_server: RedisServer) -> None:
    with redis_server.client() as reader:
        lua = Lua(reader)
        scopes = (Scope("{a}:k", (Rate(Unit.REQUESTS, 60, 2, 2),), 2, (Budget("d1", 100, 0, START_US + 10),)),)
        assert lua.admit("a", scopes, Cost(micros=10), LEASE_US, START_US).admitted
        seen = lua.admit("b", scopes, Cost(micros=10), LEASE_US, START_US - 3_600_000_000)
        assert not seen.admitted  # the mark lies an hour further in the future, for an hour
        lua.renew([Held("a", scopes, Cost(micros=10))], LEASE_US, START_US - 3_600_000_000)
        assert lua.settle("a", scopes, Cost(micros=10), Cost(micros=5), START_US - 3_600_000_000)


def test_no_script_asks_for_more_than_its_keys(redis_server: RedisServer) -> None:
    """A user of Redis who may only touch the keys that are named runs every script: what is not in KEYS is refused."""
    with redis_server.client() as reader:
        limits, scopes, cost = RedisLimits(Unused(), "pre"), three_scopes(), Cost(micros=1)
        for script, packed in (
            (limits.admit_script, limits.pack_admit("a", scopes, cost, LEASE_US)),
            (limits.renew_script, limits.pack_renew([Held("a", scopes, cost)], LEASE_US)),
            (limits.settle_script, limits.pack_settle("a", scopes, cost, cost)),
            (limits.cancel_script, limits.pack_cancel("a", scopes, cost)),
        ):
            keys, args = packed
            patterns = [f"~{key}" for key in keys]
            reader.execute_command("ACL", "SETUSER", "narrow", "reset", "on", ">secret", "+@all", *patterns)
            try:
                with redis_server.client(username="narrow", password="secret") as narrow:
                    narrow.execute_command("EVAL", script.text, len(keys), *keys, *args)
            except redis.ResponseError as error:  # pragma: no cover
                pytest.fail(f"{script.name}: {error}")
            finally:
                reader.execute_command("ACL", "DELUSER", "narrow")
