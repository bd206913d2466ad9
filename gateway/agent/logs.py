"""What servers print: a file for each, of bounded size, that is read as it grows.

The server writes into the file itself, so that nothing of ours can hold it up. Where the file has grown too long its
content is moved aside and the file emptied: it is written with O_APPEND, so that the server goes on at its beginning.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Final

MAX_LOG_BYTES: Final = 32 << 20
"""Of one file; a server that prints a line for each request fills it in hours."""
KEPT: Final = 3
"""Older files: those of the starts before, or of the hours before."""
TAIL_LINES: Final = 200
_READ_BYTES = 1 << 20
_LINE_CHARACTERS = 4096


def moved_aside(path: Path) -> None:
    """Make room for a new file: `x.log` becomes `x.log.1`, that one `x.log.2`, and so on. An empty one stays."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > 0:
            _shift(path)
            path.replace(_older(path, 1))


def _shift(path: Path) -> None:
    for number in range(KEPT - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            _older(path, number).replace(_older(path, number + 1))


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


class LogReader:
    """Reads a server's log as it grows."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines."""
        self._max_bytes = max_bytes
        self._at = 0
        self._rest = ""

    def read(self) -> list[str]:
        """The lines since the last call, about a megabyte at most. What a progress bar overwrites (a carriage return)
        is a line too."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._at:  # somebody has emptied it
                    self._at = 0
                file.seek(self._at)
                data = file.read(_READ_BYTES)
        except OSError:
            return []
        self._at += len(data)
        text = self._rest + data.decode(errors="replace").replace("\r", "\n")
        *lines, rest = text.split("\n")
        self._rest = rest[-_LINE_CHARACTERS:]
        lines = [line[:_LINE_CHARACTERS] for line in lines if line]
        self.tail.extend(lines)
        if self._at >= self._max_bytes:
            self._empty()
        return lines

    def _empty(self) -> None:
        """What is printed between the copy and the end of the file is lost: some lines, after megabytes of others."""
        with contextlib.suppress(OSError):
            _shift(self.path)
            shutil.copyfile(self.path, _older(self.path, 1))
            os.truncate(self.path, 0)
            self._at = 0

    def last(self) -> list[str]:
        """All lines up to now that `tail` has room for, the unfinished one too."""
        while self.read():
            pass
        return [*self.tail, self._rest] if self._rest else list(self.tail)
