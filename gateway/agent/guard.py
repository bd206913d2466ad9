"""Stands between the agent and one server, and ends all that the server has started, however either of them ends.

    python -m gateway.agent.guard COMMAND [ARGUMENT ...]

A model server is many processes: schedulers, tokenizers, one worker for each GPU. The kernel's promise of
`backends.launch.tether` is for one process alone, and a server that is killed leaves its workers behind with the GPUs'
memory in their hands. So this one

- starts the command in a session of its own, tied to itself;
- waits at its standard input, whose other end the agent holds: when that is closed, by order or because the agent was
  killed, everything ends at once;
- passes SIGTERM on to the command alone, which then ends its own children in its own order;
- takes in descendants whose parents have ended (Linux: PR_SET_CHILD_SUBREAPER, prctl(2)), so that it can find them, and
  kills those that are left when the command has ended;
- ends as the command did: with its exit code, or by its signal.

Standard library only, and little of it: there is one for each server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from backends.launch.tether import tie_to

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
CLEAN_UP_S = 10.0
"""For killed processes to vanish. One in the middle of a driver's call takes a while; a few never do."""


class _Children:
    """The command, and what came after it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.status: int | None = None
        """How the command ended, as `os.waitpid` says it; None: it runs."""
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(command, parent)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = status

    def terminate(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)

    def clean_up(self) -> None:
        """End everything that is left."""
        end = time.monotonic() + CLEAN_UP_S
        while time.monotonic() < end:
            left = list(_descendants(os.getpid()))
            if self.status is None:
                left.append(self.pid)
            _kill(-self.pid)
            for pid in left:
                _kill(pid)
            self.reap()
            if not left:
                return
            time.sleep(0.01)


def _become(command: Sequence[str], parent: int) -> None:
    """In the child: turn into the command. Does not return."""
    code = 127
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        tie_to(parent)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(code)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _descendants(root: int) -> Iterator[int]:
    """Processes below `root`, those of sessions of their own too; none where there is no /proc. Not ones that have
    ended and wait for somebody to ask how."""
    parents: dict[int, int] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    ended = set()
    for name in names:
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            parents[int(name)] = int(parent)
            if state in (b"Z", b"X"):
                ended.add(int(name))
    below = {root}
    found = True
    while found:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        found = bool(more)
        below |= more
    yield from below - {root} - ended


def _subreaper() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_as(status: int) -> int:
    """The exit code, or an end by the same signal."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left its own
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def main(argv: Sequence[str]) -> int:
    """Run one command to its end; returns its exit code."""
    if not argv:
        print("usage: python -m gateway.agent.guard COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(awake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _subreaper()
    children = _Children(argv)
    while True:
        children.reap()
        if children.status is not None:
            break
        if told:
            told.clear()
            children.terminate()
        ready, _, _ = select.select([awake, 0], [], [])
        if awake in ready:
            os.read(awake, 4096)
        if 0 in ready and not os.read(0, 4096):
            break
    children.clean_up()
    return 128 + signal.SIGKILL if children.status is None else _end_as(children.status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
