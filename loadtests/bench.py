"""The benchmark: every peer, fresh, in interleaved rounds, under the same load. ``make bench`` runs it.

``python -m loadtests.bench`` writes docs/benchmarks.json and the table in docs/benchmarks.md, which
explains the method. ``--quick`` is one short round that only shows that the machinery works: it writes no
files unless it is told to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtests import report
from loadtests.bodies import chat_bodies
from loadtests.peers import MODEL, PEERS, Peer, Running, serving
from loadtests.processes import LOAD_CORE, ROOT, StartFailed, cpu_seconds, pinned, python, rss_mb

Measured = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything one run measures."""

    rounds: int
    requests: int
    """Per workload with 32 connections."""
    single_requests: int
    """With one connection."""
    streams: int
    chunks: int
    rate: float
    load: str
    """"own" (loadtests.requests) or "wrk"."""


FULL = Plan(rounds=3, requests=20_000, single_requests=3_000, streams=200, chunks=250, rate=50.0, load="own")
QUICK = Plan(rounds=1, requests=2_000, single_requests=300, streams=20, chunks=25, rate=50.0, load="own")
WARM_UP = 2_000
MAX_S = 60


def measure(peer: Peer, plan: Plan, folder: Path) -> Measured:
    """Every workload once against a fresh peer."""
    with serving(peer, folder) as target:
        _plain(target, plan, folder, 1024, 32, min(WARM_UP, plan.requests))
        found: Measured = {
            "plain_1k_c32": _plain(target, plan, folder, 1024, 32, plan.requests),
            "plain_32k_c32": _plain(target, plan, folder, 32_768, 32, plan.requests),
            "plain_1k_c1": _plain(target, plan, folder, 1024, 1, plan.single_requests),
            "streams": _streams(target, plan),
        }
        return {**found, "rss_mb": round(rss_mb(target.pid), 1)}


def _plain(target: Running, plan: Plan, folder: Path, size_bytes: int, connections: int, count: int) -> Measured:
    if plan.load == "wrk":
        command = _wrk(target, folder, size_bytes, connections, count)
    else:
        command = python("-m", "loadtests.requests", f"--url={target.url}", f"--model={MODEL}", f"--max-s={MAX_S}")
        command += [f"--connections={connections}", f"--requests={count}", f"--body-bytes={size_bytes}"]
    return _cost(target, command, "requests")


def _streams(target: Running, plan: Plan) -> Measured:
    command = python("-m", "loadtests.streams", f"--url={target.url}", f"--model={MODEL}")
    command += [f"--streams={plan.streams}", f"--chunks={plan.chunks}", f"--rate={plan.rate}"]
    return _cost(target, command, "chunks")


def _cost(target: Running, command: list[str], unit: str) -> Measured:
    """Run the load; adds the CPU of the peer, and of its Redis, in microseconds per request or chunk.

    The tenth of a second in which the load generator starts and the peer idles counts too.
    """
    before_s, redis_before_s = cpu_seconds(target.pid), target.redis_cpu_seconds()
    result = _run(command)
    used_s, redis_s = cpu_seconds(target.pid) - before_s, target.redis_cpu_seconds() - redis_before_s
    found = {**result, "cpu_us": round(used_s * 1e6 / max(1, result[unit]), 2)}
    if target.redis_port is not None:
        found["redis_us"] = round(redis_s * 1e6 / max(1, result[unit]), 2)
    return found


def _wrk(target: Running, folder: Path, size_bytes: int, connections: int, count: int) -> list[str]:
    """The command for wrk, which runs for a time, not for a number: a short run tells how long it takes."""
    paths = []
    for number, body in enumerate(chat_bodies(size_bytes, model=MODEL)):
        path = folder / f"body-{size_bytes}-{number}.json"
        path.write_bytes(body)
        paths.append(str(path))

    def command(seconds: int) -> list[str]:
        options = [
            "-t1",
            f"-c{connections}",
            f"-d{seconds}s",
            "--latency",
            "-s",
            str(ROOT / "loadtests" / "wrk.lua"),
        ]
        return ["wrk", *options, target.url, "--", *paths]

    rate = _run(command(1))["per_second"]
    return command(max(1, min(MAX_S, math.ceil(1.1 * count / max(1.0, rate)))))


def _run(command: list[str]) -> Measured:
    """Run a load generator on its core; the last line of its output is its result."""
    with pinned(LOAD_CORE):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * MAX_S, check=False)
    if done.returncode:
        raise StartFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-1500:]}")
    result: Measured = json.loads(done.stdout.splitlines()[-1])
    return result


def run(peers: list[Peer], plan: Plan) -> tuple[list[Measured], list[str]]:
    """All rounds. Returns what was measured and what went wrong."""
    measured: list[Measured] = []
    problems: list[str] = []
    rng = random.Random(0)
    for number in range(1, plan.rounds + 1):
        for peer in rng.sample(peers, len(peers)):
            print(f"round {number}: {peer.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                try:
                    found = measure(peer, plan, Path(folder))
                except StartFailed as error:
                    problems.append(f"{peer.name}, round {number}: {error}")
                    continue
            measured.append({"peer": peer.name, "round": number, **found})
            problems += [f"{peer.name}, round {number}: {bad}" for bad in report.errors(found)]
    return measured, problems


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description="Compare Tidegate with its peers.")
    parser.add_argument("--quick", action="store_true", help="one short round; writes no files unless told to")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--requests", type=int, help="requests per workload with 32 connections")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--load", choices=("auto", "own", "wrk"), default="auto")
    parser.add_argument("--out", type=Path, help="where the figures go (default: docs/benchmarks.json)")
    parser.add_argument("--table", type=Path, help="the page that holds the table (default: docs/benchmarks.md)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    plan = QUICK if options.quick else FULL
    load = options.load if options.load != "auto" else "own" if options.quick or not shutil.which("wrk") else "wrk"
    plan = dataclasses.replace(plan, load=load)
    if options.rounds:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    if options.requests:
        plan = dataclasses.replace(plan, requests=options.requests)
    peers = []
    for name in options.peers:
        peer = PEERS[name]
        if peer.missing:
            print(f"skipped {name}: {peer.missing}", file=sys.stderr)
        else:
            peers.append(peer)
    measured, problems = run(peers, plan)
    command = "python -m loadtests.bench " + " ".join(sys.argv[1:] if argv is None else argv)
    record = {
        **report.machine(),
        "command": command.strip(),
        "plan": dataclasses.asdict(plan),
        "measured": measured,
    }
    text = report.markdown(record)
    print(text)
    docs = ROOT / "docs"
    out = options.out or (None if options.quick else docs / "benchmarks.json")
    table = options.table or (None if options.quick else docs / "benchmarks.md")
    if out is not None:
        # What others measure stays: they have sections of their own in this file.
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**before, **record}, indent=1) + "\n")
    if table is not None:
        report.insert(table, text)
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
