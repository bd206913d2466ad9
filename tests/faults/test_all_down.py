"""Experiment 8: every replica is down, two thousand clients come back again and again, and then one replica returns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from loadtests.hammer_runs import Finding
from loadtests.served_log import Line
from tests.faults.conftest import Report
from tests.faults.crowd import tell
from tests.faults.forms import LONG
from tests.faults.rig import Rig, rig

CLIENTS = 2000 if LONG else 200
ROOM = 32 if LONG else 16
SERVICE_S = 0.2 if LONG else 0.1
DOWN_S = 60.0 if LONG else 2.0
BEFORE_S = 10.0 if LONG else 3.0
AFTER_S = 40.0 if LONG else 5.0
BACK_WITHIN_S = 30.0 if LONG else 4.0
WINDOW_S = 2
SHARE = 0.8
DEADLINE_MS = 5000
LATE_S = 0.25
"""After its deadline a request may still be on its way through two busy cores."""
EDGE_S = 5.0 if LONG else 0.8
"""Around its death and its return it is not sure whether the replica is there."""


async def client(found: Rig, number: int, over: asyncio.Event) -> None:
    """Asks, and asks again when it was told to, as the SDKs do: `Retry-After` and some jitter."""
    rng = Random(number)
    await asyncio.sleep(rng.random())
    while not over.is_set():
        mark = f"{number}-{len(found.crowd.answers)}"
        answer = found.crowd.ask(found.body(fake={"mark": mark}), f"x-tidegate-deadline-ms: {DEADLINE_MS}")
        await answer.ended.wait()
        if answer.state != "completed":
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")) * (1 + 0.3 * rng.random()))


def most_at_once(log: list[Line], since_s: float) -> int:
    """Requests that a replica had at the same time."""
    steps = [(line.at_s, 1 if line.event == "received" else -1) for line in log if line.at_s >= since_s]
    at_once = most = 0
    for _, step in sorted(steps):
        at_once += step
        most = max(most, at_once)
    return most


def per_s(log: list[Line], since_s: float, until_s: float) -> list[float]:
    """Answers a second, over each window of two seconds that begins with a whole one."""
    found = Counter(int(line.at_s - since_s) for line in log if line.event == "answered" and line.at_s >= since_s)
    seconds = int(until_s - since_s)
    return [sum(found[s + n] for n in range(WINDOW_S)) / WINDOW_S for s in range(seconds - WINDOW_S + 1)]


def expired(log: list[Line], usage: list[dict[str, Any]]) -> int:
    """Requests that a replica got after their deadline, which begins when the gateway begins to read them."""
    wall_s = time.time() - time.monotonic()
    until_s = {record["id"]: record["time_unix_s"] - wall_s + DEADLINE_MS / 1000 for record in usage}
    return sum(line.event == "received" and line.at_s > until_s.get(line.id, line.at_s) + LATE_S for line in log)


async def test_8_a_replica_that_returns_to_two_thousand_clients_is_not_run_over(tmp_path: Path, report: Report) -> None:
    script = {"delay_head_s": SERVICE_S, "chunks": 5}
    health = {"probe_interval_s": 1, "timeout_s": 1}
    over = asyncio.Event()
    async with rig(tmp_path, script=script, replica={"max_in_flight": ROOM}, backend={"health": health}) as found:
        one, other = found.replicas
        found.spared_mb *= 4
        other.kill()
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(client(found, number, over))
            await asyncio.sleep(BEFORE_S)
            down_s = one.kill()
            await asyncio.sleep(DOWN_S)
            await one.start()
            up_s = time.monotonic()
            await asyncio.sleep(AFTER_S)
            over.set()
        bad = await found.judge()
        usage = found.usage()
    log = one.log
    peak = max(per_s(log, began_s + 1.0, down_s))
    curve = per_s(log, up_s, up_s + AFTER_S)
    back_s = next((number + WINDOW_S for number, each in enumerate(curve) if each >= SHARE * peak), float("inf"))
    later = statistics.median(curve[int(back_s) :] or curve) if back_s < float("inf") else 0.0
    at_once, late = most_at_once(log, up_s), expired(log, usage)
    during = [answer for answer in found.crowd.answers if down_s + EDGE_S < answer.at_s < up_s - EDGE_S]
    report(
        "8",
        Finding(
            "all replicas down",
            f"no replica for {DOWN_S:g} s, {CLIENTS:,} clients that come back when Retry-After says so; then one of "
            f"two returns, with room for {ROOM}",
            f"never more than {ROOM} at once; {SHARE:.0%} of its peak within {BACK_WITHIN_S:g} s, and no second "
            "collapse; nothing sent whose deadline has passed",
            f"{at_once} at once; peak {peak:.0f}/s, {SHARE:.0%} of it again after {back_s:g} s, then "
            f"{later:.0f}/s (median); {late} sent too late; while down: {tell(during)}",
            at_once <= ROOM
            and back_s <= BACK_WITHIN_S
            and later >= 0.6 * peak
            and late == 0
            and {answer.state for answer in during} <= {"refused"}
            and not bad,
            {"curve": curve, "peak": peak, "asked": len(found.crowd.answers), "problems": bad},
        ),
    )
