"""Runs the experiments and puts what they found into docs/reliability.md: ``python -m tests.faults.report``.

``--short`` takes some minutes, shows that the machinery works, and writes nothing; without it faults last as long, and
loads are as large, as the experiments say. ``--from FILE`` writes the table from an earlier run's lines; given more
than once, a later file's lines for an experiment replace an earlier one's. Every experiment has a row: one that was
skipped, or that has no test, says so, since skipped is not held. The table is written whatever it says, and the exit
code is pytest's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtests.processes import ROOT
from loadtests.report import insert, machine
from tests.faults.experiments import EXPERIMENTS, Experiment

BEGIN, END = "<!-- results: written by tests.faults.report -->", "<!-- /results -->"
PAGE = ROOT / "docs" / "reliability.md"
WITHIN_S = 7200
HOLDS, FAILS = "holds", "**fails**"
NOTHING = "-"
COLUMNS = ("#", "experiment", "what was done", "what must hold", "what was seen", "", "test")
Line = dict[str, Any]


def cell(text: str) -> str:
    """Text that stays inside its column."""
    return " ".join(text.split()).replace("|", "\\|")


UNKNOWN = Experiment(NOTHING, NOTHING, NOTHING)


def row(number: int, line: Line | None) -> str:
    """One finding; None: there is none, and the experiment says why."""
    experiment = EXPERIMENTS.get(number, UNKNOWN)
    if line is None:
        why = experiment.not_run or "no test has reported on it"
        cells: Sequence[str] = (
            experiment.name,
            experiment.fault,
            experiment.bound,
            NOTHING,
            f"not run: {why}",
            NOTHING,
        )
    elif "not_run" in line:
        why = f"not run: {line['not_run']}"
        cells = (experiment.name, experiment.fault, experiment.bound, NOTHING, why, f"`{line['test']}`")
    elif "failed" in line:
        cells = (experiment.name, experiment.fault, experiment.bound, line["failed"], FAILS, f"`{line['test']}`")
    else:
        verdict = HOLDS if line["good"] else FAILS
        cells = (line["name"], line["fault"], line["bound"], line["measured"], verdict, f"`{line['test']}`")
    return "| " + " | ".join([str(number), *map(cell, cells)]) + " |"


def rows(lines: Sequence[Line]) -> Iterator[str]:
    """One for each finding, in the order of the numbers; at least one for each of the forty, others after them.

    Of a test that ran more than once with the same name of a finding, the last counts.
    """
    for number in sorted({*EXPERIMENTS, *(int(line["experiment"]) for line in lines)}):
        own = [line for line in lines if int(line["experiment"]) == number]
        newest = {(line["test"], line.get("name", "")): line for line in own}
        found: list[Line | None] = [*newest.values()]
        for line in found or [None]:
            yield row(number, line)


def table(lines: Sequence[Line]) -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|--:|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows(lines)])


def summary(lines: Sequence[Line]) -> str:
    """How many of the forty hold as a whole."""
    verdicts: dict[str, int] = {"hold": 0, "fail": 0, "did not run, or not as a whole": 0}
    for number in EXPERIMENTS:
        own = [line for line in lines if int(line["experiment"]) == number]
        if any("failed" in line or line.get("good") is False for line in own):
            verdicts["fail"] += 1
        elif own and not any("not_run" in line for line in own):
            verdicts["hold"] += 1
        else:
            verdicts["did not run, or not as a whole"] += 1
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items() if count)


def preamble(long: bool, lines: Sequence[Line]) -> str:
    where = machine()
    form = "long" if long else "short"
    return (
        f"{where['date']}, commit {where['commit']}. {where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, "
        f"Python {where['python']}. The {form} form; clients, gateways, model servers and Redis share the cores. "
        f"Of {len(EXPERIMENTS)} experiments {summary(lines)}."
    )


def run(results: Path, long: bool, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "tests/faults", "-o", "faulthandler_timeout=900", *arguments]
    environ = {**os.environ, "FAULTS_RESULTS": str(results), "FAULTS_LONG": "1" if long else "0"}
    return subprocess.run(command, cwd=ROOT, env=environ, timeout=WITHIN_S, check=False).returncode


def merged(files: Sequence[Path]) -> list[Line]:
    """The lines of all; of each experiment only those of the last file that has some."""
    found: dict[str, list[Line]] = {}
    for file in files:
        own: dict[str, list[Line]] = {}
        for text in file.read_text().splitlines():
            line = json.loads(text)
            own.setdefault(line["experiment"], []).append(line)
        found |= own
    return [line for lines in found.values() for line in lines]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--from", dest="sources", type=Path, action="append", help="lines of a run (FAULTS_RESULTS)")
    parser.add_argument("--write", type=Path, help=f"instead of {PAGE.relative_to(ROOT)}; the short form, too")
    parser.add_argument("--keep", type=Path, help="keep the run's lines in this file as well")
    parser.add_argument("pytest", nargs="*", help="handed to pytest; what is left out then has not run")
    options = parser.parse_args(argv)
    code = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        files = options.sources
        if files is None:
            results = options.keep or Path(folder, "results.jsonl")
            code = run(results, not options.short, options.pytest)
            files = [results] if results.exists() else []
        lines = merged(files)
    text = f"{preamble(not options.short, lines)}\n\n{table(lines)}"
    print(text)
    page = options.write or (None if options.short else PAGE)
    if lines and page is not None:
        insert(page, text, BEGIN, END)
    return code


if __name__ == "__main__":
    sys.exit(main())
