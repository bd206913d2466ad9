"""The measurement by which the JSON parser, the upstream client and the server were chosen.

``python -m loadtests.choices`` measures every candidate, each in a process of its own on a core of its own, in
interleaved rounds, and prints tables of CPU time per operation. ``--write PAGE`` puts them between that page's
markers (docs/adr/0004-server-client-and-parser.md has them), ``--json FILE`` keeps every round's figures. ``--quick``
is one short round that only shows that the machinery works.

CPU time is user and system time of the candidate's process; waiting costs nothing. What is not installed (aiohttp and
granian are no dependencies of ours) is left out of the table and named below it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests import report
from loadtests.choice_clients import CLIENTS
from loadtests.choice_parsers import CASES, PARSERS, SIZES
from loadtests.choice_servers import GRANIAN, READY, REPLY, SERVERS, command
from loadtests.ports import free_port
from loadtests.processes import (
    GATEWAY_CORE,
    LOAD_CORE,
    ROOT,
    StartFailed,
    cpu_seconds,
    pinned,
    python,
    running,
)

Measured = dict[str, Any]
BEGIN, END = "<!-- choices: written by loadtests.choices -->", "<!-- /choices -->"
PACKAGES = ("uvicorn", "httptools", "uvloop", "starlette", "httpx2", "orjson", "msgspec", "h11", "aiohttp", "granian")
MAX_S = 300
CONNECTIONS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    requests: int
    """For each client and server."""
    parse_cpu_s: float
    """How long each parser parses bodies of each size."""


FULL = Plan(rounds=3, requests=20_000, parse_cpu_s=1.0)
QUICK = Plan(rounds=1, requests=960, parse_cpu_s=0.05)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    kind: str
    """"parser", "client" or "server"."""
    name: str
    package: str | None = None
    """What must be installed for it and might not be."""

    @property
    def missing(self) -> bool:
        return self.package is not None and find_spec(self.package) is None


CANDIDATES = (
    *(Candidate("parser", name) for name in PARSERS),
    *(Candidate("client", name, "aiohttp" if name == "aiohttp" else None) for name in CLIENTS),
    *(Candidate("server", name, "h11" if "h11" in name else None) for name in SERVERS),
    Candidate("server", GRANIAN, "granian"),
)
KINDS = ("parser", "client", "server")


def measure(candidate: Candidate, plan: Plan, folder: Path) -> dict[str, float]:
    """CPU microseconds per operation, by what was operated on."""
    if candidate.kind == "parser":
        ask = ["-m", "loadtests.choice_parsers", f"--candidate={candidate.name}", f"--cpu-s={plan.parse_cpu_s}"]
        found: dict[str, float] = _child(python(*ask), GATEWAY_CORE)
        return found
    if candidate.kind == "client":
        return _client(candidate, plan, folder)
    return _server(candidate, plan, folder)


def _client(candidate: Candidate, plan: Plan, folder: Path) -> dict[str, float]:
    with _engine(folder) as url:
        ask = ["-m", "loadtests.choice_clients", f"--candidate={candidate.name}", f"--url={url}"]
        found = _child(python(*ask, f"--requests={plan.requests}"), GATEWAY_CORE)
    return {"1 KB": found["cpu_us"], "reply_bytes": found["reply_bytes"]}


@contextmanager
def _engine(folder: Path) -> Iterator[str]:
    port = free_port()
    started = python("-m", "loadtests.engine", f"--port={port}")
    with running(started, log=folder / "engine.log", core=LOAD_CORE, port=port, ready="/health"):
        yield f"http://127.0.0.1:{port}"


def _server(candidate: Candidate, plan: Plan, folder: Path) -> dict[str, float]:
    port = free_port()
    log = folder / "server.log"
    with running(command(candidate.name, port), log=log, core=GATEWAY_CORE, port=port, ready=READY) as pid:
        url = f"http://127.0.0.1:{port}"
        _load(url, plan.requests // 10, 1024)
        costs: dict[str, float] = {}
        for name, size_bytes in SIZES.items():
            before_s = cpu_seconds(pid)
            done = _load(url, plan.requests, size_bytes)
            costs[name] = round((cpu_seconds(pid) - before_s) * 1e6 / done, 2)
        return costs


def _load(url: str, requests: int, size_bytes: int) -> int:
    """Send so many requests; returns how many were answered."""
    ask = [f"--url={url}", f"--requests={requests}", f"--body-bytes={size_bytes}", f"--connections={CONNECTIONS}"]
    found = _child(python("-m", "loadtests.requests", *ask), LOAD_CORE)
    if found["errors"] or found["requests"] != requests:
        raise StartFailed(f"{found['errors']} errors, {found['requests']} of {requests} answers")
    done: int = found["requests"]
    return done


def _child(asked: Sequence[str], core: int) -> Any:
    """Run a program to its end on a core; the last line of its output is its result."""
    with pinned(core):
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=MAX_S, check=False)
    if done.returncode:
        raise StartFailed(f"{' '.join(asked)} ended with {done.returncode}:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(candidates: Sequence[Candidate], plan: Plan) -> tuple[list[Measured], list[str]]:
    """All rounds, each in another order. Returns what was measured and what went wrong."""
    measured: list[Measured] = []
    problems: list[str] = []
    rng = random.Random(0)
    for number in range(1, plan.rounds + 1):
        for candidate in rng.sample(candidates, len(candidates)):
            print(f"round {number}: {candidate.kind} {candidate.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="choices-") as folder:
                try:
                    found = measure(candidate, plan, Path(folder))
                except (StartFailed, subprocess.TimeoutExpired) as error:
                    problems.append(f"{candidate.name}, round {number}: {error}")
                    continue
            measured.append({"kind": candidate.kind, "name": candidate.name, "round": number, "cpu_us": found})
    return measured, problems


# -- the tables


def markdown(record: Measured) -> str:
    """Where it was measured, a table for each kind of candidate, what the parsers let through, what was left out."""
    plan = record["plan"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['date']}, commit {record['commit']}. {record['cpu']}, {record['cores']} cores, "
        f"Linux {record['kernel']}, Python {record['python']}. {versions}.",
        f"`{record['command']}`: {plan['rounds']} interleaved round(s), {plan['requests']} requests each. "
        "CPU µs per operation: median over the rounds, in brackets the range.",
    ]
    for kind, columns in (("parser", list(SIZES)), ("client", ["1 KB"]), ("server", list(SIZES))):
        rows = _rows([found for found in record["measured"] if found["kind"] == kind], columns)
        if rows:
            heads = [f"{size} {'body' if kind == 'parser' else 'request'}" for size in columns]
            lines += ["", *_table([kind, *heads], rows)]
    if record["strictness"]:
        lines += ["", *_strictness(record["strictness"])]
    if record["left_out"]:
        lines += ["", f"Not installed, so not measured: {', '.join(record['left_out'])}."]
    return "\n".join(lines)


def _rows(measured: list[Measured], columns: list[str]) -> list[list[str]]:
    """One row for each candidate, in the order they are listed in."""
    rows = []
    for candidate in CANDIDATES:
        costs = [found["cpu_us"] for found in measured if found["name"] == candidate.name]
        if costs:
            rows.append([candidate.name, *(report.spread([cost[column] for cost in costs], 1) for column in columns)])
    return rows


def _strictness(found: dict[str, dict[str, bool]]) -> list[str]:
    said = {True: "accepts", False: "refuses"}
    rows = [[case, *(said[found[name][case]] for name in found)] for case in CASES]
    return _table(["input", *found], rows, numbers=False)


def _table(heads: list[str], rows: list[list[str]], *, numbers: bool = True) -> list[str]:
    rule = "|---|" + ("--:|" if numbers else "---|") * (len(heads) - 1)
    return ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.choices", description="Measure the parsers, clients and servers to choose from."
    )
    parser.add_argument("--quick", action="store_true", help="one short round; its figures mean nothing")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write the figures of every round into this file")
    parser.add_argument("--write", type=Path, help="put the tables between this page's markers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    plan = QUICK if options.quick else FULL
    if options.rounds:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    wanted = [candidate for candidate in CANDIDATES if candidate.kind in options.kinds]
    measured, problems = run([candidate for candidate in wanted if not candidate.missing], plan)
    strictness = python("-m", "loadtests.choice_parsers", "--strictness")
    shown = " --quick" if options.quick else ""
    record = {
        **report.machine(),
        "command": f"python -m loadtests.choices{shown}",
        "plan": dataclasses.asdict(plan),
        "versions": _versions(),
        "request_bytes": list(SIZES.values()),
        "server_reply_bytes": len(REPLY),
        "left_out": [candidate.name for candidate in wanted if candidate.missing],
        "strictness": _child(strictness, GATEWAY_CORE) if "parser" in options.kinds else {},
        "measured": measured,
    }
    text = markdown(record)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.write is not None:
        report.insert(options.write, text, BEGIN, END)
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
