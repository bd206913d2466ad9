"""One process that the demo started: its log, its end, and how to end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends.launch.tether import tethered
from gateway.endings import how_it_ended


class Child:
    """A running (or ended) process with a log file of its own.

    It is started in a session of its own, so that Ctrl-C in the terminal reaches only the demo, which then
    stops its children in order; and tethered, so that it cannot outlive the demo (backends.launch.tether).
    """

    def __init__(self, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        log: Path,
        environ: Mapping[str, str],
        *,
        reports: bool = False,
    ) -> Child:
        """Start a command; what it prints goes to the end of `log`.

        One that `reports` has its standard output read through `read_line` instead. It must print little:
        what nobody reads would in the end stop it.
        """
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *tethered(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if reports else file,
                stderr=file,
                env=environ,
                start_new_session=True,
            )
        return cls(name, log, process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def read_line(self) -> str:
        """The next line it prints; empty when it has closed its standard output, as it does by ending."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode(errors="replace").strip()

    async def ended(self) -> str:
        """Wait for its end; how it ended, as the end of a sentence."""
        code = await self._process.wait()
        return how_it_ended(code)

    async def stop(self, grace_s: float) -> None:
        """Ask it to end (SIGTERM), and after `grace_s` end it."""
        if not self.running:
            return
        self._send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End it now. Waiting for `ended` is still the caller's."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        # Not Process.terminate or kill: they look first whether the process has ended and thereby collect its exit
        # code, which asyncio's own watcher (Python 3.11) then misses and reports as 255.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log, indented, for a terminal."""
        try:
            with self.log.open(errors="replace") as file:
                last = deque(file, lines)
        except OSError:
            return "    (no log)"
        return "\n".join(f"    {line.rstrip()}" for line in last) or "    (its log is empty)"
