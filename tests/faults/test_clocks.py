"""Experiment 18: clocks that are wrong. The gateways' must not matter at all; Redis' own costs one burst at most."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.store.limits import Rate, Scope, Unit
from loadtests import hammer_runs as runs
from loadtests.hammer_bounds import allowed, overshoot
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import ADMITTED, LimitJob, Reach
from loadtests.hammer_runs import Finding, Shape, Target, clock_of
from tests.faults.conftest import Report
from tests.faults.forms import seconds
from tests.support.redis_server import RedisServer, redis_binary
from tests.support.shifted_clock import ShiftedClock

BURST, PER_MINUTE = 200, 12_000


def test_the_shifted_clock_shifts(tmp_path: Path) -> None:
    """Else the two experiments below would show nothing."""
    with ShiftedClock(tmp_path) as clock:
        clock.set(-120.25)
        said = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"],
            env={**os.environ, **clock.environ}, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        wall, monotonic = map(float, said.stdout.split())
        assert wall == pytest.approx(time.time() - 120.25, abs=10)
        assert monotonic == pytest.approx(time.monotonic(), abs=10)


def test_18_gateways_two_minutes_apart_share_a_limit_fairly(
    tmp_path: Path, redis_alone: RedisServer, report: Report
) -> None:
    with ShiftedClock(tmp_path / "ahead") as ahead, ShiftedClock(tmp_path / "behind") as behind:
        ahead.set(120)
        behind.set(-120)
        clocks = (ahead, behind)
        with Crew(lambda number: clocks[number % 2].environ) as crew, redis_alone.client() as control:
            target = Target(crew, Reach(redis_alone.url, timeout_s=5.0), clock_of(control))
            scope = Scope(runs.fresh_key(), rates=(Rate(Unit.REQUESTS, PER_MINUTE, BURST, BURST),))
            job = LimitJob(target.reach, (scope,), pause_ms=2.0)
            results, took_us = runs.race(target, job, Shape(4, 8, seconds(2.0, 10.0)))
    most = allowed(BURST, PER_MINUTE, took_us)
    got = runs.by_process(results)
    sides = got[0] + got[2], got[1] + got[3]
    bad = runs.problems(results)
    over = overshoot([(event.now_us, 1) for event in runs.events(results)], BURST, PER_MINUTE)
    report(
        "18",
        Finding(
            "gateway clocks",
            f"two processes 120 s ahead, two 120 s behind; {PER_MINUTE} requests a minute, burst {BURST}",
            f"at most {most}; each side about half",
            f"{sum(sides)} admitted, {sides[0]} ahead and {sides[1]} behind; worst interval {over:+d}",
            BURST <= sum(sides) <= most and over <= 0 and min(sides) >= 0.3 * sum(sides) and not bad,
            {"admitted": sum(sides), "allowed": most, "ahead": sides[0], "behind": sides[1], "problems": bad},
        ),
    )


def test_18_the_clock_of_redis_is_set(tmp_path: Path, crew: Crew, report: Report) -> None:
    """Forward by 5 s, which is a full burst, and back by 2 s, for which everybody waits."""
    forward_s, back_s = 5.0, 2.0
    with ShiftedClock(tmp_path) as clock:
        binary = clock.wrapper(redis_binary(), tmp_path / "redis-server")
        with RedisServer(binary=binary) as server:
            clock.set(1000.0)
            assert int(server.command("TIME")[0]) == pytest.approx(time.time() + 1000.0, abs=10)
            clock.set(0.0)
            target = Target(crew, Reach(server.url, timeout_s=5.0), lambda: time.time_ns() // 1000)
            set_back_us = 0

            def step() -> None:
                nonlocal set_back_us
                time.sleep(runs.LEAD_S + 0.7)
                clock.set(forward_s)
                time.sleep(1.0)
                clock.set(forward_s - back_s)
                set_back_us = time.monotonic_ns() // 1000

            scope = Scope(runs.fresh_key(), rates=(Rate(Unit.REQUESTS, PER_MINUTE, BURST, BURST),), concurrent=64)
            job = LimitJob(target.reach, (scope,), pause_ms=5.0)
            results, took_us = runs.race(target, job, Shape(4, 8, seconds(4.5, 8.0)), step)
    admitted = sum(runs.by_process(results))
    extra = min(BURST, allowed(0, PER_MINUTE, round(forward_s * 1e6)))
    most = allowed(BURST, PER_MINUTE, took_us) + extra
    again = min(
        (call.at_us for result in results for call in result.calls
         if call.outcome == ADMITTED and call.at_us > set_back_us + 200_000),
        default=2**62,
    )  # fmt: skip
    again_s = (again - set_back_us) / 1e6
    bad = runs.problems(results)
    report(
        "18",
        Finding(
            "clock of Redis",
            f"set forward by {forward_s:g} s, then back by {back_s:g} s; {PER_MINUTE} requests a minute, burst {BURST}",
            f"at most {most}, {extra} of them for the step; admitting again {back_s:g} s after the step back",
            f"{admitted} admitted; again after {again_s:.2f} s",
            BURST < admitted <= most and again_s <= back_s + 1.5 and not bad,
            {"admitted": admitted, "allowed": most, "extra": extra, "again_s": again_s, "problems": bad},
        ),
    )
