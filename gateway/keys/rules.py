"""What may stand in a field of a key or a tenant: the rules of the configuration, for values that come another way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from pydantic import ValidationError

from gateway.config.limits import LimitBlock
from gateway.config.problems import did_you_mean, shown
from gateway.config.translate import findings_of
from gateway.config.values import PATTERN_HINTS
from gateway.keys.format import holds_key
from gateway.limits.sets import LimitSet

MAX_NAMES = 1000
MAX_METADATA = 64
MAX_METADATA_NAME = 64
MAX_METADATA_CHARACTERS = 512


class BadValue(Exception):
    """A value that cannot be taken: which field, what is wrong with it, what to write instead."""

    def __init__(self, field: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{field}: {problem}; {hint}" if hint else f"{field}: {problem}")
        self.field = field
        self.problem = problem
        self.hint = hint


def checked_name(field: str, text: str, pattern: str) -> str:
    """The text, when it has the form of such a name. Raises `BadValue`."""
    if not re.fullmatch(pattern, text) or holds_key(text):
        value = "the value (not shown: it holds an API key)" if holds_key(text) else shown(text)
        raise BadValue(field, f"{value} is not a valid name", PATTERN_HINTS[pattern])
    return text


def listed(field: str, text: str | None) -> list[str] | None:
    """`a,b` as a list; `*`, or nothing at all, as None. Raises `BadValue`."""
    if text is None or text.strip() == "*":
        return None
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        raise BadValue(field, "'none' is no name", "write '*' for all; a key that may use nothing is a disabled one")
    return names


def checked_names(field: str, texts: Iterable[str], pattern: str) -> tuple[str, ...]:
    """Each name once, in the order given. Raises `BadValue`."""
    names = tuple(dict.fromkeys(checked_name(field, text, pattern) for text in texts))
    if len(names) > MAX_NAMES:
        raise BadValue(field, f"has {len(names)} names", f"at most {MAX_NAMES} are allowed; none given means all")
    return names


def checked_whole(field: str, value: int, most: int) -> int:
    """A whole number from 1 to `most`. Raises `BadValue`."""
    if not 1 <= value <= most:
        raise BadValue(field, f"{shown(value)} is out of range", f"write a whole number from 1 to {most}")
    return value


def checked_limits(field: str, given: dict[str, Any] | None, before: LimitSet) -> LimitSet:
    """`given` over `before`, field by field, where None takes a limit away. Raises `BadValue`."""
    if given is None:
        return LimitSet()
    for name in given.keys() - set(LimitSet.__struct_fields__):
        raise BadValue(f"{field}.{name[:80]}", "is not a known limit", did_you_mean(name, LimitSet.__struct_fields__))
    try:
        return LimitBlock.model_validate({**msgspec.structs.asdict(before), **given}).limit_set()
    except ValidationError as error:
        finding = next(iter(findings_of(error)))
        path = ".".join(str(part) for part in finding.path)
        raise BadValue(f"{field}.{path}", finding.message, finding.hint) from None


def checked_metadata(field: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """The operator's notes: texts by name. Raises `BadValue`."""
    notes = given or {}
    if len(notes) > MAX_METADATA:
        raise BadValue(field, f"has {len(notes)} notes", f"at most {MAX_METADATA} are allowed")
    for name, value in notes.items():
        if not 1 <= len(name) <= MAX_METADATA_NAME or not name.isprintable() or holds_key(name):
            problem = "has a name that is too long, or that cannot be shown"
            raise BadValue(field, problem, f"use 1 to {MAX_METADATA_NAME} printable characters")
        if not isinstance(value, str) or len(value) > MAX_METADATA_CHARACTERS:
            raise BadValue(
                f"{field}.{name}", "is no text", f"write a text of at most {MAX_METADATA_CHARACTERS} characters"
            )
        if holds_key(value):
            raise BadValue(f"{field}.{name}", "has an API key in it", "notes are shown; leave it out")
    return dict(notes)
