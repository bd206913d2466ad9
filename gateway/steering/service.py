"""Changes the configuration in force: overrides, their undoing, and reloads. One change at a time.

A change is tried first, against the file as it was read last and all of the configuration's own checks; then written
into the audit, then into the file of overrides, then put into force through the same reload that SIGHUP asks for. No
request is lost by it: those under way end by the settings they began with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.requests import Request

from gateway.admin.desk import Desk
from gateway.admin.guard import operator_of
from gateway.config import ConfigError, Reading, Settings, restart_only_changes
from gateway.config.environment import Overrides
from gateway.config.lines import Document
from gateway.config.origins import Row, rows_of
from gateway.errors import GatewayError
from gateway.policy import Operator, RoleRequired, Who
from gateway.sources import ask_all
from gateway.steering.at_worker import Stamp
from gateway.steering.errors import (
    BadOverride,
    ConfigUnusable,
    NoStateDirectory,
    NotChangeable,
    UnknownSetting,
    UnknownVersion,
    VersionConflict,
    VersionRequired,
)
from gateway.steering.files import FileProblem, OverrideFile
from gateway.steering.overrides import (
    MAX_OVERRIDES,
    NOT_SET,
    Book,
    Change,
    Path,
    changed,
    differences,
    restored,
    rule_for,
    shown,
    undoing,
)
from gateway.steering.reading import ConfigReader
from routing.policies import POLICY_NAMES

SETTLE_S = 5.0
"""How long a change waits for all workers to have it."""
_POLL_S = 0.05
MAX_TOLD = 200
"""Changes that the answer to a reload lists."""


class Steering:
    """The only one that changes the configuration of its gateway."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._turn = asyncio.Lock()
        self._stamp = Stamp()

    @property
    def reader(self) -> ConfigReader:
        """Raises `NoStateDirectory`."""
        read = self._desk.read
        if not isinstance(read, ConfigReader):
            raise NoStateDirectory("This gateway was not started by the tidegate command, and has nothing to reload.")
        return read

    @property
    def _file(self) -> OverrideFile:
        if self.reader.file is None:
            raise NoStateDirectory(
                "Overrides cannot be kept: nothing says where. Set TIDEGATE_STATE_DIR to a directory and restart."
            )
        return self.reader.file

    # -- looking

    def book(self) -> Book:
        """The overrides as they were read last."""
        return self.reader.last.book if isinstance(self._desk.read, ConfigReader) else Book()

    @property
    def version(self) -> int:
        return self.book().version

    def overridden(self) -> frozenset[Path]:
        """The paths that have an override."""
        return frozenset(each.path for each in self.book().overrides)

    def listed(self) -> list[dict[str, Any]]:
        """Each override with what it has changed, and why it is not in force where it is not."""
        if not self.book().overrides:
            return []
        last = self.reader.last
        return [
            {
                "path": list(each.path),
                "name": shown(each.path),
                "value": each.value,
                "base": effective(last.plain.settings, each.path),
                "by": each.by,
                "at_unix_s": round(each.at_unix_s, 3),
                "in_force": each.path not in last.refused and each.path not in last.reading.unused,
                "problem": last.refused.get(each.path)
                or ("the configuration has no such thing" if each.path in last.reading.unused else None),
                "owner_only": owner_only(each.path),
            }
            for each in last.book.overrides
        ]

    async def origins(self) -> bytes:
        """Every effective value, and where it comes from, as JSON: `settings`; no secret is among them. What they mean
        is in `descriptions`, at the index that each has as `description`."""
        # Thousands of rows in a large fleet, made beside an event loop that may be a worker's.
        return await asyncio.to_thread(self._origins)

    def _origins(self) -> bytes:
        settings = self._desk.settings
        if isinstance(self._desk.read, ConfigReader):
            reading = self._desk.read.last.reading
        else:
            reading = Reading(settings, Document("configuration"), Overrides())
        waiting = set(restart_only_changes(settings, reading.settings))
        rows: list[dict[str, Any]] = []
        descriptions: dict[str, int] = {}
        for row in rows_of(reading, settings):
            told = row.shown(waits_for_restart=_restart_name(row.path) in waiting)
            told["description"] = descriptions.setdefault(row.description, len(descriptions))
            rows.append(told)
        content = {"settings": rows, "descriptions": list(descriptions), "version": self.version}
        return msgspec.json.encode(content)

    # -- changing

    async def change(self, request: Request, change: Change, what: str) -> dict[str, Any]:
        """Make a change, all of it or nothing. Raises `GatewayError`."""
        for path in change.paths:
            if rule_for(path) is None:
                raise NotChangeable(f"{shown(path)} cannot be changed while the gateway runs.", param=shown(path))
        operator = operator_of(request)
        return await self._write(
            request, what, lambda book: changed(book, change, operator.name, time.time(), what), frozenset(change.set)
        )

    async def restore(self, request: Request, version: int) -> dict[str, Any]:
        """Put the overrides of a former version into force again. Raises `GatewayError`."""
        operator = operator_of(request)

        def again(book: Book) -> Book:
            found = restored(book, version, operator.name, time.time())
            if found is None:
                kept = ", ".join(str(each.version) for each in book.history) or "none"
                raise UnknownVersion(f"Version {version} is not kept; there are: {kept}.", param="version")
            return found

        return await self._write(request, f"restore version {version}", again, frozenset())

    async def _write(
        self, request: Request, what: str, make: Callable[[Book], Book], asked: frozenset[Path]
    ) -> dict[str, Any]:
        reader, file = self.reader, self._file
        operator = operator_of(request)
        async with self._turn:
            before = await asyncio.to_thread(file.read)
            if before.version != self.version:  # another gateway of the same configuration has changed it
                with suppress(ConfigError):
                    await self._desk.reload(reader.again)
            _match(request, before.version)
            after = make(before)
            differing = differences(before, after)
            if not differing:
                return self._told(before, {}, [])
            if len(after.overrides) > MAX_OVERRIDES:
                raise NotChangeable(f"A gateway keeps {MAX_OVERRIDES} overrides at most.")
            _permit(operator, differing, reader.last.reading.settings)
            trial = await asyncio.to_thread(self._trial, after, frozenset(differing), asked)
            diff = {
                shown(path): {
                    "before": effective(self._desk.settings, path),
                    "after": effective(trial, path),
                    "override": "taken back" if new is NOT_SET else "set",
                }
                for path, (_, new) in differing.items()
            }
            await self._desk.audit.note(request, "config.override", what, {"version": after.version, **diff})
            try:
                await self._put_in_force(before, after)
            except GatewayError:  # the audit has it already, and must not go on saying that it was done
                await self._desk.audit.note(request, "config.override_failed", what, {"version": after.version})
                raise
            return self._told(after, differing, await self.settled(), diff)

    async def _put_in_force(self, before: Book, after: Book) -> None:
        """Raises `GatewayError`, and then nothing has changed."""
        await asyncio.to_thread(self._keep, self._file, before, after)
        try:
            await self._desk.reload(self.reader.again)
        except ConfigError as error:
            await asyncio.to_thread(self._file.write, before)
            raise ConfigUnusable(error) from error

    def _trial(self, after: Book, touched: frozenset[Path], asked: frozenset[Path]) -> Settings:
        """The settings that a book would make. Blocks. What was out of force already does not count against it."""
        refused = self.reader.last.refused
        counted = tuple(each for each in after.overrides if each.path in touched or each.path not in refused)
        try:
            reading = self.reader.trial(Book(after.version, counted))
        except ConfigError as error:
            raise BadOverride(error) from error
        for path in reading.unused:
            if path in asked:
                raise UnknownSetting(f"The configuration has nothing at {shown(path)}.", param=shown(path))
        return reading.settings

    @staticmethod
    def _keep(file: OverrideFile, before: Book, after: Book) -> None:
        """Blocks."""
        try:
            with file.held():
                now = file.read()
                if now.version != before.version:  # another gateway of the same configuration
                    raise VersionConflict(now.version)
                file.write(after)
        except FileProblem as error:
            raise NoStateDirectory(f"The overrides cannot be kept: {error}.") from error

    def _told(
        self,
        book: Book,
        differing: Mapping[Path, tuple[Any, Any]],
        silent: list[int],
        diff: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        undo = undoing(differing)
        return {
            "version": book.version,
            "changed": [{"name": name, **each} for name, each in (diff or {}).items()],
            "undo": {
                "set": [{"path": list(path), "value": value} for path, value in undo.set.items()],
                "drop": [list(path) for path in sorted(undo.drop)],
            },
            "overrides": self.listed(),
            "silent_workers": silent,
        }

    async def settled(self) -> list[int]:
        """The workers that do not have the settings in force, after waiting for them: none, mostly."""
        wanted, end = self._stamp.of(self._desk.settings), time.monotonic() + SETTLE_S
        while True:
            answers = await ask_all(self._desk.sources, lambda source: source.policies())
            late = [index for index, found in answers if found is None or found["stamp"] != wanted]
            if not late or time.monotonic() >= end:
                return late
            await asyncio.sleep(_POLL_S)

    # -- reloading

    async def reload(self, request: Request) -> dict[str, Any]:
        """Read the file again, now. Raises `ConfigUnusable`, and then nothing has changed."""
        reader = self.reader
        async with self._turn:
            before = {row.name: row.value for row in await self._rows()}
            in_force = self._desk.settings
            try:
                await self._desk.reload(reader)
            except ConfigError as error:
                await self._desk.audit.note(request, "config.reload", "refused", {"problems": len(error.problems)})
                raise ConfigUnusable(error) from error
            last = reader.last
            rows = {row.name: row for row in await self._rows()}
            names = [name for name in dict.fromkeys((*before, *rows)) if _differs(name, before, rows)]
            told = {
                "changed": [
                    {
                        "path": name,
                        "before": before.get(name),
                        "after": rows[name].value if name in rows else None,
                        "origin": rows[name].origin if name in rows else None,
                        "where": rows[name].where if name in rows else "",
                    }
                    for name in names[:MAX_TOLD]
                ],
                "more_changed": max(0, len(names) - MAX_TOLD),
                "needs_restart": restart_only_changes(in_force, last.reading.settings),
                "overrides_left_out": [
                    *({"name": shown(path), "problem": said} for path, said in last.refused.items()),
                    *(
                        {"name": shown(path), "problem": "the configuration has no such thing"}
                        for path in last.reading.unused
                    ),
                ],
            }
            await self._desk.audit.note(
                request, "config.reload", "file", {"changed": names[:MAX_TOLD], "needs_restart": told["needs_restart"]}
            )
            return {**told, "silent_workers": await self.settled()}

    async def _rows(self) -> list[Row]:
        return await asyncio.to_thread(rows_of, self.reader.last.reading, self._desk.settings)


def owner_only(path: Path) -> bool:
    rule = rule_for(path)
    return rule is None or rule.owner


def effective(settings: Settings, path: Iterable[str]) -> Any:
    """The value at a path by names, as JSON has it; None where there is nothing."""
    here: Any = settings
    for part in path:
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, tuple):
            here = next((each for each in here if each.name == part), None)
        else:
            here = getattr(here, part, None)
        if here is None:
            return None
    return here.model_dump(mode="json") if isinstance(here, BaseModel) else here


def _permit(operator: Operator, differing: Mapping[Path, tuple[Any, Any]], settings: Settings) -> None:
    """Raises `RoleRequired`, and `NotChangeable` for code that the configuration does not name."""
    for path, (_, value) in differing.items():
        if owner_only(path) and not operator.role.includes(Who.OWNER):
            raise RoleRequired(f"{shown(path)} is about money, which needs the role owner; you are {operator.name}.")
        policy = value.get("policy") if isinstance(value, dict) and path[-1] == "shadow" else value
        if path[-1] in ("policy", "shadow") and isinstance(policy, str) and policy not in POLICY_NAMES:
            _own_policy(policy, path, settings)


def _own_policy(policy: str, path: Path, settings: Settings) -> None:
    """A policy of the operators' own is code: only the file may bring in some that is new."""
    known = {model.policy for model in settings.models.values()}
    known |= {model.shadow.policy for model in settings.models.values() if model.shadow is not None}
    if ":" in policy and policy not in known:
        raise NotChangeable(
            f"{shown(path)}: a policy of your own is code, and only the configuration file can bring it in: name it "
            "there, as a model's policy or shadow, and reload.",
            param=shown(path),
        )


def _match(request: Request, version: int) -> None:
    given = request.headers.get("if-match")
    if given is None:
        raise VersionRequired(
            f'Say which version you have looked at: If-Match: "{version}" is the one now (GET /admin/overrides).'
        )
    if given.strip().removeprefix("W/").strip('"') != str(version):
        raise VersionConflict(version)


def _differs(name: str, before: Mapping[str, Any], rows: Mapping[str, Any]) -> bool:
    return name not in before or name not in rows or before[name] != rows[name].value


def _restart_name(path: tuple[str | int, ...]) -> str:
    """As `restart_only_changes` names it."""
    return ".".join(str(part) for part in path[:2])
