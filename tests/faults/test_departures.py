"""Experiment 21: clients leave by the hundred, in every phase, and nothing goes on working or waiting for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtests.hammer_bounds import percentile
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer, Leaving, tell
from tests.faults.forms import LONG
from tests.faults.rig import Rig, completed, rig
from tests.gateway.test_cancellation import nobody_accepts

CLIENTS = 500 if LONG else 50
WITHIN_S = 0.25
"""In which a replica is to see the end of its connection, for 99 of 100."""
BUSY_S = 0.25
"""What two busy cores may add to it, in a test."""
WAYS: tuple[Leaving, ...] = ("reset", "half-close")
KEY = "a-key-for-the-departures-0123456789"
MAX_TOKENS = 4000
LIMITS = {
    "concurrent_requests": CLIENTS,
    "tokens_per_minute": CLIENTS * (MAX_TOKENS + 2500),
    "burst_s": 60,
    "hard_tokens": True,
}
"""All clients of one phase fit, their prompts being charged, and none of the next but by what is given back."""
SECTIONS: dict[str, Any] = {"auth": "keys", "limits": {"key": LIMITS}}


def keyed(tmp_path: Path) -> dict[str, Any]:
    return {
        **SECTIONS,
        "database": f"sqlite:///{tmp_path}/keys.db",
        "keys": {"static": [{"name": "leaving", "key": {"env": "FAULTS_KEY"}}]},
    }


async def leave(found: Rig, answers: list[Answer]) -> None:
    """One after the other, by turns with RST and with half a close."""
    for number, answer in enumerate(answers):
        found.crowd.leave(answer, WAYS[number % 2])
        await asyncio.sleep(0.002)


async def seen_s(found: Rig, answers: list[Answer], phase: str) -> list[float]:
    """From each departure until its replica saw the connection end; infinite if it never did."""
    deadline_s = time.monotonic() + 5.0
    while True:
        gone = {line.mark: line.at_s for replica in found.replicas for line in replica.log if line.event == "gone"}
        marks = [(gone.get(f"{phase}-{number}"), answer.left_at_s) for number, answer in enumerate(answers)]
        if all(at_s for at_s, _ in marks) or time.monotonic() > deadline_s:
            return [at_s - left_s if at_s and left_s else float("inf") for at_s, left_s in marks]
        await asyncio.sleep(0.1)


PHASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Answer], bool]]] = {
    "before the first byte": ({"hang": True}, {"stream": True}, lambda _: True),
    "held before content": ({"role_only_then_hang": True}, {"stream": True}, lambda _: True),
    "mid-stream": ({"chunks": 10_000, "interval_s": 0.5}, {"stream": True}, lambda answer: bool(answer.arrivals)),
    "non-stream": ({"hang": True}, {}, lambda _: True),
}


async def test_21_clients_that_leave_take_their_requests_with_them(tmp_path: Path, report: Report) -> None:
    late: dict[str, list[float]] = {}
    refused: list[Answer] = []
    key = f"Authorization: Bearer {KEY}"
    async with rig(tmp_path, environ={"FAULTS_KEY": KEY}, headers=[key], **keyed(tmp_path)) as found:
        for phase, (fake, fields, ready) in PHASES.items():
            sent = sum(replica.received() for replica in found.replicas) + CLIENTS
            answers = await found.crowd.many(
                CLIENTS,
                lambda n: found.body(fake={**fake, "mark": f"{phase}-{n}"}, max_tokens=MAX_TOKENS, **fields),  # noqa: B023
            )
            await found.crowd.until(
                lambda: (
                    any(answer.ended_s for answer in answers)  # noqa: B023
                    or (sum(r.received() for r in found.replicas) == sent and all(map(ready, answers)))  # noqa: B023
                )
            )
            refused += [answer for answer in answers if answer.ended_s]
            await leave(found, answers)
            late[phase] = await seen_s(found, answers, phase)
            await found.until(lambda: nothing_held(found))
        again = await found.crowd.many(CLIENTS, found.body(max_tokens=MAX_TOKENS))
        await found.crowd.ended(again)
        bad = await found.judge()
        outcomes = [record["outcome"] for record in found.usage()].count("client_left")
    p99 = {phase: percentile(times, 99) for phase, times in late.items()}
    report(
        "21",
        Finding(
            "clients leave",
            f"{CLIENTS} clients leave in each phase, by RST and half-close: {', '.join(PHASES)}; their key has room "
            f"for {CLIENTS} at once, and tokens for as many",
            f"replicas see the end within {WITHIN_S * 1000:g} ms (p99); places and tokens are free for the next phase",
            "; ".join(f"{phase}: p99 {value * 1000:.0f} ms" for phase, value in p99.items())
            + f"; {len(refused)} refused, then {tell(again)}",
            max(p99.values()) <= WITHIN_S + BUSY_S
            and not refused
            and completed(again) == CLIENTS
            and outcomes == CLIENTS * len(PHASES)
            and not bad,
            {"p99_s": p99, "max_s": {phase: max(times) for phase, times in late.items()}, "problems": bad,
             "errors": [answer.error for answer in [*refused, *again] if answer.error][:2], "outcomes": outcomes},
        ),
    )  # fmt: skip


async def nothing_held(found: Rig) -> bool:
    return not await found.metric("tidegate_in_flight")


async def test_21_clients_that_leave_the_queue_leave_no_place_taken(tmp_path: Path, report: Report) -> None:
    room = 8
    queue = {"enabled": True, "max_waiting": 1024, "max_waiting_per_tenant": 1024}
    async with rig(tmp_path, replica={"max_in_flight": room // 2}, backend={"queue": queue}) as found:
        holding = await found.crowd.many(room, found.body(stream=True, fake={"chunks": 10_000, "interval_s": 0.5}))
        await found.crowd.until(lambda: all(answer.arrivals for answer in holding))
        sent = sum(replica.received() for replica in found.replicas)
        answers = await found.crowd.many(CLIENTS, lambda n: found.body(stream=n % 2 == 0))
        await found.until(lambda: waiting(found, CLIENTS))
        await leave(found, answers)
        left_s = time.monotonic()
        await found.until(lambda: waiting(found, 0))
        free_s = time.monotonic() - left_s
        never = sum(replica.received() for replica in found.replicas) == sent
        for answer in holding:
            found.crowd.leave(answer, "reset")
        after = await found.crowd.many(2 * room, found.body())
        await found.crowd.ended(after)
        bad = await found.judge()
    report(
        "21",
        Finding(
            "clients leave the queue",
            f"{CLIENTS} clients leave while they wait for one of {room} places, by RST and half-close",
            "their places in line are free at once; none is ever sent; the next requests are served",
            f"the line is empty {free_s:.2f} s after the last has left (a scrape included); "
            f"{'none' if never else 'some'} sent; then {tell(after)}",
            never and free_s <= WITHIN_S + BUSY_S and completed(after) == len(after) and not bad,
            {"free_s": free_s, "problems": bad},
        ),
    )


async def waiting(found: Rig, count: int) -> bool:
    return await found.metric("tidegate_queue_waiting") == count


async def test_21_clients_that_leave_during_the_connect_leave_nothing(tmp_path: Path, report: Report) -> None:
    backend = {"timeouts": {"connect_s": 30}, "health": {"probe": False}}
    with nobody_accepts() as url:
        async with rig(tmp_path, replicas=1, urls=[url], backend=backend, warm_up=0) as found:
            await found.metrics()
            found.before = found.footprint()
            answers = await found.crowd.many(CLIENTS, lambda n: found.body(stream=n % 2 == 0))
            await found.until(lambda: all_in(found))
            held = found.footprint().descriptors - found.before.descriptors
            await leave(found, answers)
            left_s = time.monotonic()
            await found.until(lambda: nothing_held(found))
            free_s = time.monotonic() - left_s
            bad = await found.judge()
    report(
        "21",
        Finding(
            "clients leave during the connect",
            f"{CLIENTS} clients leave while the connection to the replica is being made, by RST and half-close",
            "requests and sockets are gone at once",
            f"{held} more descriptors while they waited; nothing held {free_s:.2f} s after the last has left",
            free_s <= WITHIN_S + BUSY_S and held >= CLIENTS and not bad,
            {"free_s": free_s, "problems": bad},
        ),
    )


async def all_in(found: Rig) -> bool:
    return await found.metric("tidegate_in_flight") == CLIENTS
