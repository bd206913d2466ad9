"""What a decision costs: the gate, with room for machines that are busy or slow, and the table it is written to."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests import decide_router
from loadtests.decide_index import bytes_per_pair
from loadtests.decide_router import CASES, EVENTS, Bench, Case, decisions, markdown, missed, write
from loadtests.processes import ROOT
from routing.types import Decision

ROOM = 3.0
"""Times a limit: timing on a shared machine."""
SMALL = Case("1 KB, 3 replicas", 1024, 2, 3, 25.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_is_within_its_limit(case: Case) -> None:
    found = decisions(30, [case])[case.name]
    assert 1.0 < found["decide_us"] < ROOM * case.limit_us
    assert all(0.0 < found[event] < 200.0 for event in EVENTS)


def test_the_index_takes_no_more_memory_a_key_than_allowed() -> None:
    assert 30.0 < bytes_per_pair(20_000) < decide_router.BYTES_PER_KEY_LIMIT


def test_all_replicas_are_warm_and_busy_and_one_in_four_is_warmer() -> None:
    bench = Bench(Case("4 KB, 8 replicas", 4096, 6, 8, 60.0))
    request = bench.request()
    matches = bench.router.view(request, 1000.0).matches
    held = [matches[replica] for replica in bench.replicas]
    assert min(held) > 0
    assert [number for number, tokens in enumerate(held) if tokens == max(held)] == [0, 4]
    assert any(replica.work.queued or replica.work.running for replica in bench.replicas)
    decision = bench.decide()
    assert isinstance(decision, Decision)
    assert decision.cached_tokens > 0


def test_events_leave_nothing_behind() -> None:
    bench = Bench(SMALL)
    before = (len(bench.router.state.flights), [replica.work.own for replica in bench.replicas])
    bench.events_us(rounds=2, batch=3)
    assert (len(bench.router.state.flights), [replica.work.own for replica in bench.replicas]) == before


def record(**changes: Any) -> dict[str, Any]:
    about = {"date": "2026-01-01", "commit": "abc", "cpu": "cpu", "cores": 2, "kernel": "6", "python": "3"}
    about |= {"load_average": 1.0, "command": "python -m loadtests.decide_router"}
    return {**about, **decide_router.measure(3, 2_000, [SMALL]), **changes}


def test_a_missed_limit_is_named_in_the_table() -> None:
    found = record(index_bytes_per_key=80.0)
    row = found["decisions"][SMALL.name]
    row["decide_us"] = 24.0
    assert missed(found) == []
    assert "missed" not in markdown(found)
    row["decide_us"] = 26.0
    found["index_bytes_per_key"] = 151.0
    assert missed(found) == [SMALL.name, "index memory"]
    assert markdown(found).count("**missed**") == 2


def test_measuring_leaves_the_collector_as_it_was() -> None:
    before = gc.get_threshold()
    record()
    assert gc.get_threshold() == before


def test_figures_are_written_beside_those_of_others(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text('{"measured": [1]}')
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{decide_router.BEGIN}\nstale\n{decide_router.END}\nafter\n")
    found = record()
    write(found, tmp_path)
    whole = json.loads((tmp_path / "benchmarks.json").read_text())
    assert whole == {"measured": [1], "decisions": found}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert f"| {SMALL.name} |" in text


def test_the_page_of_benchmarks_has_a_place_for_it() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert decide_router.BEGIN in text
    assert decide_router.END in text
