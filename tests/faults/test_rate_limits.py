"""Experiment 7: replicas that answer 429, with every kind of `Retry-After`, and a pool that answers nothing else."""

from __future__ import annotations

import itertools
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer, tell
from tests.faults.forms import LONG
from tests.faults.rig import Replica, rig

PAUSE_S = 5.0 if LONG else 1.5
MOST_S = 300.0
SPREAD = 0.2
"""By so much of itself a Retry-After of the gateway's may be longer than the pause."""
SHARE, PER_S = 0.1, 1.0
"""Of the retry budget, by default."""
PER_SECOND = 100
RATE = 200


def times_s(replica: Replica) -> list[float]:
    return [line.at_s for line in replica.log if line.event == "received" and line.mark == "storm"]


def longest_rest_s(times: list[float], since_s: float, until_s: float) -> float:
    """The longest time in which it was asked nothing."""
    points = [since_s, *times, until_s]
    return max(after - before for before, after in itertools.pairwise(points))


def honest(answer: Answer) -> bool:
    """An answer, or a refusal that says when to come back: within what is ever believed."""
    if answer.state == "completed":
        return True
    after_s = float(answer.headers.get("retry-after", "0"))
    return answer.state == "refused" and answer.status in (429, 503) and 0 < after_s <= MOST_S * (1 + SPREAD) + 1


async def test_7_a_replica_that_names_a_time_is_left_alone_until_then(tmp_path: Path, report: Report) -> None:
    """Each replica has a Retry-After of its own; two are well."""
    seconds = f"{PAUSE_S:g}"
    said = {"seconds": seconds, "a date": "", "-1": "-1", "1e9": "1e9", "text": "after lunch",
            "two headers": f"1\r\nretry-after: {seconds}"}  # fmt: skip
    paused = ("seconds", "1e9", "two headers")
    async with rig(tmp_path, replicas=len(said) + 2) as found:
        limited = dict(zip(said, found.replicas, strict=False))
        for name, replica in limited.items():
            date = formatdate(time.time() + PAUSE_S + 1.0, usegmt=True)  # it has whole seconds
            await replica.script(status=429, retry_after=said[name] or date)
        began_s = time.monotonic()
        answers = await found.crowd.many(
            round(PER_SECOND * (PAUSE_S + 2.5)),
            found.body(fake={"mark": "storm"}),
            per_s=PER_SECOND,
        )
        await found.crowd.ended()
        ended_s = time.monotonic()
        rests = {name: longest_rest_s(times_s(replica), began_s, ended_s) for name, replica in limited.items()}
        sends = {name: len(times_s(replica)) for name, replica in limited.items()}
        healthy = [await found.health(replica) for replica in found.replicas]
        bad = await found.judge()
    kept = all(rests[name] >= PAUSE_S - 0.05 for name in paused) and rests["a date"] >= 0.5 and sends["1e9"] <= 3
    ignored = all(rests[name] < 0.7 and sends[name] > 20 for name in ("-1", "text"))
    dishonest = [answer for answer in answers if not honest(answer)]
    report(
        "7",
        Finding(
            "429 with Retry-After",
            f"six of eight replicas answer 429, with Retry-After {seconds} s, a date, -1, 1e9, text, and twice (1 and "
            f"{seconds} s); {len(answers)} requests at {PER_SECOND} a second",
            "nothing is sent there until the time that was said (of two, the later; at most 300 s); what makes no "
            "sense is ignored; clients get an answer or 429 with a Retry-After",
            "longest rest " + ", ".join(f"{name}: {rest:.1f} s" for name, rest in rests.items())
            + f"; sends {', '.join(map(str, sends.values()))}; clients: {tell(answers)}",
            kept and ignored and not dishonest and set(healthy) == {"healthy"} and not bad,
            {"rests": rests, "sends": sends, "dishonest": [(a.status, a.headers) for a in dishonest[:2]],
             "problems": bad},
        ),
    )  # fmt: skip


@pytest.mark.parametrize("retry_after", [None, "1e9"])
async def test_7_a_pool_that_answers_only_429_is_not_stormed(
    tmp_path: Path, report: Report, retry_after: str | None
) -> None:
    count = 2000 if LONG else 200
    async with rig(tmp_path, replicas=3) as found:
        told = {} if retry_after is None else {"retry_after": retry_after}
        for replica in found.replicas:
            await replica.script(status=429, **told)
        began_s = time.monotonic()
        answers = await found.crowd.many(count, found.body(fake={"mark": "storm"}), per_s=RATE)
        await found.crowd.ended()
        took_s = time.monotonic() - began_s
        sends = sum(len(times_s(replica)) for replica in found.replicas)
        await_s = [float(answer.headers.get("retry-after", "0")) for answer in answers]
        bad = await found.judge()
    # Whatever is under way when a replica's failures begin moves free of charge, once in ten seconds.
    events = len(found.replicas) * (1 + took_s // 10)
    most = count * (1 + SHARE) + 20 * SHARE + PER_S * (took_s + 10.0) + 2 * events
    few = 20.0  # what is under way when the first pause is known
    statuses = sorted({answer.status for answer in answers})
    refused = all(answer.state == "refused" for answer in answers)
    good = all(map(honest, answers)) and (retry_after is None or max(await_s) > MOST_S - took_s - 1)
    report(
        "7",
        Finding(
            f"429 storm, {'no Retry-After' if retry_after is None else 'Retry-After 1e9'}",
            f"all three replicas answer 429; {count:,} requests at {RATE} a second",
            f"at most {most if retry_after is None else few:.0f} sends; every client is refused with a Retry-After of "
            f"at most {MOST_S * (1 + SPREAD):g} s",
            f"{sends:,} sends; clients: {tell(answers)} with {', '.join(map(str, statuses))}, "
            f"Retry-After {min(await_s):g} to {max(await_s):g} s",
            sends <= (most if retry_after is None else few) and refused and good and not bad,
            {"sends": sends, "most": most, "states": tell(answers), "problems": bad},
        ),
    )
