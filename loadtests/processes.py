"""Start a process on a core of its own, wait until it answers, read what it used from /proc. Linux only."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GATEWAY_CORE, LOAD_CORE = 0, 1
START_S = 20.0
STOP_S = 10.0


class StartFailed(RuntimeError):
    """A process ended or stayed silent instead of becoming ready; the message has the end of its log."""


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Children started inside run on this core only. Does nothing where there are no two cores."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2 or core not in allowed:
        yield
        return
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def running(command: Sequence[str], *, log: Path, core: int, port: int, ready: str, cwd: Path = ROOT) -> Iterator[int]:
    """Run a server until the block ends; yields its pid once GET ready on the port answers 200."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    with log.open("wb") as output, pinned(core):
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children share its session id: one key for CPU, memory and the end
        )
    try:
        wait_ready(process, port, ready, log)
        yield process.pid
    finally:
        stop(process)


def wait_ready(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if status(port, path) == http.HTTPStatus.OK:
            return
        time.sleep(0.05)
    ended = f"ended with {process.returncode}" if process.returncode is not None else "did not become ready"
    tail = log.read_text(errors="replace")[-1500:]
    raise StartFailed(f"{' '.join(map(str, process.args))} {ended}:\n{tail}")  # type: ignore[arg-type]


def status(port: int, path: str) -> int | None:
    """What GET says on this port of 127.0.0.1; None: nothing, or nothing that is HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for the whole session when that is not enough."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def session_pids(pid: int) -> list[int]:
    """All live processes of the session that pid leads."""
    return [int(fields[0]) for fields in _session(pid)]


def _session(pid: int) -> Iterator[list[str]]:
    """The fields of /proc/PID/stat after the name, for each process of the session that pid leads."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                text = Path("/proc", entry, "stat").read_text()
                fields = text[text.rindex(")") + 2 :].split()
                if int(fields[3]) == pid:
                    yield [entry, *fields]


def cpu_seconds(pid: int) -> float:
    """User and system time so far of the session that pid leads: all threads, all live children."""
    ticks = sum(int(fields[12]) + int(fields[13]) for fields in _session(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of that session; pages that processes share count once for each."""
    pages = sum(int(fields[22]) for fields in _session(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
