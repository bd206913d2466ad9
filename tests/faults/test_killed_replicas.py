"""Experiments 1 and 2, the headline: a replica is killed with two hundred streams open, or before any has begun.

The short form has eighty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from loadtests.counting import counted
from loadtests.hammer_bounds import percentile
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer, states, tell
from tests.faults.forms import LONG
from tests.faults.rig import Replica, Rig, completed, rig

OPEN = 200 if LONG else 80
"""Streams on the replica that is killed."""
WITHIN_S = 1.0
"""In which their clients are to be told."""
CHUNKS, INTERVAL_S = (100, 0.2) if LONG else (20, 0.2)
SCRIPT = {"counting": True, "timestamps": False, "chunks": CHUNKS, "interval_s": INTERVAL_S}


def at(replica: Replica, answers: list[Answer]) -> list[Answer]:
    """Those whose stream came from there when it began."""
    return [answer for answer in answers if answer.headers.get("x-tidegate-replica") == replica.name]


async def open_streams(found: Rig, victim: Replica, **fields: Any) -> list[Answer]:
    """Streams until the victim has as many as it is to have, all of them with some content."""
    body = found.body(stream=True, **fields)
    answers: list[Answer] = []
    while True:
        missing = OPEN - len(at(victim, answers))
        if missing <= 0:
            return answers
        more = await found.crowd.many(max(1, missing * len(found.replicas) * 9 // 10), body)
        await found.crowd.until(lambda: all(b'"content":"0' in answer.body for answer in more))  # noqa: B023
        answers += more


async def unbroken(found: Rig, replica: Replica) -> bytes:
    """What a replica says when it is asked directly."""
    async with httpx2.AsyncClient(trust_env=False, timeout=60.0) as client:
        body = found.body(stream=True, fake={"interval_s": 0.0})
        return (await client.post(f"{replica.url}/v1/chat/completions", json=body)).content


async def test_1_streams_of_a_killed_replica_end_honestly_and_the_others_go_on(tmp_path: Path, report: Report) -> None:
    async with rig(tmp_path, script=SCRIPT) as found:
        victim = found.replicas[0]
        whole = await unbroken(found, found.replicas[1])
        answers = await open_streams(found, victim)
        hit = at(victim, answers)
        others = [answer for answer in answers if answer not in hit]
        killed_s = victim.kill()
        await found.crowd.ended()
        told_s = [answer.error_at_s - killed_s for answer in hit if answer.error_at_s is not None]
        prefixes = [bytes(answer.body).partition(b'data: {"error"')[0] for answer in hit]
        exact = sum(bool(prefix) and whole.startswith(prefix) for prefix in prefixes)
        same = sum(bytes(answer.body) == whole for answer in others)
        codes = {answer.error.get("code") for answer in hit}
        bad = await found.judge()
    report(
        "1",
        Finding(
            "replica killed, continuation off",
            f"kill -9 of one of two replicas with {len(hit)} open streams, {len(others)} at the other",
            f"each of the {len(hit)} gets an error event within {WITHIN_S:g} s after the exact prefix, and no [DONE]; "
            "the others are what the engine sends, byte for byte",
            f"{tell(hit)}, told after {max(told_s, default=0):.3f} s at most, {exact} exact prefixes; "
            f"{same} of {len(others)} others byte-identical",
            len(told_s) == len(hit) == exact
            and len(hit) >= OPEN
            and states(hit) == {"error_event": len(hit)}
            and codes == {"upstream_disconnected"}
            and max(told_s) <= WITHIN_S
            and same == len(others) > 0
            and not bad,
            {"told_p50_s": percentile(told_s, 50), "told_max_s": max(told_s, default=0), "problems": bad},
        ),
    )


async def test_1_streams_of_a_killed_replica_go_on_elsewhere(tmp_path: Path, report: Report) -> None:
    backend = {"engine": "vllm"}
    async with rig(tmp_path, script=SCRIPT, model={"continuation": True}, backend=backend) as found:
        victim = found.replicas[0]
        answers = await open_streams(found, victim, max_tokens=2 * CHUNKS)
        hit = at(victim, answers)
        killed_s = victim.kill()
        lengths = {answer.number: len(answer.body) for answer in hit}
        await found.crowd.ended(within_s=60.0 + CHUNKS * INTERVAL_S)
        whole = sum(answer.text == counted(CHUNKS) for answer in answers)
        failed = len(answers) - completed(answers)
        gaps_s = [pause_s(answer, killed_s, lengths[answer.number]) for answer in hit]
        bad = await found.judge()
    report(
        "1",
        Finding(
            "replica killed, continuation on",
            f"kill -9 of one of two replicas with {len(hit)} open streams, {len(answers) - len(hit)} at the other",
            "no request fails, and every text is whole, with no gap and no repetition",
            f"{failed} of {len(answers)} failed; {whole} of {len(answers)} texts whole; "
            f"pause {percentile(gaps_s, 50):.2f} s (median), {max(gaps_s):.2f} s at most",
            failed == 0 and whole == len(answers) and len(hit) >= OPEN and not bad,
            {"states": states(answers), "errors": [a.error for a in answers if a.error][:3], "problems": bad},
        ),
    )


def pause_s(answer: Answer, since_s: float, had: int) -> float:
    """From then until something more came; infinite if nothing did."""
    return next((at_s - since_s for at_s, length in answer.arrivals if length > had), float("inf"))


async def test_2_requests_that_wait_for_their_first_byte_go_elsewhere(tmp_path: Path, report: Report) -> None:
    """All of the victim's may move: they are one event, however many they are."""
    script = {"delay_head_s": 5.0 if LONG else 1.2, "chunks": 5}
    async with rig(tmp_path, replicas=3, script=script) as found:
        victim = found.replicas[0]
        warm, warm_here = sum(replica.received() for replica in found.replicas), victim.received()
        answers: list[Answer] = []
        for stream, wanted in ((True, OPEN // 2), (False, OPEN)):  # they wait alike, and different code moves them
            while (missing := wanted + warm_here - victim.received()) > 0:
                answers += await found.crowd.many(max(1, missing * 27 // 10), found.body(stream=stream), per_s=1000)
                sent = warm + len(answers)
                await found.crowd.until(lambda: sum(r.received() for r in found.replicas) >= sent)  # noqa: B023
        waiting = victim.received() - sum(line.event == "answered" for line in victim.log)
        early = completed(answers)
        victim.kill()
        await found.crowd.ended()
        sends = sum(replica.received() for replica in found.replicas) - warm
        bad = await found.judge()
    allowed = len(answers) + waiting
    report(
        "2",
        Finding(
            "replica killed before the first byte",
            f"kill -9 of one of three replicas with {waiting} requests that wait for their first byte, half of them "
            f"streams, {len(answers) - waiting} at the others",
            f"no client sees an error; at most {allowed:,} sends: each of them once more",
            f"{len(answers) - completed(answers)} of {len(answers)} failed; {sends:,} sends",
            completed(answers) == len(answers) and sends <= allowed and waiting >= OPEN and early == 0 and not bad,
            {"states": states(answers), "errors": [a.error for a in answers if a.error][:3], "problems": bad},
        ),
    )
