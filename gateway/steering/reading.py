"""Reads the configuration as it is to be in force: file, environment, command line, and what operators have changed.

An override that the rest of the configuration does not go with any more (the file was changed under it) is left out
and reported: it must keep no gateway from starting, nor a file from being reloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.config import ConfigError, Reading, Settings, read_all
from gateway.config.found import Found
from gateway.config.layer import Layer
from gateway.config.lines import Document
from gateway.steering.files import OverrideFile
from gateway.steering.overrides import Book, shown

logger = logging.getLogger("tidegate")

MAX_ATTEMPTS = 100
"""Readings to find out which replicas that were found do not go with the file: enough for ten among a thousand."""

_Entry = tuple[str, Mapping[str, Any]]
"""Pool and replica."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a reading has found."""

    reading: Reading
    plain: Reading
    """The same without overrides."""
    book: Book
    refused: Mapping[tuple[str, ...], str]
    """Overrides that are not in force, and why."""
    left_out: Mapping[tuple[str, str], str]
    """Replicas that were found and do not go with the rest of the configuration, by pool and name, and why."""


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
        return self._read(book.layer, self.last.reading.document, _without(self.found(), self.last.left_out))

    def _take(self, document: Document | None) -> Settings:
        book = Book() if self.file is None else self.file.read()
        found = self.found()
        plain, left_out = self._with_found(document, found)
        found = _without(found, left_out)
        document = plain.document
        refused: dict[tuple[str, ...], str] = {}
        reading = plain
        if book.overrides:
            try:
                reading = self._read(book.layer, document, found)
            except ConfigError:
                reading, refused = self._as_many(book, plain, found)
        self._last, before = Reads(reading, plain, book, refused, left_out), self._last
        self._say(before)
        return reading.settings

    def _say(self, before: Reads | None) -> None:
        """What is left out, once: replicas that come and go have the file read again, and again."""
        now = self.last
        for path, reason in now.refused.items():
            if before is None or before.refused.get(path) != reason:
                logger.warning("the override of %s is left out: %s", shown(path), reason)
        for path in now.reading.unused:
            if before is None or path not in before.reading.unused:
                logger.warning("the override of %s changes nothing: the configuration has no such thing", shown(path))
        for (pool, name), reason in now.left_out.items():
            if before is None or before.left_out.get((pool, name)) != reason:
                logger.warning("%s: %s was found, and is left out: %s", pool, name, reason)

    def _with_found(self, document: Document | None, found: Found) -> tuple[Reading, dict[tuple[str, str], str]]:
        """The file with as many of the replicas that were found as go with it: one that somebody else has told of must
        keep nobody from reading it. Raises `ConfigError` for what is wrong with the file itself."""
        try:
            return self._read((), document, found), {}
        except ConfigError as error:
            if not found:
                raise
            problem = error
        reading = self._read((), document, {})
        left_out: dict[tuple[str, str], str] = {}
        kept: list[_Entry] = []
        waiting = [[(pool, each) for pool, several in found.items() for each in several]]
        for attempt in range(MAX_ATTEMPTS):
            several = waiting.pop()
            try:
                if attempt == 0:
                    raise problem  # all of them: known already
                reading = self._read((), reading.document, _by_pool([*kept, *several]))
                kept += several
            except ConfigError as error:
                if len(several) == 1:
                    pool, entry = several[0]
                    left_out[pool, entry["name"]] = f"{error.problems[0].path}: {error.problems[0].message}"
                else:
                    half = len(several) // 2
                    waiting += [several[half:], several[:half]]
            if not waiting:
                break
        for pool, entry in (each for several in waiting for each in several):
            left_out[pool, entry["name"]] = "too many that were found do not go with the configuration"
        return reading, left_out

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


def _by_pool(entries: Sequence[_Entry]) -> Found:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for pool, entry in entries:
        found.setdefault(pool, []).append(entry)
    return found


def _without(found: Found, left_out: Mapping[tuple[str, str], str]) -> Found:
    if not left_out:
        return found
    return _by_pool(
        [(pool, each) for pool, several in found.items() for each in several if (pool, each["name"]) not in left_out]
    )
