"""The processes of one server: the command that the guard runs, its log, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from gateway.agent.logs import LogReader, moved_aside
from gateway.endings import how_it_ended

MARK: Final = "TIDEGATE_LAUNCHED"
"""Environment variable by which what is left of a server can be told from everything else."""
GUARD_WITHIN_S = 15.0
"""For the guard to end everything (`gateway.agent.guard.CLEAN_UP_S`, and some more)."""


class StartError(Exception):
    """The process could not be started; the message is the end of a sentence."""


class ServerProcess:
    """A server that runs, or has run."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, mark: str) -> None:
        self.log = LogReader(log)
        self._process = process
        self._mark = mark

    @classmethod
    async def start(cls, command: Sequence[str], log: Path, environ: Mapping[str, str]) -> ServerProcess:
        """Start a command; what it prints goes to `log`, whose former content is moved aside. Raises `StartError`."""
        mark = secrets.token_hex(8)
        guard = [sys.executable, "-m", "gateway.agent.guard", *command]
        try:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            moved_aside(log)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"was not started: its log {log}: {error.strerror}") from error
        try:
            process = await asyncio.create_subprocess_exec(
                *guard,
                stdin=asyncio.subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                env={**environ, MARK: mark},
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"was not started: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return cls(process, log, mark)

    @property
    def pid(self) -> int:
        """Of the guard, whose only child the server is."""
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ended(self) -> str:
        """Wait until nothing of it is left; how it ended, as the end of a sentence."""
        code = await self._process.wait()
        await asyncio.to_thread(end_marked, self._mark)
        return how_it_ended(code)

    def terminate(self) -> None:
        """Ask the server to end (SIGTERM)."""
        # Not Process.terminate: it looks first whether the process has ended and thereby collects its exit code, which
        # asyncio's own watcher (Python 3.11) then misses and reports as 255.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End everything now. Waiting for `ended` is still the caller's."""
        if self.running and self._process.stdin is not None:
            self._process.stdin.close()
            asyncio.get_running_loop().call_later(GUARD_WITHIN_S, self._kill_guard)

    def _kill_guard(self) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def end_marked(mark: str) -> int:
    """Kill what a guard that was killed itself has left behind; how many processes that were. Linux only."""
    wanted, found = f"{MARK}={mark}".encode(), 0
    try:
        names = os.listdir("/proc")
    except OSError:
        return 0
    for name in names:
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                os.kill(int(name), signal.SIGKILL)
                found += 1
    return found
