"""Cuts the streams of real engines and puts what came of it into docs/reliability.md.

    python -m tests.engines.continuation_report

SmolLM2 on llama.cpp, and the tiny model on SGLang, vLLM and llama.cpp: ten minutes on two cores, after
`python -m tests.engines.install`. Nothing is written when a test failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtests.processes import ROOT
from loadtests.report import insert, machine
from tests.engines.continuing import RESULTS

BEGIN, END = "<!-- continuation: written by tests.engines.continuation_report -->", "<!-- /continuation -->"
PAGE = ROOT / "docs" / "reliability.md"
WITHIN_S = 1800


def table(lines: list[dict[str, str | int]]) -> str:
    """One row for each engine and model, the prompts of one added up."""
    sums: dict[str, list[int]] = {}
    for line in lines:
        row = sums.setdefault(str(line["engine"]), [0, 0, 0])
        for place, name in enumerate(("cuts", "right", "same")):
            row[place] += int(line[name])
    rows = [
        f"| {engine} | {cuts} | {right} | {same} ({same / cuts:.0%}) |" for engine, (cuts, right, same) in sums.items()
    ]
    head = "| engine, model | cut points | tail as of a fresh request | answer as of an unbroken run |"
    return "\n".join([head, "|---|--:|--:|--:|", *rows])


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="continuation-") as folder:
        results = Path(folder, "results.jsonl")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/engines/test_continuation_of_engines.py",
            "-m",
            "engine",
        ]
        environ = {**os.environ, RESULTS: str(results), "TESTS_LONG": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environ, timeout=WITHIN_S, check=False).returncode
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    where = machine()
    text = f"{where['date']}, commit {where['commit']}, {where['cpu']}. Temperature 0.\n\n{table(lines)}"
    print(text)
    if code == 0:
        insert(PAGE, text, BEGIN, END)
    return code


if __name__ == "__main__":
    sys.exit(main())
