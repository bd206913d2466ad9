"""Where the overrides of a gateway are kept: one file in the state directory, replaced as a whole.

Gateways of one user share that directory, so each configuration file has a file of its own, named by its path. Two
gateways that serve one configuration file share their overrides: each takes in the other's at its next reload.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import msgspec

from gateway.steering.overrides import Book, rule_for
from gateway.whole_files import replace_file

logger = logging.getLogger("tidegate")

MAX_BYTES = 16 * 2**20


class FileProblem(Exception):
    """The overrides cannot be kept; the message says why, for operators."""


class OverrideFile:
    """One gateway's. Everything here blocks."""

    def __init__(self, state_dir: Path, config: Path | None) -> None:
        name = "environment" if config is None else blake2b(os.fsencode(config.resolve()), digest_size=6).hexdigest()
        self.path = state_dir / f"overrides-{name}.json"

    def read(self) -> Book:
        """What is kept; an empty book where there is none, or none that can be used: that one is put aside."""
        try:
            text = self._text()
            if text is None:
                return Book()
            book = msgspec.json.decode(text, type=Book)
            if any(rule_for(each.path) is None for each in book.overrides):
                raise ValueError("it changes a setting that may not be changed while the gateway runs")
        except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
            self._put_aside(error)
            # Above any version that somebody may have seen of the lost one.
            book = Book(version=int(time.time()))
            with suppress(FileProblem):
                self.write(book)
        return book

    def write(self, book: Book) -> None:
        """Keep a book in place of what is there, whole or not at all. Raises `FileProblem`."""
        try:
            self._make_folder()
            replace_file(self.path, msgspec.json.format(msgspec.json.encode(book), indent=1) + b"\n")
        except OSError as error:
            raise FileProblem(f"{error.filename or self.path}: {error.strerror or error}") from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other gateways of the same configuration from writing meanwhile. Raises `FileProblem`."""
        try:
            self._make_folder()
            descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FileProblem(f"{error.filename or self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_folder(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _text(self) -> bytes | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ValueError("others than its owner can write it")
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return text

    def _put_aside(self, error: Exception) -> None:
        aside = self.path.with_name(f"{self.path.name}.broken-{int(time.time())}")
        try:
            os.replace(self.path, aside)
        except OSError as failure:
            logger.error(
                "the overrides in %s cannot be used, and are left out: %s. The file cannot be put aside either: %s",
                self.path,
                error,
                failure.strerror or failure,
            )
            return
        logger.error("the overrides in %s cannot be used, and are left out: %s. It is %s now", self.path, error, aside)


def override_file(state_dir: Path | None, config: Path | None) -> OverrideFile | None:
    """None where nothing can be kept."""
    return None if state_dir is None else OverrideFile(state_dir, config)
