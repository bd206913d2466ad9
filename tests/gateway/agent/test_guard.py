from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other kernel lets orphans be found")

FAMILY = textwrap.dedent(
    """
    import os, subprocess, sys, time
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleeper)
    daemon = subprocess.Popen(sleeper, start_new_session=True)
    between = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; "
        "print(subprocess.Popen(%r, start_new_session=True).pid, flush=True)" % sleeper], stdout=subprocess.PIPE)
    orphan = int(between.stdout.readline())
    between.wait()
    print(os.getpid(), child.pid, daemon.pid, orphan, flush=True)
    """
)
"""Prints its own pid and those of a child, of one in a session of its own, and of one whose parent is gone."""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def all_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < end, [pid for pid in pids if alive(pid)]
        time.sleep(0.02)


@contextmanager
def guarded(script: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A guard over this script, and the process ids that it printed."""
    command = [sys.executable, "-m", "gateway.agent.guard", sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 11)", -11)])
def test_nothing_is_left_of_a_server_that_ended_and_its_end_is_passed_on(ending: str, code: int) -> None:
    with guarded(FAMILY + ending) as (guard, family):
        assert len(family) == 4
        assert guard.wait(20) == code
        all_gone(family)


def test_nothing_is_left_when_the_agent_lets_go() -> None:
    with guarded(FAMILY + "time.sleep(600)") as (guard, family):
        assert guard.stdin is not None
        guard.stdin.close()
        assert guard.wait(20) == 128 + signal.SIGKILL or guard.returncode == -signal.SIGKILL
        all_gone(family)


def test_server_ends_when_its_guard_is_killed() -> None:
    with guarded(FAMILY + "time.sleep(600)") as (guard, family):
        guard.kill()
        guard.wait(20)
        all_gone(family[:1])  # the rest is the agent's to kill, which knows the session
        for pid in family[1:]:
            os.kill(pid, signal.SIGKILL)


def test_sigterm_reaches_the_server_alone_which_ends_in_its_own_order() -> None:
    script = textwrap.dedent(
        """
        import os, signal, subprocess, sys
        waits = "import sys; sys.stdin.read(); sys.exit(3)"
        child = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE)
        def end(*_):
            child.stdin.close()
            sys.exit(40 + child.wait())
        signal.signal(signal.SIGTERM, end)
        print(os.getpid(), child.pid, flush=True)
        signal.pause()
        """
    )
    with guarded(script) as (guard, family):
        guard.terminate()
        assert guard.wait(20) == 43
        all_gone(family)


def test_command_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-m", "gateway.agent.guard", "no-such-command"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as guard:
        assert guard.wait(20) == 127
        assert guard.stderr is not None
        assert guard.stderr.read() == "cannot run no-such-command: No such file or directory\n"
