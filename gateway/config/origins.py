"""Where each effective value comes from: a default, a line of the file, a variable, the command line, an override."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, SecretStr

from gateway.config.environment import COMMAND_LINE, ENVIRONMENT
from gateway.config.found import DISCOVERED
from gateway.config.layer import OVERRIDE
from gateway.config.load import Reading
from gateway.config.problems import Path, looks_secret, show_path
from gateway.config.schema import RESTART_ONLY, Settings
from gateway.config.tree import child, fields_of, is_list, kind_of

DEFAULT, FILE = "default", "file"
HIDDEN = "(hidden)"
_MAY_HOLD_SECRETS = frozenset({"headers"})
"""Mappings whose values are the operators' own, and which have held keys before now."""


@dataclass(frozen=True, slots=True)
class Row:
    """One effective value."""

    path: Path
    value: Any
    """As JSON has it; of a secret only whether it is set."""
    origin: str
    """default, file, environment, command line, discovered or override."""
    where: str
    """The file and line, or the variable; empty where there is nothing to say."""
    secret: bool
    restart: bool
    """Whether a change takes effect only after a restart."""
    description: str

    @property
    def name(self) -> str:
        return show_path(self.path)

    def shown(self, *, waits_for_restart: bool = False) -> dict[str, Any]:
        """As JSON. `waits_for_restart`: the file says something else, which only a restart puts into force."""
        return {
            "path": self.name,
            "value": self.value,
            "origin": self.origin,
            "where": self.where,
            "secret": self.secret,
            "restart": self.restart,
            "waits_for_restart": waits_for_restart,
            "description": self.description,
        }


def rows_of(reading: Reading, settings: Settings | None = None) -> list[Row]:
    """Every effective value in the order of the schema. `settings`: those in force, where they are not the ones that
    were read (what needs a restart stays as it was)."""
    return list(_rows(reading, settings or reading.settings, (), "", secret=False))


def _rows(reading: Reading, value: Any, path: Path, description: str, *, secret: bool) -> Iterator[Row]:
    if isinstance(value, BaseModel):
        for name, field in fields_of(type(value)).items():
            inner = next(key for key, each in type(value).model_fields.items() if each is field)
            below = field.annotation
            hidden = kind_of(below) is SecretStr or (is_list(below) and kind_of(child(below, 0)) is SecretStr)
            yield from _rows(reading, getattr(value, inner), (*path, name), field.description or "", secret=hidden)
    elif isinstance(value, Mapping) and value:
        hidden = bool(path) and path[-1] in _MAY_HOLD_SECRETS
        for key, each in value.items():
            shown = HIDDEN if hidden else each
            yield from _rows(reading, shown, (*path, str(key)), description, secret=hidden)
    elif isinstance(value, tuple) and value and isinstance(value[0], (BaseModel, SecretStr)):
        for position, each in enumerate(value):
            yield from _rows(reading, each, (*path, position), description, secret=secret)
    else:
        yield _row(reading, value, path, description, secret=secret or isinstance(value, SecretStr))


def _row(reading: Reading, value: Any, path: Path, description: str, *, secret: bool) -> Row:
    origin, where = _origin(reading, path)
    return Row(path, _shown(value), origin, where, secret, _needs_restart(path), description)


def _origin(reading: Reading, path: Path) -> tuple[str, str]:
    found = reading.origins.origin_of(path)
    if found is not None:
        return found[0], found[1]
    lines = reading.document.lines
    if path in lines:
        return FILE, f"{reading.document.file}:{lines[path]}"
    return DEFAULT, ""


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return "set" if value.get_secret_value() else "not set"
    if isinstance(value, (tuple, list)):
        return [_shown(each) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    return HIDDEN if looks_secret(text) or ("@" in text and "://" in text) else text


def _needs_restart(path: Path) -> bool:
    return path[0] in RESTART_ONLY or path[:2] == ("keys", "pepper")


ORIGINS = (DEFAULT, FILE, ENVIRONMENT, COMMAND_LINE, DISCOVERED, OVERRIDE)
