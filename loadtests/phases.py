"""Where the gateway's CPU time goes, phase by phase: a py-spy profile under load, sorted by function.

``python -m loadtests.phases`` profiles Tidegate's protocol edge under plain requests and under streams and prints a
table; ``--write PAGE`` puts it between that page's markers (docs/request-path.md has them). The time per operation is
measured without the profiler, the shares with it. A C function or a system call counts for the Python line that
called it. Needs py-spy and the right to trace.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from loadtests import report
from loadtests.peers import MODEL, PEERS, Running, serving
from loadtests.processes import LOAD_CORE, ROOT, StartFailed, cpu_seconds, pinned, python

BEGIN, END = "<!-- phases: written by loadtests.phases -->", "<!-- /phases -->"
RATE_HZ = 500
LOOP = "event loop, sockets read by it"
PHASES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("write to the client", r"^SocketReply\."),
        ("read and guard the client's request", r"gateway/edges/|uvicorn/"),
        ("build and send the upstream request", r"backends/upstream|backends/dialects|body_for|with_values"),
        ("build and send the upstream request", r"^(Connection\.send|Wire\.start|ConnectionPool\.acquire)"),
        ("parse the body", r"gateway/body\.py"),
        ("understand the order", r"gateway/order\.py"),
        ("choose and reserve a replica", r"\(routing/"),
        ("read the upstream's answer", r"backends/(http1|pool)\.py"),
        ("relay, look at events", r"gateway/(relay|sse)\.py"),
        ("deadlines", r"backends/ticker\.py"),
        ("settle: usage, metrics, record", r"gateway/(usage|metrics|ledger)\.py|Runtime\.settle"),
        ("the exchange itself", r"gateway/(exchange|runtime)\.py"),
    )
)
"""The first that fits a frame, from the innermost frame outwards, is what a sample counts for."""
_IDLE = re.compile(r"_worker \(concurrent/futures/thread\.py:\d+\)$")
"""A thread that waits for work, which py-spy takes for a busy one."""


def phase_of(stack: str) -> str:
    """The phase of one sample: frames from the outermost to the innermost, separated by semicolons."""
    for frame in reversed(stack.split(";")):
        for name, pattern in PHASES:
            if pattern.search(frame):
                return name
    return LOOP


def shares(profile: Iterable[str]) -> dict[str, float]:
    """Each phase's share (0..1) of the samples in py-spy's raw format, a stack and a count a line."""
    counts: Counter[str] = Counter()
    for line in profile:
        stack, _, count = line.rstrip().rpartition(" ")
        if stack and not _IDLE.search(stack):
            counts[phase_of(stack)] += int(count)
    total = counts.total()
    return {name: count / total for name, count in counts.items()}


def _plain(url: str, seconds: float) -> list[str]:
    ask = [f"--url={url}", f"--model={MODEL}", "--requests=100000000", f"--max-s={seconds}"]
    return python("-m", "loadtests.requests", *ask)


def _streams(url: str, seconds: float) -> list[str]:
    ask = [f"--url={url}", f"--model={MODEL}", "--streams=200", "--rate=50", f"--chunks={round(50 * seconds)}"]
    return python("-m", "loadtests.streams", *ask)


def profiled(target: Running, command: list[str], seconds: float) -> dict[str, float]:
    """The shares while a load runs that lasts a second longer at either end."""
    with tempfile.NamedTemporaryFile(prefix="phases-") as raw, ExitStack() as at_exit:
        with pinned(LOAD_CORE):
            load = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            at_exit.callback(load.wait)
            recording = ["record", f"--pid={target.pid}", f"--duration={round(seconds)}", f"--rate={RATE_HZ}"]
            spy = [str(Path(sys.executable).with_name("py-spy")), *recording, "--format=raw", f"--output={raw.name}"]
            done = subprocess.run(spy, capture_output=True, text=True, timeout=seconds + 30, check=False)
        if done.returncode:
            raise StartFailed(f"py-spy: {done.stderr[-500:]}")
        return shares(Path(raw.name).read_text().splitlines())


def _cost_us(target: Running, command: list[str], unit: str) -> float:
    before_s = cpu_seconds(target.pid)
    with pinned(LOAD_CORE):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    used_s = cpu_seconds(target.pid) - before_s
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return used_s * 1e6 / max(1.0, found[unit])


def markdown(costs_us: Mapping[str, float], found: Mapping[str, Mapping[str, float]]) -> str:
    """One row for each phase, the dearest of a plain request first."""
    names = sorted({name for each in found.values() for name in each}, key=lambda name: _order(name, found))
    lines = [
        "| phase | " + " | ".join(f"{what}: share | µs" for what in costs_us) + " |",
        "|---|" + "--:|--:|" * len(costs_us),
    ]
    for name in names:
        cells = [
            f"{found[what].get(name, 0.0):.0%} | {found[what].get(name, 0.0) * cost:.1f}"
            for what, cost in costs_us.items()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| **all** | " + " | ".join(f"100% | {cost:.1f}" for cost in costs_us.values()) + " |")
    return "\n".join(lines)


def _order(name: str, found: Mapping[str, Mapping[str, float]]) -> float:
    first = next(iter(found.values()))
    return -first.get(name, 0.0)


def measure(seconds: float) -> str:
    """Both workloads against one gateway, as text."""
    with (
        tempfile.TemporaryDirectory(prefix="phases-") as folder,
        serving(PEERS["tidegate-protocol"], Path(folder)) as target,
    ):
        subprocess.run(_plain(target.url, 1.0), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        costs_us = {
            "plain request, 1 KB": _cost_us(target, _plain(target.url, seconds), "requests"),
            "chunk of a stream": _cost_us(target, _streams(target.url, seconds), "chunks"),
        }
        found = {
            "plain request, 1 KB": profiled(target, _plain(target.url, seconds + 2), seconds),
            "chunk of a stream": profiled(target, _streams(target.url, seconds + 2), seconds),
        }
    where = report.machine()
    intro = (
        f"{where['date']}, commit {where['commit']}. {where['cpu']}, Python {where['python']}. Protocol edge; "
        f"32 connections; 200 streams of 50 chunks a second. py-spy at {RATE_HZ} Hz for {seconds:g} s each."
    )
    return f"{intro}\n\n{markdown(costs_us, found)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.phases", description="CPU time by phase.")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each workload is profiled")
    parser.add_argument("--write", type=Path, help="put the table between this page's markers")
    options = parser.parse_args(argv)
    if not Path(sys.executable).with_name("py-spy").exists():
        print("skipped: py-spy is not installed", file=sys.stderr)
        return 0
    text = measure(options.seconds)
    print(text)
    if options.write is not None:
        report.insert(options.write, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
