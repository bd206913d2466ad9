"""The hammer: are limits and queue exact when many processes ask at once? Against a real Redis, through its operations.

``python -m loadtests.hammer --redis redis://127.0.0.1:6379`` runs every mode and prints what was admitted beside what
was allowed. Nothing of the gateway but the store is in the way, so it asks as fast as Python can. It uses keys of its
own in that Redis, which run out by themselves.

`tests/faults` runs the same modes, and others in which something is killed, frozen or lost meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import redis

from loadtests import hammer_runs as runs
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import Reach
from loadtests.hammer_runs import Finding, Shape, Target
from loadtests.report import insert, machine

MODES: dict[str, Callable[[Target, Shape], Finding]] = {
    "requests": runs.requests,
    "tokens-hard": functools.partial(runs.tokens, hard=True),
    "tokens-soft": functools.partial(runs.tokens, hard=False),
    "concurrency": runs.concurrency,
    "shares": runs.shares,
    "mouse": runs.mouse,
}
PROCESSES = {"shares": 4, "mouse": 4}
"""Where it is not 8: with more, two cores are busy with the callers and waits say nothing of the queue."""
BEGIN, END = "<!-- results: written by loadtests.hammer -->", "<!-- /results -->"


def table(findings: Iterable[Finding]) -> str:
    """Markdown."""
    lines = ["| run | what was done | what must hold | measured | |", "|---|---|---|---|---|"]
    for one in findings:
        verdict = "holds" if one.good else "**FAILS**"
        lines.append(f"| {one.name} | {one.fault} | {one.bound} | {one.measured} | {verdict} |")
    return "\n".join(lines)


def preamble(record: dict[str, Any]) -> str:
    """Where and how the figures came about, for above a table."""
    return (
        f"{record['date']}, commit {record['commit']}. {record['cpu']}, {record['cores']} cores, Linux "
        f"{record['kernel']}, Python {record['python']}, Redis {record['redis']}. `{record['command']}`"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.hammer", description=__doc__.partition("\n")[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}; all when none is named")
    parser.add_argument("--redis", required=True, metavar="URL", help="the address, as `store:` has it")
    parser.add_argument("--processes", type=int, help="default: 8, and 4 for the queue")
    parser.add_argument("--tasks", type=int, default=32, help="in each process, for the limits (default: 32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run (default: 5)")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="of each call; the gateway's own is 0.05")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args(argv)
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"no such mode: {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    findings: list[Finding] = []
    with redis.Redis.from_url(options.redis, socket_timeout=10.0) as client, Crew() as crew:
        version = str(client.info("server")["redis_version"])
        target = Target(crew, Reach(options.redis, timeout_s=options.timeout_s), runs.clock_of(client))
        for mode in options.modes or MODES:
            print(mode, file=sys.stderr, flush=True)
            processes = options.processes or PROCESSES.get(mode, 8)
            findings.append(MODES[mode](target, Shape(processes, options.tasks, options.seconds)))
    words = sys.argv[1:] if argv is None else argv
    record = {**machine(), "redis": version, "command": " ".join(["python -m loadtests.hammer", *words])}
    text = f"{preamble(record)}\n\n{table(findings)}"
    print(text)
    record["findings"] = [dataclasses.asdict(one) for one in findings]
    print(json.dumps(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.write is not None:
        insert(options.write, text, BEGIN, END)
    return 0 if all(one.good for one in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
