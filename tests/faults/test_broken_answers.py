"""Experiments 4, 5, 6 and 9: answers that break off, stop short, fail before they begin, and requests that are bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtests.counting import counted
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import states, tell
from tests.faults.forms import LONG
from tests.faults.rig import completed, rig

CHUNKS = 50
STEADY = {"eject_after": 1000, "failure_ratio": 1.0, "probe": False}
"""Every request is to meet the fault, not only the first five."""


@pytest.mark.parametrize(
    ("number", "name", "fault", "field", "fake"),
    [
        ("4", "stream reset", "SO_LINGER 0 after k of 50 events, k = 1 to 49", "cut_after", {}),
        ("5", "stream cut short", "the body ends properly after k of 50 events, k = 1 to 49", "truncate_after", {}),
        ("5", "stream cut short, without framing", "the same where the body ends with the connection", "truncate_after",
         {"close_delimited": True}),
    ],
)  # fmt: skip
async def test_4_and_5_the_prefix_is_exact_and_nobody_takes_it_for_whole(
    tmp_path: Path, report: Report, number: str, name: str, fault: str, field: str, fake: dict[str, Any]
) -> None:
    script = {"counting": True, "chunks": CHUNKS, "interval_s": 0.002}
    rounds = 10 if LONG else 2
    async with rig(tmp_path, script=script, backend={"health": STEADY}) as found:
        cuts = [*range(1, CHUNKS)] * rounds
        answers = await found.crowd.many(
            len(cuts), lambda n: found.body(stream=True, fake={field: cuts[n], **fake}), per_s=300
        )
        await found.crowd.ended()
        exact = sum(answer.text == counted(cut) for answer, cut in zip(answers, cuts, strict=True))
        codes = sorted({str(answer.error.get("code")) for answer in answers})
        bad = await found.judge()
        outcomes = [record["outcome"] for record in found.usage()].count("upstream_interrupted")
    report(
        number,
        Finding(
            name,
            f"{fault}, {len(cuts)} streams",
            "the exact prefix, then an error event, no [DONE]; the record says interrupted",
            f"{exact} exact prefixes, {tell(answers)} ({', '.join(codes)}), {outcomes} interrupted",
            exact == outcomes == len(cuts) and states(answers) == {"error_event": len(cuts)} and not bad,
            {"codes": codes, "problems": bad},
        ),
    )


FAILING: dict[str, dict[str, Any]] = {
    "an error event": {"error_first": True},
    "no event": {"empty_stream": True},
    "the role, then an error event": {"error_event_after": 0},
    "the role, then the end": {"truncate_after": 0},
    "the role, then a reset": {"cut_after": 0},
    "half an event": {"raw": 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {"id":"x"'},
}


async def test_6_what_fails_before_its_first_content_goes_elsewhere_unseen(tmp_path: Path, report: Report) -> None:
    each = 100 if LONG else 20
    missed: dict[str, Any] = {}
    backend = {"health": STEADY, "retries": {"share": 1.0}}
    async with rig(tmp_path, backend=backend, script={"chunks": 5, "counting": True}) as found:
        sick = found.replicas[0]
        met = 0
        for name, script in FAILING.items():
            await sick.script(chunks=5, counting=True, **script)
            answers = await found.crowd.many(each, found.body(stream=True), per_s=200)
            await found.crowd.ended()
            twice = sum(answer.headers.get("x-tidegate-attempts") == "2" for answer in answers)
            met += twice
            if completed(answers) != each or not twice or any(answer.text != counted(5) for answer in answers):
                missed[name] = states(answers), twice, [answer.error for answer in answers if answer.error][:2]
        bad = await found.judge()
    report(
        "6",
        Finding(
            "200, then no answer",
            f"one of two replicas answers 200 and then sends {' / '.join(FAILING)}; {each} streams each",
            "every client gets a whole answer, and the fault was met",
            f"{each * len(FAILING) - sum(len(m) for m in missed)} of {each * len(FAILING)} whole, {met} of them by a "
            "second attempt" if not missed else str(missed),
            not missed and not bad,
            {"missed": missed, "problems": bad},
        ),
    )  # fmt: skip


async def test_6_a_replica_that_only_fails_is_left_alone_before_anybody_notices(tmp_path: Path, report: Report) -> None:
    """With the defaults: it is ejected sooner than the retry budget is spent."""
    streams = 1000 if LONG else 100
    async with rig(tmp_path, replicas=3, script={"chunks": 5, "counting": True}) as found:
        sick = found.replicas[0]
        await sick.script(chunks=5, counting=True, error_event_after=0)
        sent = sick.received()
        answers = await found.crowd.many(streams, found.body(stream=True), per_s=200)
        await found.crowd.ended()
        met = sick.received() - sent
        state = await found.health(sick)
        bad = await found.judge()
    report(
        "6",
        Finding(
            "200, then no answer, by default",
            f"one of three replicas answers everything with 200, the role and an error event: {streams} streams",
            "every client gets a whole answer; the replica is ejected",
            f"{completed(answers)} of {streams} whole; it met {met} of them; {state}",
            completed(answers) == streams and met >= 5 and state in ("ejected", "half_open") and not bad,
            {"met": met, "errors": [answer.error for answer in answers if answer.error][:2], "problems": bad},
        ),
    )


async def test_9_bad_requests_are_no_mark_against_anybody(tmp_path: Path, report: Report) -> None:
    bad_ones, good_ones = (1000, 100) if LONG else (300, 30)
    async with rig(tmp_path) as found:
        refusing = [found.body(fake={"status": status}) for status in (400, 413, 422)]
        mixed = bad_ones + good_ones
        answers = await found.crowd.many(mixed, lambda n: found.body() if n % 11 == 0 else refusing[n % 3], per_s=600)
        await found.crowd.ended()
        good = answers[::11]
        refused = [answer for number, answer in enumerate(answers) if number % 11]
        changes = await found.metric("tidegate_replica_changes_total")
        healthy = [await found.health(replica) for replica in found.replicas]
        once = {answer.headers.get("x-tidegate-attempts") for answer in refused}
        bad = await found.judge()
    statuses = sorted({answer.status for answer in refused})
    report(
        "9",
        Finding(
            "bad requests",
            f"{len(refused):,} requests that replicas answer with 400, 413 and 422, {len(good)} good ones among them",
            "no change of health; each bad one is sent once and its status passed on; every good one is answered",
            f"{changes:g} changes of health, {' and '.join(healthy)}; statuses {statuses}, {'/'.join(map(str, once))} "
            f"attempt each; {completed(good)} of {len(good)} good ones answered",
            changes == 0 and set(healthy) == {"healthy"} and statuses == [400, 413, 422] and once == {"1"}
            and completed(good) == len(good) and not bad,
            {"states": states(refused), "problems": bad},
        ),
    )  # fmt: skip
