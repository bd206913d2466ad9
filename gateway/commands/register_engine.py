"""The engine that `tidegate register` speaks for: whether it answers, and its process, if that is ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence

from backends.dialects import DIALECTS
from backends.dialects.protocol import NotOffered, Readiness
from backends.launch.tether import tethered
from backends.side import SideChannel, SideChannelError

CHECK_S = 2.0
DOUBTFUL_CHECK_S = 0.5
"""While it starts, and after a check that failed."""
CHECK_WITHIN_S = 5.0
FAILED_CHECKS = 3
"""In a row, after which the engine counts as away."""
READ_BYTES = 65_536
LAST_WORDS_S = 1.0
"""For passing on what the engine has written last."""
LINE_BYTES = 65_536
"""Longest line that is read for progress; all of it is passed on."""


class Checks:
    """Asks the engine whether it is ready, and counts."""

    def __init__(self, side: SideChannel, ready_path: str | None, engine: str | None) -> None:
        """Without a path the engine is asked as the gateway does; without both, `/health`."""
        self._side = side
        self._path = ready_path
        self._dialect = DIALECTS.get(engine or "")
        self._failed = 0
        self.ready = False
        self.reason = "it has not been asked yet"
        """Why it does not count as ready."""

    async def check(self) -> bool:
        """Ask once; returns whether it counts as ready, which it does not after `FAILED_CHECKS` failures in a row."""
        problem = await self._problem()
        if problem is None:
            self._failed, self.ready = 0, True
        else:
            self._failed += 1
            self.reason = problem
            if self._failed >= FAILED_CHECKS:
                self.ready = False
        return self.ready

    @property
    def pause_s(self) -> float:
        """Until the next check."""
        return DOUBTFUL_CHECK_S if self._failed or not self.ready else CHECK_S

    async def busy(self) -> bool:
        """Whether the engine says that it has requests; one that does not say, or not answer, has none."""
        if self._dialect is None:
            return False
        try:
            load = await self._dialect.load(self._side, None)
        except (NotOffered, SideChannelError):
            return False
        return bool((load.running or 0) + (load.waiting or 0))

    async def _problem(self) -> str | None:
        try:
            if self._path is None and self._dialect is not None:
                with contextlib.suppress(NotOffered):
                    # A key that is missing here is the gateway's to have; the engine is there.
                    ready = await self._dialect.probe(self._side, None) in (Readiness.READY, Readiness.UNAUTHORIZED)
                    return None if ready else f"{self._side.address} is not ready yet"
            answer = await self._side.get(self._path or "/health")
        except SideChannelError as error:
            return str(error)
        return None if answer.ok else f"{answer.url} answered {answer.status}"


class Engine:
    """The engine's process, in a session of its own, and tethered: it does not outlive this one."""

    def __init__(self, process: asyncio.subprocess.Process, passing: Sequence[threading.Thread]) -> None:
        self._process = process
        self._passing = passing
        self.stopping = False

    @classmethod
    async def start(cls, command: Sequence[str], environ: Mapping[str, str], read: Callable[[str], None]) -> Engine:
        """Start it. Its output is passed on as it comes, and each line of it told to `read`, in the event loop."""
        out, err = os.pipe(), os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *tethered(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out[1],
                stderr=err[1],
                env=environ,
                start_new_session=True,
            )
        except BaseException:
            os.close(out[0])
            os.close(err[0])
            raise
        finally:
            os.close(out[1])
            os.close(err[1])
        loop = asyncio.get_running_loop()
        # Threads, since whoever reads our own output may be slow: that must not keep us from renewing leases.
        passing = [
            threading.Thread(target=_pass_on, args=(source, target, loop, read), daemon=True)
            for source, target in ((out[0], 1), (err[0], 2))
        ]
        for each in passing:
            each.start()
        return cls(process, passing)

    async def ended(self) -> int:
        """Wait for its end, and end whatever it has left behind; returns the exit code for a shell.

        0 where it was ended by the SIGTERM that it was stopped with: it had no other way to say so.
        """
        code = await self._process.wait()
        self._signal_all(signal.SIGKILL)
        for each in self._passing:
            await asyncio.to_thread(each.join, LAST_WORDS_S)
        if code == -signal.SIGTERM and self.stopping:
            return 0
        return 128 - code if code < 0 else code

    async def stop(self, within_s: float) -> int:
        """SIGTERM, and SIGKILL after so many seconds; the exit code."""
        self.stopping = True
        self._signal_all(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        return await self.ended()

    def kill(self) -> None:
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        """To its whole session: engines have many processes, and a shell before them hears signals alone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _pass_on(source: int, target: int, loop: asyncio.AbstractEventLoop, read: Callable[[str], None]) -> None:
    """In a thread, until everybody who can write to `source` has closed it."""
    rest = b""
    while True:
        piece = os.read(source, READ_BYTES)
        if not piece:
            break
        with contextlib.suppress(OSError):  # nobody reads us any more; the engine is not to suffer from that
            left = memoryview(piece)
            while left:
                left = left[os.write(target, left) :]
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        rest = rest[-LINE_BYTES:]
        text = [line.decode(errors="replace") for line in lines if line.strip()]
        if text:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_read_all, text, read)
    os.close(source)


def _read_all(lines: Sequence[str], read: Callable[[str], None]) -> None:
    for line in lines:
        read(line)
