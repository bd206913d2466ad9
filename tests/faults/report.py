"""Runs the experiments and puts what they found into docs/limits.md: ``python -m tests.faults.report``.

``--short`` takes a minute and a half and shows that the machinery works; without it the faults last as long as the
experiments say, about eight minutes. ``--from FILE`` writes the table from an earlier run. Nothing is written when a
test failed, unless ``--anyway``: then the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtests.processes import ROOT
from loadtests.report import insert, machine

BEGIN, END = "<!-- results: written by tests.faults.report -->", "<!-- /results -->"
PAGE = ROOT / "docs" / "limits.md"
WITHIN_S = 1800


def table(lines: list[dict[str, Any]]) -> str:
    """One row for each finding, in the order of the experiments' numbers."""
    rows = ["| # | experiment | what was done | what must hold | measured | |", "|--:|---|---|---|---|---|"]
    for line in sorted(lines, key=lambda line: int(line["experiment"])):
        verdict = "holds" if line["good"] else "**fails**"
        cells = (line["experiment"], line["name"], line["fault"], line["bound"], line["measured"], verdict)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def preamble(long: bool) -> str:
    where = machine()
    form = "long" if long else "short"
    return (
        f"{where['date']}, commit {where['commit']}. {where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, "
        f"Python {where['python']}. The {form} form; clients and Redis share the cores."
    )


def run(results: Path, long: bool, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "tests/faults", *arguments]
    environ = {**os.environ, "FAULTS_RESULTS": str(results), "FAULTS_LONG": "1" if long else "0"}
    return subprocess.run(command, cwd=ROOT, env=environ, timeout=WITHIN_S, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--from", dest="source", type=Path, help="lines that an earlier run wrote (FAULTS_RESULTS)")
    parser.add_argument("--write", type=Path, default=PAGE)
    parser.add_argument("--anyway", action="store_true")
    parser.add_argument("pytest", nargs="*", help="handed to pytest")
    options = parser.parse_args(argv)
    code = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        results = options.source or Path(folder, "results.jsonl")
        if options.source is None:
            code = run(results, not options.short, options.pytest)
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    text = f"{preamble(not options.short)}\n\n{table(lines)}"
    print(text)
    if lines and (code == 0 or options.anyway):
        insert(options.write, text, BEGIN, END)
    return code


if __name__ == "__main__":
    sys.exit(main())
