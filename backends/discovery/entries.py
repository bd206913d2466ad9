"""Reading a list of replicas from YAML or JSON: what it says, on which line, and what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args
from urllib.parse import urlsplit

import msgspec
import yaml

from backends.discovery.member import Member, State
from backends.discovery.records import MAX_MEMBERS
from backends.origin import Origin

SHOWN = 3
"""Problems of a file that are told; the others are counted."""
_FIELDS = frozenset(Member.__struct_fields__) - {"phase", "progress", "detail", "started_in_s", "restarts", "agent"}
"""What a file can say. The rest is about starts, which whoever starts replicas tells by registering them."""
_NOT_FOUND_ONES = frozenset({"price", "dcgm"})
"""Of `replicas`, and not of what is found: `discovery.defaults` has the price."""
_MERGE = "tag:yaml.org,2002:merge"


class EntriesError(Exception):
    """The list cannot be used; the message names file, line and entry."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of the list."""

    number: int
    """From 1."""
    line: int
    fields: Mapping[str, Any]


class _Wrong(Exception):
    """What is wrong with one entry."""


def read_members(file: str, content: bytes, check: Callable[[Member], str | None] | None = None) -> list[Member]:
    """All members, in the order of the file. Raises `EntriesError` where one is wrong, or the same as another."""
    entries = _entries(file, content)
    if len(entries) > MAX_MEMBERS:
        raise EntriesError(f"{file}: it has {len(entries)} entries; {MAX_MEMBERS} are possible")
    problems: list[str] = []
    members: list[Member] = []
    places: dict[tuple[str, int | None], int] = {}
    names: dict[str, int] = {}
    for entry in entries:
        try:
            member = _member(entry.fields)
            _first(places, (member.url.rstrip("/"), member.dp_rank), entry.number, "url (and dp_rank)")
            if member.name:
                _first(names, member.name, entry.number, "name")
            problem = None if check is None else check(member)
            if problem is not None:
                raise _Wrong(problem)
            members.append(member)
        except _Wrong as error:
            problems.append(f"{file}, line {entry.line}: entry {entry.number}: {error}")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise EntriesError("; ".join(problems[:SHOWN]) + more)
    return members


def _first(known: dict[Any, int], key: object, number: int, what: str) -> None:
    other = known.setdefault(key, number)
    if other != number:
        raise _Wrong(f"entry {other} has the same {what}")


def _member(fields: Mapping[str, Any]) -> Member:
    for name in fields:
        if name not in _FIELDS:
            hint = "; say it in discovery.defaults" if name in _NOT_FOUND_ONES else ""
            raise _Wrong(f"{name!r} is not a field of replicas that are found{hint}")
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(events := given.get("kv_events"), Mapping):  # as under `replicas`
        if set(events) - {"endpoint"}:
            raise _Wrong("kv_events: only `endpoint` can be said of replicas that are found")
        given["kv_events"] = events.get("endpoint", "auto")
    try:
        member = msgspec.convert(given, Member)
    except msgspec.ValidationError as error:
        raise _Wrong(_said(error)) from error
    try:
        parts = urlsplit(member.url)
        Origin.parse(f"{parts.scheme}://{parts.netloc}")  # a path is for the gateway to judge
    except ValueError as error:
        raise _Wrong(f"url: {error}") from error
    if member.weight is not None and not (math.isfinite(member.weight) and 0 < member.weight <= 1000):
        raise _Wrong(f"weight: {member.weight:g} is not above 0 and at most 1000")
    return member


def _said(error: msgspec.ValidationError) -> str:
    """Of msgspec's words, with the field first.

    >>> _said(msgspec.ValidationError("Expected `int`, got `str` - at `$.dp_rank`"))
    'dp_rank: Expected `int`, got `str`'
    """
    text, _, place = str(error).partition(" - at `$.")
    if "state" in place and "Invalid" in text:
        text = f"it is one of {', '.join(get_args(State))}"
    return f"{place.rstrip('`')}: {text}" if place else text.replace("Object missing required field", "there is no")


# -- the two notations


def _entries(file: str, content: bytes) -> Sequence[Entry]:
    try:
        text = content.decode().removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise EntriesError(f"{file}, line {line}: it is not UTF-8 text") from error
    if not text.strip():
        # What a file looks like between a writer's opening and writing it.
        raise EntriesError(f"{file}: it is empty; write [] for no replicas")
    if text.lstrip().startswith("["):
        try:
            return list(_json_entries(file, text))
        except json.JSONDecodeError as problem:
            try:
                return list(_yaml_entries(file, text))  # whose lists may be written that way as well
            except EntriesError:
                raise EntriesError(f"{file}, line {problem.lineno}: not valid JSON: {problem.msg}") from problem
    return list(_yaml_entries(file, text))


def _json_entries(file: str, text: str) -> Iterable[Entry]:
    """Item by item, which is how the line of each is known. Raises `JSONDecodeError`."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
    space = re.compile(r"[ \t\r\n]*")

    def after(position: int) -> int:
        found = space.match(text, position)
        assert found is not None
        return found.end()

    at, number, line, counted = after(after(0) + 1), 0, 1, 0
    try:
        while text[at : at + 1] != "]" or number:
            number += 1
            line, counted = line + text.count("\n", counted, at), at
            value, end = decoder.raw_decode(text, at)
            yield Entry(number, line, _fields(file, line, number, value))
            at = after(end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("a comma or ] is missing", text, at)
            at = after(at + 1)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # the latter of numbers with thousands of digits
        raise EntriesError(f"{file}, line {line}: entry {number} cannot be read") from error
    except _Wrong as error:
        raise EntriesError(f"{file}, line {line}: entry {number}: {error}") from error
    if (rest := after(at + 1)) < len(text):
        raise json.JSONDecodeError("there is more after the list", text, rest)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise _Wrong(f"{twice!r} is given twice")
    return result


def _no_number(text: str) -> NoReturn:
    raise _Wrong(f"{text} is not a number here")


def _fields(file: str, line: int, number: int, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise EntriesError(
            f"{file}, line {line}: entry {number} is not a mapping; write e.g. url: http://10.0.0.5:30000"
        )
    return value


def _yaml_entries(file: str, text: str) -> Iterable[Entry]:
    """From YAML's node tree, which precedes its values: it knows lines, and keys that are given twice."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.SequenceNode):
                what = f"{file}: it is not a list of replicas; write e.g. - url: http://10.0.0.5:30000"
                raise EntriesError(f"{what}, or [] for none")
            for number, node in enumerate(root.value, 1):
                line = node.start_mark.line + 1
                if not isinstance(node, yaml.MappingNode):
                    _fields(file, line, number, None)
                problem = _problem(node)
                if problem:
                    raise EntriesError(f"{file}, line {problem[0]}: entry {number}: {problem[1]}")
                yield Entry(number, line, loader.construct_document(node))
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise EntriesError(f"{file}, line {line}: not valid YAML: a character that YAML does not allow") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise EntriesError(f"{file}{place}: not valid YAML: {error.problem or 'it cannot be read'}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a value cannot be read"
        raise EntriesError(f"{file}: not valid YAML: {reason}") from error


def _problem(node: yaml.MappingNode, depth: int = 0) -> tuple[int, str] | None:
    """Line and reason. An entry is flat, but for `kv_events`: so that no aliases of aliases stand for billions."""
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
            return line, "only plain keys are possible"
        if key.value in seen:
            return line, f"{key.value!r} is given twice"
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode) and depth == 0 and key.value == "kv_events":
            inner = _problem(value, 1)
            if inner is not None:
                return inner
        elif not isinstance(value, yaml.ScalarNode):
            return line, f"{key.value}: one value is wanted"
    return None
