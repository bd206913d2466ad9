"""Count the system calls that a gateway makes per request: a figure that a busy machine cannot move.

``python -m loadtests.syscalls`` prints them for Tidegate's protocol edge at 1 KB and 32 connections. The
least that a proxy can do is 4 (read and write on either side) and a little for the event loop.
Needs strace and the right to trace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtests.peers import MODEL, PEERS, Peer, serving
from loadtests.processes import LOAD_CORE, ROOT, StartFailed, pinned, python, session_pids

ATTACH_S = 10.0


@dataclass(frozen=True, slots=True)
class Syscalls:
    requests: int
    per_request: float
    by_name: dict[str, float]
    """Calls per request, the most frequent first; those below one in a hundred requests are left out."""


def unavailable() -> str | None:
    """Why system calls cannot be counted here."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        with _traced(sleeper.pid, Path(os.devnull)):
            return None
    except StartFailed as error:
        return str(error)
    finally:
        sleeper.kill()
        sleeper.wait()


def measure(peer: Peer, *, requests: int = 5_000, connections: int = 32) -> Syscalls:
    """Count over so many requests, after a warm-up with as many connections."""
    with tempfile.TemporaryDirectory(prefix="syscalls-") as name:
        folder = Path(name)
        with serving(peer, folder) as target:
            _ask(target.url, 1_000, connections)
            summary = folder / "strace.txt"
            with _traced(target.pid, summary):
                _ask(target.url, requests, connections)
        return parse(summary.read_text(), requests)


def parse(summary: str, requests: int) -> Syscalls:
    """Read the table that ``strace -c`` prints: % time, seconds, usecs/call, calls, [errors,] name."""
    calls: dict[str, int] = {}
    for line in summary.splitlines():
        fields = line.split()
        if len(fields) in (5, 6) and fields[3].isdigit() and fields[-1] != "total":
            calls[fields[-1]] = int(fields[3])
    per_name = {name: round(count / requests, 3) for name, count in sorted(calls.items(), key=lambda x: -x[1])}
    frequent = {name: share for name, share in per_name.items() if share >= 0.01}
    return Syscalls(requests, round(sum(calls.values()) / requests, 3), frequent)


@contextlib.contextmanager
def _traced(leader: int, summary: Path) -> Iterator[None]:
    """Count the calls of all processes of a session while the block runs."""
    pids = session_pids(leader)
    columns = "time-percent,time-total,avg-time,calls,errors,name"
    command = ["strace", "-c", "-f", "-U", columns, "-o", str(summary)]
    for pid in pids:
        command += ["-p", str(pid)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_attached(tracer, pids)
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=ATTACH_S)


def _wait_attached(tracer: subprocess.Popen[str], pids: list[int]) -> None:
    """Wait until every process has a tracer: /proc tells."""
    deadline = time.monotonic() + ATTACH_S
    while tracer.poll() is None and time.monotonic() < deadline:
        statuses = [Path("/proc", str(pid), "status").read_text() for pid in pids]
        if all("TracerPid:\t0\n" not in status for status in statuses):
            return
        time.sleep(0.02)
    tracer.kill()
    _, message = tracer.communicate()
    raise StartFailed(f"strace did not attach: {message}")


def _ask(url: str, requests: int, connections: int) -> None:
    command = python("-m", "loadtests.requests", "--url", url, "--model", MODEL)
    command += [f"--requests={requests}", f"--connections={connections}"]
    with pinned(LOAD_CORE):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout)
    if result["errors"] or result["requests"] != requests:
        raise StartFailed(f"the load had errors: {result}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.syscalls", description="System calls per request.")
    parser.add_argument("--peer", choices=[name for name in PEERS if name != "direct"], default="tidegate-protocol")
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    reason = unavailable() or PEERS[options.peer].missing
    if reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    found = measure(PEERS[options.peer], requests=options.requests)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        names = ", ".join(f"{name} {share:.2f}" for name, share in found.by_name.items())
        print(f"{options.peer}: {found.per_request:.2f} system calls per request: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
