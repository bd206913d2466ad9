"""The table of the forty experiments says what ran, what did not, and why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from loadtests.processes import ROOT
from tests.faults import report

HELD = {
    "experiment": "4", "test": "test_4_a", "name": "reset",
    "fault": "RST | here", "bound": "prefix", "measured": "49 of 49", "good": True,
}  # fmt: skip


def cells(lines: list[report.Line]) -> dict[str, list[list[str]]]:
    """The table's rows, by number."""
    found: dict[str, list[list[str]]] = {}
    for line in report.table(lines).splitlines()[2:]:
        number, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        found.setdefault(number, []).append(rest)
    return found


def test_every_experiment_has_a_row_whatever_has_run() -> None:
    assert list(cells([])) == [str(number) for number in range(1, 41)]
    assert all(row[0][4].startswith("not run: ") for row in cells([]).values())


def test_findings_stand_beside_each_other_and_the_newest_counts() -> None:
    other = {**HELD, "test": "test_4_b", "good": False}
    older = {**HELD, "measured": "3 of 49"}
    rows = cells([older, other, HELD])["4"]
    assert [(row[3], row[4], row[5]) for row in rows] == [
        ("49 of 49", "holds", "`test_4_a`"),
        ("49 of 49", "**fails**", "`test_4_b`"),
    ]
    assert rows[0][1] == "RST \\| here"


def test_skipped_and_broken_off_is_not_held() -> None:
    skipped = {"experiment": "12", "test": "test_12_a", "not_run": "no sentinel"}
    failed = {"experiment": "13", "test": "test_13_a", "failed": "TimeoutError in the call phase: "}
    rows = cells([HELD, skipped, failed])
    assert rows["12"][0][4:] == ["not run: no sentinel", "`test_12_a`"]
    assert rows["13"][0][3:5] == ["TimeoutError in the call phase:", "**fails**"]
    assert report.summary([HELD, skipped, failed]) == "1 hold, 1 fail, 38 did not run, or not as a whole"


def test_a_later_run_replaces_what_an_earlier_one_said_of_an_experiment(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("\n".join(json.dumps(line) for line in (HELD, {**HELD, "experiment": "5"})))
    second.write_text(json.dumps({**HELD, "measured": "newer"}))
    found = report.merged([first, second])
    assert [(line["experiment"], line["measured"]) for line in found] == [("4", "newer"), ("5", "49 of 49")]


TESTS = """
import pytest

def test_1_skipped():
    pytest.skip("no engine")

def test_2_broken():
    raise ValueError("here\\nthere")

def test_other():
    raise ValueError
"""


def test_what_is_skipped_or_breaks_off_is_kept(tmp_path: Path) -> None:
    results, tests = tmp_path / "results.jsonl", tmp_path / "test_some.py"
    tests.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.faults.conftest", "-p", "no:cacheprovider", str(tests)],
        cwd=tmp_path,
        env={**os.environ, "FAULTS_RESULTS": str(results), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 failed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert [json.loads(line) for line in results.read_text().splitlines()] == [
        {"experiment": "1", "test": "test_1_skipped", "not_run": "no engine"},
        {"experiment": "2", "test": "test_2_broken", "failed": "ValueError in the call phase: here"},
    ]
