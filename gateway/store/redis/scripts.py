"""Lua scripts: one file each beside this module, read as package data.

A script is sent by its SHA-1 (`EVALSHA`); a Redis that does not know it yet is sent its text (`EVAL`). See `client`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

INCLUDE = "-- include: "


@dataclass(frozen=True, slots=True)
class Script:
    """One whole operation, as Redis runs it."""

    name: str
    text: str
    sha: str
    """SHA-1 of the text, in hexadecimal: the name by which Redis knows a script."""


def load(name: str) -> Script:
    """The script in `scripts/<name>.lua`. A line `-- include: NAME` is replaced by the text of `scripts/NAME.lua`.

    Raises `FileNotFoundError`.
    """
    return script(name, _text(name, ()))


def script(name: str, text: str) -> Script:
    """A script of any text. `name` is for messages."""
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _text(name: str, above: tuple[str, ...]) -> str:
    if name in above:
        raise ValueError(f"the script {name} includes itself: {' -> '.join((*above, name))}")
    text = resources.files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith(INCLUDE):
            lines[number] = _text(line.removeprefix(INCLUDE).strip(), (*above, name)).rstrip("\n") + "\n"
    return "".join(lines)
