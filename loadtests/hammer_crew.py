"""Starts the hammer's processes, hands them jobs, collects what they say. Every wait has a limit."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

from loadtests.hammer_jobs import Job, LimitResult, PlaceResult, Result
from loadtests.processes import ROOT

START_S = 60.0
"""Eight interpreters that import at once on two busy cores."""
SLACK_S = 30.0
"""How much later than its own end a job may be done."""


class WorkerDied(RuntimeError):
    """A process of the hammer ended or fell silent; the message has what it said last."""


class _Worker:
    def __init__(self, environ: Mapping[str, str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.hammer_worker", str(folder)],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.said: queue.Queue[bytes] = queue.Queue()
        self.log: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self.process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self.said.put(line)
        self.said.put(b"")

    def _read_log(self, pipe: IO[bytes]) -> None:
        self.log.extend(line.decode(errors="replace") for line in pipe)

    def line(self, within_s: float) -> bytes:
        try:
            line = self.said.get(timeout=within_s)
        except queue.Empty:
            raise WorkerDied(f"a worker said nothing for {within_s:.0f} s\n{''.join(self.log[-30:])}") from None
        if not line:
            self._threads[1].join(5.0)
            raise WorkerDied(f"a worker ended with {self.process.poll()}\n{''.join(self.log[-30:])}")
        return line

    def tell(self, job: Job) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(5.0)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


class Crew:
    """The processes, which go from job to job: starting them costs more than most jobs take."""

    def __init__(self, environ: Callable[[int], Mapping[str, str]] = lambda number: {}) -> None:
        """environ: what to add to the environment of each process, by its number."""
        self._environ = environ
        self._folder = tempfile.TemporaryDirectory(prefix="hammer-")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._folder.cleanup()

    def gather(self, count: int) -> None:
        """Have at least so many processes that are ready."""
        fresh = [_Worker(self._environ(number), Path(self._folder.name)) for number in range(len(self._workers), count)]
        self._workers += fresh
        for worker in fresh:
            worker.line(START_S)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Give each job to a process of its own."""
        self.gather(len(jobs))
        for worker, job in zip(self._workers, jobs, strict=False):
            worker.tell(job)

    def finish(self, count: int, within_s: float) -> list[Result]:
        """The answers of the first `count` processes. Raises `WorkerDied`; the processes are ended then."""
        end_s = time.monotonic() + within_s
        results: list[Result] = []
        try:
            for worker in self._workers[:count]:
                file = Path(worker.line(max(0.1, end_s - time.monotonic())).decode().rstrip("\n"))
                results.append(msgspec.json.decode(file.read_bytes(), type=Result))
                file.unlink()
        except BaseException:
            self.close()
            raise
        return results

    def run(self, jobs: Sequence[Job], meanwhile: Callable[[], None] | None = None) -> list[Result]:
        """All jobs at once, to their end. `meanwhile` runs here while they do."""
        self.begin(jobs)
        try:
            if meanwhile is not None:
                meanwhile()
        except BaseException:
            self.close()
            raise
        return self.finish(len(jobs), max(job.seconds for job in jobs) + SLACK_S)

    def limits(self, jobs: Sequence[Job], meanwhile: Callable[[], None] | None = None) -> list[LimitResult]:
        return [result for result in self.run(jobs, meanwhile) if isinstance(result, LimitResult)]

    def places(self, jobs: Sequence[Job], meanwhile: Callable[[], None] | None = None) -> list[PlaceResult]:
        return [result for result in self.run(jobs, meanwhile) if isinstance(result, PlaceResult)]

    def kill(self, index: int) -> None:
        """As a crash or the OOM killer does. The next `gather` starts another."""
        self._workers.pop(index).kill()

    def close(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
