"""Secrets: the file names where one is found, never what it is.

`api_key: {env: NAME}` or `api_key: {file: /path}`. Only in the environment (`TIDEGATE_ADMIN__TOKEN=...`) may
a secret stand for itself. References are resolved once, at load time; afterwards a secret is a `SecretStr`,
which prints as stars.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any

from pydantic import SecretStr, WithJsonSchema

from gateway.config.problems import Finding, Path, shown
from gateway.config.tree import Kind, child, kind_of

# A Kubernetes Secret is at most 1 MiB; no key or token comes near this.
MAX_SECRET_BYTES = 65536

_HINT = "write {env: NAME_OF_A_VARIABLE} or {file: /path/of/a/file}"
_WORDS = ("env", "file")

UNRESOLVED = SecretStr("")
"""Stands for a secret that was given wrongly, so that nothing else reports it as missing."""

Secret = Annotated[
    SecretStr,
    WithJsonSchema(
        {
            "title": "Secret reference",
            "description": "Where a secret is found: an environment variable, or a file.",
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"env": {"type": "string", "description": "Name of an environment variable."}},
                    "required": ["env"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"file": {"type": "string", "description": "Path of a file with one line."}},
                    "required": ["file"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]


@dataclass(frozen=True)
class Place:
    """A spot in the raw configuration that holds a secret."""

    path: Path
    holder: Any
    """The mapping or list that it is in."""
    key: str | int

    @property
    def raw(self) -> Any:
        return self.holder[self.key]


def secret_places(kind: Kind, data: Any, path: Path = ()) -> Iterator[Place]:
    """Every secret that the raw configuration sets, found by walking it beside the schema."""
    if isinstance(data, dict):
        items: list[tuple[str | int, Any]] = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    else:
        return
    for key, value in items:
        below = child(kind, key)
        if below is None:
            continue
        if kind_of(below) is SecretStr:
            yield Place((*path, key), data, key)
        else:
            yield from secret_places(below, value, (*path, key))


def referenced_variables(places: list[Place]) -> set[str]:
    """The environment variables that references name, so that they are not taken for misspelt settings."""
    references = [place.raw for place in places if isinstance(place.raw, dict)]
    return {ref["env"] for ref in references if isinstance(ref.get("env"), str)}


def leave_out(places: list[Place], needed: Collection[str]) -> list[Place]:
    """Those places that are needed, by their dotted path; the others' references become UNRESOLVED."""
    kept = []
    for place in places:
        if ".".join(map(str, place.path)) in needed:
            kept.append(place)
        elif place.raw is not None:
            place.holder[place.key] = UNRESOLVED
    return kept


def resolve(
    places: list[Place],
    environ: Mapping[str, str],
    folder: FilePath,
    literal_allowed: Callable[[Path], bool],
) -> list[Finding]:
    """Replace every reference by the secret it names; what cannot be found becomes UNRESOLVED and a finding.

    Relative paths are taken from `folder`, the place of the configuration file.
    """
    findings: list[Finding] = []
    for place in places:
        raw = place.raw
        if raw is None:
            continue
        place.holder[place.key] = UNRESOLVED
        if isinstance(raw, str) and literal_allowed(place.path):
            value: str | Finding = raw
        else:
            value = _follow(raw, place.path, environ, folder)
        value = value if isinstance(value, Finding) else _checked(value, place.path)
        if isinstance(value, Finding):
            findings.append(value)
        else:
            place.holder[place.key] = SecretStr(value)
    return findings


def _follow(raw: Any, path: Path, environ: Mapping[str, str], folder: FilePath) -> str | Finding:
    if not isinstance(raw, dict):
        # A number or a boolean is a literal too: an unquoted key of digits.
        return Finding(path, "a literal secret does not belong in this file: a secret in the wrong place", _HINT)
    if not set(raw) <= set(_WORDS) or len(raw) != 1:
        # The odd word is not repeated: {hunter2} is a mapping too.
        return Finding(path, "needs exactly one of env and file", _HINT)
    ((word, target),) = raw.items()
    if not isinstance(target, str) or not target.strip():
        return Finding((*path, word), "is empty or not text", _HINT)
    return _from_env(target, path, environ) if word == "env" else _from_file(target, path, folder)


def _from_env(name: str, path: Path, environ: Mapping[str, str]) -> str | Finding:
    # The name is only repeated when it cannot well be the secret itself, pasted into the wrong spot.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return Finding((*path, "env"), "is not the name of an environment variable", "write the name, not the secret")
    if name not in environ:
        said = name if re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name) else "named here"
        return Finding((*path, "env"), f"the environment variable {said} is not set", "set it, or use {file: PATH}")
    return environ[name]


def _from_file(name: str, path: Path, folder: FilePath) -> str | Finding:
    place = (*path, "file")
    try:
        with (folder / name).open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
        if len(content) > MAX_SECRET_BYTES:
            return Finding(place, f"the secret file is larger than {MAX_SECRET_BYTES} bytes", "name the right file")
        return content.decode()
    except UnicodeDecodeError:
        return Finding(place, "the secret file is not UTF-8 text", "store the secret as one line of text")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a usable path"
        said = shown(name) if "/" in name or "." in name else "named here"
        return Finding(place, f"the secret file {said} cannot be read: {reason}", "check the path and its permissions")


def _checked(value: str, path: Path) -> str | Finding:
    value = value.strip()
    if not value:
        return Finding(path, "the secret is empty", "give it a value, or leave the setting out")
    # Secrets travel in header fields, where anything else would be refused or would split the header.
    if not re.fullmatch(r"[!-~]+", value):
        return Finding(path, "the secret has spaces, line breaks or characters outside ASCII", "store the bare secret")
    return value
