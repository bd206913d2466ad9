"""Experiments 13 and 17: Redis forgets its scripts all the time, a proxy forbids `SCRIPT`, and replies get lost."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import redis

from gateway.store.limits import Cost, Rate, Scope, Unit
from gateway.store.protocol import StoreUnavailable
from loadtests import hammer_runs as runs
from loadtests.hammer_bounds import allowed, overshoot
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import LimitJob, Reach
from loadtests.hammer_runs import Finding, Shape, Target, clock_of
from loadtests.hammer_stores import open_store
from tests.faults.away import AWAY
from tests.faults.conftest import Report
from tests.faults.forms import seconds
from tests.support.redis_proxy import RedisProxy
from tests.support.redis_server import RedisServer

BURST, PER_MINUTE = 500, 6000


@contextlib.contextmanager
def flushing(client: redis.Redis, every_s: float) -> Iterator[list[int]]:
    """`SCRIPT FLUSH` over and over; how often, in the list."""
    count, over = [0], threading.Event()

    def flush() -> None:
        while not over.wait(every_s):
            client.script_flush()
            count[0] += 1

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join(20.0)


def exact(name: str, fault: str, target: Target, shape: Shape) -> Finding:
    """Every admission is decided by Redis, and their number is exact."""
    scope = Scope(runs.fresh_key(), rates=(Rate(Unit.REQUESTS, PER_MINUTE, BURST, BURST),))
    job = LimitJob(target.reach, (scope,), local=(scope,), pause_ms=1.0)
    results, took_us = runs.race(target, job, shape)
    most = allowed(BURST, PER_MINUTE, took_us)
    admitted = runs.events(results)
    over = overshoot([(event.now_us, 1) for event in admitted], BURST, PER_MINUTE)
    away = sum(call.outcome in AWAY for result in results for call in result.calls)
    bad = runs.problems(results)
    return Finding(
        name,
        f"{shape.processes} processes x {shape.tasks} tasks, {PER_MINUTE} requests a minute, burst {BURST}; {fault}",
        f"at most {most}; no call without an answer of Redis",
        f"{len(admitted)} of {runs.asked(results):,} asked; {away} calls without; worst interval {over:+d}",
        BURST <= len(admitted) <= most and over <= 0 and away == 0 and not bad,
        {"admitted": len(admitted), "allowed": most, "away": away, "asked": runs.asked(results), "problems": bad},
    )


def test_13_scripts_are_flushed_a_hundred_times_a_second(
    target: Target, redis_alone: RedisServer, report: Report
) -> None:
    with redis_alone.client() as client, flushing(client, 0.01) as count:
        found = exact("SCRIPT FLUSH", "scripts forgotten 100 times a second", target, Shape(8, 32, seconds(1.5, 10.0)))
    found.figures["flushes"] = count[0]
    report("13", found)
    assert count[0] > 20, "nothing was flushed"


@contextlib.contextmanager
def proxy_thread(server: RedisServer, refuse: set[str]) -> Iterator[str]:
    """A proxy in an event loop of its own; yields its address."""
    started = threading.Event()
    found: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, str]] = []

    async def serve() -> None:
        over = asyncio.Event()
        async with RedisProxy("127.0.0.1", server.port) as proxy:
            proxy.refuse = refuse
            found.append((asyncio.get_running_loop(), over, proxy.url))
            started.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20.0)
    loop, over, url = found[0]
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(20.0)


def test_13_a_proxy_refuses_every_script_command(crew: Crew, redis_alone: RedisServer, report: Report) -> None:
    """As some managed services do; also what tells about a server, which nobody should need."""
    refused = {"SCRIPT", "CONFIG", "CLIENT", "HELLO", "INFO", "COMMAND"}
    with proxy_thread(redis_alone, refused) as url, redis_alone.client() as control:
        target = Target(crew, Reach(url, timeout_s=5.0), clock_of(control))
        report(
            "13",
            exact(
                "SCRIPT refused", "a proxy refuses SCRIPT, CONFIG, CLIENT, HELLO", target, Shape(8, 8, seconds(1.5, 5))
            ),
        )


async def test_17_a_lost_reply_is_charged_once(redis_alone: RedisServer, report: Report) -> None:
    """Every third reply is lost after Redis has done what was asked; whoever asks again with the same id pays once."""
    asked = round(seconds(30, 300))
    rate = Rate(Unit.TOTAL, per_minute=60, burst=1_000_000, largest=1_000_000)
    scopes = (Scope(runs.fresh_key(), rates=(rate,), concurrent=10_000),)
    cost = Cost(total=100)
    lost = same = decided = 0
    async with RedisProxy("127.0.0.1", redis_alone.port) as proxy:
        first, again = open_store(Reach(proxy.url, timeout_s=0.05)), open_store(Reach(redis_alone.url, timeout_s=5.0))
        try:
            await again.client.connect()
            begun_s = time.monotonic()
            for number in range(asked):
                await first.client.connect()
                proxy.drop_replies = number % 3 == 0  # more would open the breaker, and nothing would be sent
                try:
                    answer = await first.limits.admit(f"lost-{number}", scopes, cost, 60_000_000)
                except StoreUnavailable:
                    lost += 1
                    proxy.drop_replies = False
                    seconds_now, micros_now = redis_alone.command("TIME")
                    answer = await again.limits.admit(f"lost-{number}", scopes, cost, 60_000_000)
                    decided += answer.now_us < seconds_now * 1_000_000 + micros_now
                assert answer.admitted, answer
                once_more = await again.limits.admit(f"lost-{number}", scopes, cost, 60_000_000)
                same += once_more.admitted and once_more.marks_us == answer.marks_us
            # Half of them settle, twice, as a gateway does that did not hear the first answer.
            settled = [
                [await again.limits.settle(f"lost-{number}", scopes, cost, Cost(total=50)) for _ in range(2)]
                for number in range(asked // 2)
            ]
            probe = await again.limits.admit("probe", scopes, Cost(total=0), 1_000_000)
            passed_us = (time.monotonic() - begun_s) * 1e6
        finally:
            await first.client.aclose()
            await again.client.aclose()
    charged = (probe.marks_us[0] - probe.now_us) * rate.per_minute / 60e6
    owed = 100 * asked - 50 * (asked // 2)
    refilled = passed_us * rate.per_minute / 60e6 + 1
    report(
        "17",
        Finding(
            "reply lost",
            f"{asked} admissions, the reply to every third one thrown away after Redis had decided, all asked again",
            f"the same answer again; {owed:,} tokens charged, {asked // 2} leases left",
            f"{lost} replies lost, {decided} of them decided before, {same} same answers; "
            f"{charged:,.0f} tokens charged and {refilled:,.0f} refilled, "
            f"{probe.in_use[0] - 1} leases",
            decided == lost >= asked // 3
            and same == asked
            and owed - refilled <= charged <= owed
            and probe.in_use[0] - 1 == asked - asked // 2
            and all(pair == [True, False] for pair in settled),
            {
                "lost": lost,
                "decided_before": decided,
                "same": same,
                "charged": charged,
                "owed": owed,
                "leases": probe.in_use[0] - 1,
            },
        ),
    )


async def test_17_a_cancel_that_overtakes_its_admission_wins(redis_alone: RedisServer) -> None:
    """A gateway gives up waiting and cancels; the admission arrives afterwards and must not charge anybody."""
    scopes = (Scope(runs.fresh_key(), rates=(Rate(Unit.REQUESTS, 60, 10, 10),), concurrent=5),)
    store = open_store(Reach(redis_alone.url, timeout_s=5.0))
    try:
        await store.client.connect()
        await store.limits.cancel("late", scopes, Cost())
        answer = await store.limits.admit("late", scopes, Cost(), 1_000_000)
        assert not answer.admitted
        assert answer.refusals == ()
        after = await store.limits.admit("next", scopes, Cost(), 1_000_000)
        assert after.in_use == (1,)
        assert after.marks_us[0] - after.now_us == 1_000_000
    finally:
        await store.client.aclose()
