"""A soak of some seconds: everything that goes wrong at once, and nothing left of it. `make soak` is the long form."""

from __future__ import annotations

import asyncio
from pathlib import Path

from loadtests.soak import Plan, Soak, markdown
from loadtests.soak_traffic import WAYS

MOST_GROWN_MB = 12.0
"""Of a process of a hundred, in the second half of some seconds. Smaller leaks are for the long form to see."""


async def test_nothing_is_left_after_everything_went_wrong_at_once(tmp_path: Path) -> None:
    plan = Plan(seconds=8.0, warm_up_s=2.0, users=24, pause_s=0.15, workers=1, every_s=1.0)
    soak = Soak(plan, tmp_path)
    async with asyncio.timeout(180.0):
        result = await soak.run()
    text = markdown(result)
    print(text)
    assert result.problems == [], text
    assert result.grown_mb <= MOST_GROWN_MB, text
    ways = {each.way for each in soak.traffic.seen}
    assert len(ways) >= 0.7 * len(WAYS), f"too few ways were gone: {sorted(ways)}"
    assert result.broken["engine killed"] >= 1
    assert result.broken["Redis killed"] >= 1
    assert result.broken["reload"] >= 1
    assert result.killed["held"] >= 20
    assert result.killed["longest_left_s"] > 5, "the leases were given back: nobody was killed"
