"""Experiment 23: a replica closes idle connections just when the gateway uses them again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from random import Random

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.forms import LONG
from tests.faults.rig import Rig, completed, rig

KEEP_S = 0.3 if LONG else 0.1
LANES, TURNS = (20, 100) if LONG else (20, 15)


async def lane(found: Rig, number: int, rng: Random) -> None:
    """Ask, and again when the replica is about to hang up: within a millisecond, mostly."""
    for turn in range(TURNS):
        mark = f"{number}-{turn}"
        answer = found.crowd.ask(found.body(stream=turn % 2 == 0, fake={"chunks": 2, "mark": mark}))
        await found.crowd.ended([answer])
        await asyncio.sleep(max(0.0, KEEP_S - (time.monotonic() - (answer.ended_s or 0.0)) + rng.gauss(0.0, 0.001)))


async def test_23_a_connection_that_the_replica_closes_at_its_reuse_is_no_error(tmp_path: Path, report: Report) -> None:
    backend = {"connections": {"idle_s": 3}}
    async with rig(tmp_path, replicas=1, script={"keepalive_s": KEEP_S, "chunks": 2}, backend=backend) as found:
        began = len(found.crowd.answers)
        async with asyncio.TaskGroup() as tasks:
            for number in range(LANES):
                tasks.create_task(lane(found, number, Random(number)))
        answers = found.crowd.answers[began:]
        log = [line for line in found.replicas[0].log if line.mark]
        twice = [
            mark for mark, times in Counter(line.mark for line in log if line.event == "answered").items() if times > 1
        ]
        again = sum(answer.headers.get("x-tidegate-attempts") != "1" for answer in answers)
        bad = await found.judge()
    report(
        "23",
        Finding(
            "keep-alive race",
            f"a replica that closes connections after {KEEP_S:g} s of idleness; {len(answers):,} requests, each when "
            "its connection has been idle for that long",
            "no client error; nothing is answered twice",
            f"{len(answers) - completed(answers)} errors; {len(twice)} answered twice; {again} requests met a closed "
            "connection and were sent again",
            completed(answers) == len(answers) == LANES * TURNS and not twice and not bad,
            {"again": again, "errors": [answer.error for answer in answers if answer.error][:2], "problems": bad},
        ),
    )
