"""Run a command so that the kernel ends it when the process that started it ends, however that happened.

    python -m backends.launch.tether PARENT_PID COMMAND [ARGUMENT ...]

A supervisor stops its children in order; this is for the case where it cannot, because it was killed. On
Linux the kernel keeps the promise (`PR_SET_PDEATHSIG`, prctl(2)): it outlasts exec, so the command itself
needs to know nothing. Other systems have no such call; there the command runs untethered, and only an orderly
stop ends it.

The kernel watches the *thread* that started this process: start it from one that lives as long as the
supervisor, which for an asyncio program is the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tethered(command: Sequence[str]) -> list[str]:
    """The same command, to be started as a direct child of this process, that will not outlive it."""
    return [sys.executable, "-m", "backends.launch.tether", str(os.getpid()), *command]


def tie_to(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent, which is to be `parent_pid`, dies.

    SIGKILL, because nobody is left to wait for an orderly end. Raises `ProcessLookupError` where the parent
    was gone before the kernel was asked: a signal for that will never come.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise ProcessLookupError(f"process {parent_pid} is not (or no longer) the parent of this one")


def main(argv: Sequence[str]) -> int:
    """Tie this process to its parent, then become the command."""
    if len(argv) < 2 or not argv[0].isdecimal():
        print("usage: python -m backends.launch.tether PARENT_PID COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        tie_to(int(argv[0]))
    except ProcessLookupError as error:
        print(f"not started: {error}", file=sys.stderr)
        return 1
    try:
        os.execvp(argv[1], list(argv[1:]))
    except OSError as error:
        print(f"cannot run {argv[1]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
