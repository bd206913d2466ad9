"""Experiment 3: a replica is frozen. Its kernel goes on accepting, so that only silence tells."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import states
from tests.faults.forms import LONG
from tests.faults.rig import Replica, Rig, completed, rig

STREAMS = 90
IDLE_S = 3.0 if LONG else 1.0
FIRST_TOKEN_S = 1.5 * IDLE_S
SLOW_START_S = 20.0 if LONG else 3.0
EJECTION_S = 2.0 if LONG else 1.0
AWAY = ("ejected", "stalled", "unresponsive")
BUSY_S = 1.0
"""What a machine with two busy cores may add to any wait, as in the other experiments."""


async def test_3_a_frozen_replica_is_left_alone_and_comes_back_slowly(tmp_path: Path, report: Report) -> None:
    health = {"ejection_s": EJECTION_S, "slow_start_s": SLOW_START_S, "probe_interval_s": 1, "timeout_s": 1}
    backend = {"timeouts": {"idle_s": IDLE_S, "first_token_s": FIRST_TOKEN_S}, "health": health}
    async with rig(tmp_path, replicas=3, script={"chunks": 400, "interval_s": 0.05}, backend=backend) as found:
        victim = found.replicas[0]
        streams = await found.crowd.many(STREAMS, found.body(stream=True))
        await found.crowd.until(lambda: all(len(answer.arrivals) > 2 for answer in streams))
        hit = [answer for answer in streams if answer.headers["x-tidegate-replica"] == victim.name]
        frozen_s = victim.freeze()
        during = await found.crowd.many(60, found.body(stream=True, fake={"chunks": 1}), per_s=500)
        await found.crowd.ended([*hit, *during])
        # A stream's time runs from its last event. Heartbeats are the gateway's own.
        detected_s = [(answer.error_at_s or 1e9) - frozen_s for answer in hit]
        state = await found.until(lambda: away(found, victim))
        found.crowd.close()
        before = victim.received()  # it reads nothing: what the kernel has accepted shows when it is thawed
        after = await found.crowd.many(60, found.body(fake={"chunks": 1}), per_s=100)
        await found.crowd.ended()
        moved = sum(answer.headers.get("x-tidegate-replica") == victim.name for answer in after)
        thawed_s = victim.thaw()
        seen, shares = await coming_back(found, victim)
        back_s = time.monotonic() - thawed_s
        for answer in streams:
            if answer.error_at_s is None:
                answer.left_at_s = frozen_s
        bad = await found.judge()
    slow = shares[0] < 0.25 < shares[-1]
    late = max(abs(each - IDLE_S) for each in detected_s)
    report(
        "3",
        Finding(
            "replica frozen",
            f"SIGSTOP of one of three replicas with {len(hit)} of {STREAMS} streams, SIGCONT when it is ejected",
            f"its streams end in an error event {IDLE_S:g} ± 0.5 s after their last event; what waits there is asked "
            "elsewhere once; new traffic avoids it; half-open, then a slow start",
            f"after {min(detected_s):.2f} to {max(detected_s):.2f} s; failed: {len(during) - completed(during)} of "
            f"{len(during)} before the ejection, {len(after) - completed(after)} of {len(after)} after it, "
            f"{moved} of which went there; {state}, then {', '.join(seen)}; "
            f"share of traffic {', '.join(f'{share:.2f}' for share in shares)} over {SLOW_START_S:g} s",
            {answer.state for answer in hit} == {"error_event"}
            and late <= 0.5 + BUSY_S
            and completed(during) == len(during)
            and completed(after) == len(after)
            and moved == 0
            and "half_open" in seen
            and slow
            and not bad,
            {"detected_s": detected_s, "during": states(during), "after": states(after), "back_s": back_s,
             "errors": [answer.error for answer in during if answer.error][:2], "before": before, "problems": bad},
        ),
    )  # fmt: skip


async def test_3_whole_answers_do_not_wait_for_a_frozen_replica(tmp_path: Path, report: Report) -> None:
    stall_s = 30.0 if LONG else 4.0
    health = {"probe_interval_s": 1, "timeout_s": 1, "stall_s": stall_s}
    async with rig(
        tmp_path, replicas=2, script={"chunks": 1, "delay_head_s": 0.5}, backend={"health": health}
    ) as found:
        plain = await found.crowd.many(40, found.body(), per_s=2000)
        frozen_s = found.replicas[0].freeze()
        await found.crowd.ended(plain, stall_s + 60.0)
        took_s = time.monotonic() - frozen_s
        found.replicas[0].thaw()
        bad = await found.judge()
    moved = sum(answer.headers.get("x-tidegate-attempts") == "2" for answer in plain)
    report(
        "3",
        Finding(
            "replica frozen, whole answers",
            f"SIGSTOP of one of two replicas with {len(plain)} whole answers on their way from both",
            f"those at the frozen one are asked elsewhere after `stall_s` ({stall_s:g} s) without a sign of life",
            f"{completed(plain)} of {len(plain)} answered, {moved} of them elsewhere, the last after {took_s:.1f} s",
            completed(plain) == len(plain) and moved > 0 and took_s < stall_s + 10 and not bad,
            {"states": states(plain), "problems": bad},
        ),
    )


async def away(found: Rig, replica: Replica) -> str:
    state = await found.health(replica)
    return state if state in AWAY else ""


async def coming_back(found: Rig, victim: Replica) -> tuple[list[str], list[float]]:
    """The states on the way back, and its share of traffic in each fifth of the slow start."""
    seen: list[str] = []
    began_s = 0.0
    answers: list[list[str]] = [[] for _ in range(5)]
    deadline_s = time.monotonic() + 30.0 + SLOW_START_S
    while time.monotonic() < deadline_s:
        state = await found.health(victim)
        if state not in seen:
            seen.append(state)
        if not began_s and state in ("warming", "healthy"):
            began_s = time.monotonic()
        number = int((time.monotonic() - began_s) / SLOW_START_S * 5) if began_s else 0
        if number >= 5:
            break
        some = await found.crowd.many(10, found.body(fake={"chunks": 1, "delay_head_s": 0.05}), per_s=1000)
        await found.crowd.ended(some)
        if began_s:
            answers[number] += [answer.headers.get("x-tidegate-replica", "") for answer in some]
        await asyncio.sleep(0.02)
    return seen, [each.count(victim.name) / max(1, len(each)) for each in answers]
