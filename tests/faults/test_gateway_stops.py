"""Experiment 20: the gateway itself is told to stop, told again, and killed, each with streams open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer, states, tell
from tests.faults.forms import LONG, seconds
from tests.faults.rig import Rig, completed, rig

STREAMS = 200 if LONG else 80
GRACE_S = seconds(0.7, 5.0)
DRAIN_S = seconds(1.3, 5.0)
WITHIN_S = 1.0
SHUTDOWN = {"grace_s": GRACE_S, "drain_s": DRAIN_S}
INTERVAL_S = 0.1


async def half_and_half(found: Rig) -> tuple[list[Answer], list[Answer]]:
    """Streams that end within the time to drain, and streams that do not; all of them begun."""
    short, long = round((GRACE_S + DRAIN_S / 2) / INTERVAL_S), round((GRACE_S + DRAIN_S + 30.0) / INTERVAL_S)
    answers = await found.crowd.many(
        STREAMS,
        lambda n: found.body(stream=True, fake={"chunks": long if n % 2 else short, "interval_s": INTERVAL_S}),
    )
    await found.crowd.until(lambda: all(answer.arrivals for answer in answers))
    return answers[0::2], answers[1::2]


async def gone(found: Rig, open_streams: int, since_s: float) -> tuple[int, float]:
    """How many of the streams the replicas have seen abandoned, and after how long the last one."""
    at_s: list[float] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            while len(at_s) < open_streams:
                await asyncio.sleep(0.05)
                at_s = [line.at_s for replica in found.replicas for line in replica.log if line.event == "gone"]
    return len(at_s), max(at_s, default=0.0) - since_s


async def test_20_streams_within_the_limit_complete_and_the_rest_are_told(tmp_path: Path, report: Report) -> None:
    async with rig(tmp_path, shutdown=SHUTDOWN) as found:
        short, long = await half_and_half(found)
        found.gateway.signal(signal.SIGTERM)
        sent_s = time.monotonic()
        await found.gateway.logged("not ready any more")
        during = await found.crowd.many(round(GRACE_S * 0.7 * 50), found.body(), per_s=50)
        await found.crowd.ended(within_s=60.0)
        code = await found.gateway.ended()
        took_s = time.monotonic() - sent_s
        abandoned, _ = await gone(found, len(long), sent_s)
        usage = found.usage()
        outcomes = {name: sum(record["outcome"] == name for record in usage) for name in ("completed", "drained")}
    codes = {answer.error.get("code") for answer in long}
    settled = outcomes["drained"] == len(long) and len({record["id"] for record in usage}) == len(usage)
    report(
        "20",
        Finding(
            "SIGTERM",
            f"SIGTERM with {STREAMS} streams open, half of them longer than grace and drain "
            f"({GRACE_S:g} + {DRAIN_S:g} s); {len(during)} new requests in the grace",
            "none of the new ones is refused; the shorter streams complete; the longer ones get `gateway_draining`, "
            "their replicas see them end, and all are in the usage log",
            f"{len(during) - completed(during)} refused; shorter: {tell(short)}; longer: {tell(long)}, "
            f"{abandoned} ended upstream; exit code {code} after {took_s:.1f} s; {outcomes['completed']} completed and "
            f"{outcomes['drained']} drained in the log",
            completed(during) == len(during)
            and completed(short) == len(short)
            and states(long) == {"error_event": len(long)}
            and codes == {"gateway_draining"}
            and abandoned == len(long)
            and code == 0
            and settled
            and took_s <= GRACE_S + DRAIN_S + 2 * WITHIN_S,
            {"took_s": took_s, "codes": sorted(map(str, codes)), "outcomes": outcomes},
        ),
    )


async def test_20_a_second_sigterm_ends_the_wait(tmp_path: Path, report: Report) -> None:
    async with rig(tmp_path, shutdown={"grace_s": 30, "drain_s": 30}) as found:
        short, long = await half_and_half(found)
        answers = [*short, *long]
        found.gateway.signal(signal.SIGTERM)
        await found.gateway.logged("not ready any more")
        found.gateway.signal(signal.SIGTERM)
        sent_s = time.monotonic()
        await found.crowd.ended()
        told_s = [answer.error_at_s - sent_s for answer in answers if answer.error_at_s is not None]
        code = await found.gateway.ended()
        abandoned, _ = await gone(found, len(answers), sent_s)
    codes = {answer.error.get("code") for answer in answers}
    report(
        "20",
        Finding(
            "second SIGTERM",
            f"a second SIGTERM in a grace of 30 s, with {STREAMS} streams open",
            f"every stream gets `gateway_draining` within {WITHIN_S:g} s, and the replicas see all of them end",
            f"{tell(answers)}, the last after {max(told_s, default=0):.2f} s; {abandoned} ended upstream; "
            f"exit code {code}",
            states(answers) == {"error_event": STREAMS}
            and codes == {"gateway_draining"}
            and max(told_s) <= WITHIN_S
            and abandoned == STREAMS
            and code == 0,
            {"told_max_s": max(told_s, default=0)},
        ),
    )


async def test_20_a_killed_gateway_leaves_no_engine_working(tmp_path: Path, report: Report) -> None:
    async with rig(tmp_path, workers=2) as found:
        short, long = await half_and_half(found)
        answers = [*short, *long]
        for pid in found.processes()[1:]:
            signal_to(pid, signal.SIGKILL)
        found.gateway.signal(signal.SIGKILL)
        killed_s = time.monotonic()
        await found.crowd.ended()
        cut_s = max(answer.ended_s or 0.0 for answer in answers) - killed_s
        abandoned, last_s = await gone(found, STREAMS, killed_s)
    report(
        "20",
        Finding(
            "SIGKILL",
            f"kill -9 of the gateway and both its workers, with {STREAMS} streams open",
            f"no client takes its answer for whole, and the replicas see all streams end, within {WITHIN_S:g} s",
            f"{tell(answers)} after {cut_s:.2f} s; {abandoned} ended upstream, the last after {last_s:.2f} s",
            states(answers) == {"broken": STREAMS} and abandoned == STREAMS and max(cut_s, last_s) <= WITHIN_S,
            {"cut_s": cut_s, "last_s": last_s},
        ),
    )


def signal_to(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
