"""Writes log lines from a thread of its own, so that a full pipe or a slow disk stops nobody but it.

Standard error is mostly a pipe: of a container's runtime, of systemd, of a terminal. When nobody reads it, a write to
it waits, and an event loop that writes waits with it. Here lines stand in a bounded queue instead; those beyond it are
counted and lost, and whoever logs goes on.
"""

from __future__ import annotations

import os
import select
import stat
import threading
from collections import deque
from typing import Protocol

MAX_WAITING_LINES = 10_000
"""About ten megabytes, tracebacks aside."""
LOOK_EVERY_S = 0.25
"""How often the sources are asked for lines; what is said with `put` is written at once."""
_TRY_AGAIN_S = 0.5
"""How long to wait for room, in a pipe that somebody has set not to make writers wait."""
_FILE_BATCH_BYTES = 65_536


class LineSource(Protocol):
    """Something that has lines to be written now and then."""

    def lines(self) -> list[bytes]:
        """Some of the lines that wait, each with its end; empty: none does. Called by the writer's thread."""


class LineWriter:
    """Writes to one file descriptor, which it does not close. All threads may use it."""

    def __init__(self, fd: int, *, max_lines: int = MAX_WAITING_LINES) -> None:
        self.lost = 0
        """Lines that were not written: too many waited, or the descriptor does not take any."""
        self._fd = fd
        self._max_lines = max_lines
        self._batch_bytes = _batch_bytes(fd)
        self._waiting: deque[bytes | threading.Event] = deque()
        """Lines; and events, to be set when what was before them is written."""
        self._sources: tuple[LineSource, ...] = ()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, line: bytes) -> None:
        """Have a line written, with its end. Never waits."""
        if len(self._waiting) >= self._max_lines:
            self.lost += 1
        else:
            self._say(line)

    def follow(self, source: LineSource) -> None:
        """Ask it for lines from now on."""
        self._sources = (*self._sources, source)
        self._start()
        self._wake.set()  # the thread may be waiting for `put` alone

    def flush(self, within_s: float) -> bool:
        """Wait until all that was said by now is written; False when that takes longer."""
        if self._thread is None:
            return True
        written = threading.Event()
        self._say(written)
        return written.wait(within_s)

    def _say(self, what: bytes | threading.Event) -> None:
        self._waiting.append(what)
        self._start()
        self._wake.set()

    def _start(self) -> None:
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    # A daemon: a process must be able to end while this waits for a pipe that nobody reads.
                    self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait(LOOK_EVERY_S if self._sources else None)
            self._wake.clear()
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._write([each for each in waiting if isinstance(each, bytes)])
            for source in self._sources:
                while lines := source.lines():
                    self._write(lines)
            for each in waiting:
                if isinstance(each, threading.Event):
                    each.set()

    def _write(self, lines: list[bytes]) -> None:
        """In pieces that a pipe takes whole, so that the lines of several processes do not mix."""
        piece: list[bytes] = []
        size = 0
        for line in lines:
            if piece and size + len(line) > self._batch_bytes:
                self._write_piece(piece)
                piece, size = [], 0
            piece.append(line)
            size += len(line)
        if piece:
            self._write_piece(piece)

    def _write_piece(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                select.select((), (self._fd,), (), _TRY_AGAIN_S)
            except OSError:  # the disk is full, or the reader has gone; there is nobody to tell
                self.lost += len(lines)
                return


def _batch_bytes(fd: int) -> int:
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        regular = False
    return _FILE_BATCH_BYTES if regular else select.PIPE_BUF
