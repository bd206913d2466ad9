"""Reads the configuration as it is to be in force: file, environment, command line, and what operators have changed.

An override that the rest of the configuration does not go with any more (the file was changed under it) is left out
and reported: it must keep no gateway from starting, nor a file from being reloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.config import ConfigError, Reading, Settings, read_all
from gateway.config.found import Found
from gateway.config.layer import Layer
from gateway.config.lines import Document
from gateway.steering.files import OverrideFile
from gateway.steering.overrides import Book, shown

logger = logging.getLogger("tidegate")


@dataclass(frozen=True, slots=True)
class Reads:
    """What a reading has found."""

    reading: Reading
    plain: Reading
    """The same without overrides."""
    book: Book
    refused: Mapping[tuple[str, ...], str]
    """Overrides that are not in force, and why."""


class ConfigReader:
    """What a reload calls. Everything here blocks; one call at a time."""

    def __init__(
        self,
        path: Path | None,
        environ: Mapping[str, str],
        options: Mapping[str, str] | None = None,
        *,
        check: Callable[[Settings], None] = lambda _: None,
        file: OverrideFile | None = None,
    ) -> None:
        """`check` raises a `ConfigError` for settings that this gateway cannot serve. `file`: where overrides are kept;
        None: nowhere, so that there are none."""
        self.path = path
        self.file = file
        self._environ = dict(environ)
        self._options = dict(options or {})
        self._check = check
        self._last: Reads | None = None
        self.found: Callable[[], Found] = dict
        """Replicas that were discovered, as they are now (`gateway.members`)."""

    @property
    def last(self) -> Reads:
        """The last reading that could be used."""
        if self._last is None:
            raise RuntimeError("nothing has been read yet")
        return self._last

    def __call__(self) -> Settings:
        """The file as it is now. Raises `ConfigError` for what is wrong with it, whatever the overrides."""
        return self._take(None)

    def again(self) -> Settings:
        """The file as it was read last, with the overrides as they are now: a change of a weight must not put half of
        somebody's editing into force."""
        return self._take(self.last.reading.document)

    def trial(self, book: Book) -> Reading:
        """What would be in force with these overrides. Raises `ConfigError` for anything that is wrong with them."""
        return self._read(book.layer, self.last.reading.document, self.found())

    def _take(self, document: Document | None) -> Settings:
        book = Book() if self.file is None else self.file.read()
        found = self.found()
        plain = self._read((), document, found)
        document = plain.document
        refused: dict[tuple[str, ...], str] = {}
        reading = plain
        if book.overrides:
            try:
                reading = self._read(book.layer, document, found)
            except ConfigError:
                reading, refused = self._as_many(book, plain, found)
        for path, reason in refused.items():
            logger.warning("the override of %s is left out: %s", shown(path), reason)
        for path in reading.unused:
            logger.warning("the override of %s changes nothing: the configuration has no such thing", shown(path))
        self._last = Reads(reading, plain, book, refused)
        return reading.settings

    def _as_many(self, book: Book, plain: Reading, found: Found) -> tuple[Reading, dict[tuple[str, ...], str]]:
        """As many of the overrides as go together, the older before the newer."""
        kept: Layer = ()
        refused: dict[tuple[str, ...], str] = {}
        reading, waiting = plain, [book.layer]
        while waiting:
            layer = waiting.pop()
            try:
                reading = self._read([*kept, *layer], plain.document, found)
                kept = [*kept, *layer]
            except ConfigError as error:
                if len(layer) == 1:
                    refused[layer[0][0]] = f"{error.problems[0].path}: {error.problems[0].message}"
                else:  # by halves: the few that do not go with the rest are found by few readings
                    half = len(layer) // 2
                    waiting += [layer[half:], layer[:half]]
        return reading, refused

    def _read(self, layer: Layer, document: Document | None, found: Found) -> Reading:
        reading = read_all(self.path, self._environ, self._options, layer=layer, document=document, found=found)
        self._check(reading.settings)
        return reading
