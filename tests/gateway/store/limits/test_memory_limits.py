"""What only the limiter in memory has to prove: that it stays small, goes by one clock, and keeps to the protocol."""

from __future__ import annotations

import time

from gateway.store.limits import Budget, Cost, Held, Limits, Rate, Scope, Unit
from gateway.store.memory_limits import MAX_PLANS, RECORD_US, TOMBSTONE_US, Limiter, MemoryLimits
from tests.gateway.store.limits.limiter_halves import START_US as T

SECOND_US = 1_000_000


def scope(key: str) -> tuple[Scope, ...]:
    return (Scope(key, (Rate(Unit.REQUESTS, 60, 10, 10),), 5, (Budget("d1", 1000, 0, T + 10 * SECOND_US),)),)


def test_idle_scopes_and_ended_requests_are_forgotten_while_others_come() -> None:
    limiter = Limiter()
    largest = 0
    for number in range(20_000):
        now_us = T + number * SECOND_US  # each scope is idle after ten seconds
        scopes = scope(f"user-{number}")
        assert limiter.admit(f"{number}", scopes, Cost(micros=1), 5 * SECOND_US, now_us).admitted
        assert limiter.settle(f"{number}", scopes, Cost(micros=1), Cost(), now_us)
        largest = max(largest, len(limiter))
    assert largest < 250  # 60 tombstones, 10 scopes, and what has not been looked at yet


def test_a_crowd_of_scopes_is_forgotten_while_one_goes_on() -> None:
    limiter = Limiter()
    for number in range(5000):
        limiter.admit(f"{number}", scope(f"user-{number}"), Cost(), SECOND_US, T)
    assert len(limiter) == 10_000
    one = scope("one")
    for step in range(200):
        now_us = T + RECORD_US + step * SECOND_US
        limiter.admit(f"one-{step}", one, Cost(), SECOND_US, now_us)
        limiter.settle(f"one-{step}", one, Cost(), Cost(), now_us)
    assert len(limiter) <= 1 + TOMBSTONE_US // SECOND_US + 1


def test_admissions_that_nobody_settles_are_forgotten_after_a_day() -> None:
    limiter = Limiter()
    scopes = (Scope("a", (Rate(Unit.REQUESTS, 60_000_000, 1_000_000, 1_000_000),)),)
    for number in range(3000):
        limiter.admit(f"{number}", scopes, Cost(), SECOND_US, T + number)
    limiter.admit("x", scopes, Cost(), SECOND_US, T + 2 * RECORD_US)
    assert len(limiter) <= 2


def test_an_id_that_is_cancelled_again_after_a_minute_is_kept_once() -> None:
    limiter = Limiter()
    for minute in range(5):
        assert not limiter.cancel("a", (), Cost(), T + minute * TOMBSTONE_US)
        assert len(limiter) == 1
    assert not limiter.admit("a", (), Cost(), SECOND_US, T + 5 * TOMBSTONE_US - 1).admitted
    assert limiter.admit("a", (), Cost(), SECOND_US, T + 5 * TOMBSTONE_US).admitted


def test_time_that_goes_back_stands_still() -> None:
    limiter = Limiter()
    scopes = (Scope("a", (Rate(Unit.REQUESTS, 60, 1, 1),)),)
    assert limiter.admit("a", scopes, Cost(), SECOND_US, T).admitted
    assert limiter.admit("b", scopes, Cost(), SECOND_US, T - 5 * SECOND_US).refusals[0].wait_us == SECOND_US


def test_more_plans_than_are_kept_and_scopes_in_a_list_are_no_trouble() -> None:
    limiter = Limiter()
    for number in range(MAX_PLANS + 10):
        assert limiter.admit(f"{number}", [Scope("a", concurrent=100_000)], Cost(), SECOND_US, T).in_use == (
            number + 1,
        )
    for number in range(MAX_PLANS + 10):
        assert limiter.admit(f"x{number}", (Scope("b", concurrent=100_000),), Cost(), SECOND_US, T).admitted


async def test_the_protocol_on_the_clock_of_the_machine() -> None:
    limits: Limits = MemoryLimits()
    scopes = scope("a")
    admission = await limits.admit("a", scopes, Cost(micros=5), 60 * SECOND_US)
    assert abs(admission.now_us - time.time() * 1e6) < 60 * SECOND_US
    await limits.renew([Held("a", scopes, Cost(micros=5))], SECOND_US)
    assert await limits.settle("a", scopes, Cost(micros=5), Cost(micros=5))
    assert not await limits.cancel("a", scopes, Cost(micros=5))
