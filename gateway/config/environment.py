"""Overrides: `TIDEGATE_SERVER__PORT=7500` replaces `server.port` of the file.

The environment is an argument, never read from here. A variable that names no setting is an error, because a
misspelt override that is ignored is found out in production.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from gateway.config.problems import Path, Problem, did_you_mean, show_path
from gateway.config.tree import (
    Kind,
    child,
    fields_of,
    is_list,
    is_mapping,
    kind_of,
    may_be_none,
    model_of,
    setting_paths,
)

ENVIRONMENT = "environment"
COMMAND_LINE = "command line"

# A Kubernetes Service named "tidegate" (or "tidegate-redis") puts these into every pod of its namespace; they are not
# meant for us.
_SERVICE_LINK = re.compile(
    r"([A-Z0-9]+_)*(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)|PORT"
)
_LINKED_PORT = re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+")
"""The value of such a Service's `..._PORT`, whose name alone could be a misspelt setting."""


@dataclass
class Overrides:
    """Which settings did not come from the file, what set them, and which variables fit nowhere."""

    origins: dict[Path, tuple[str, str]] = field(default_factory=dict)
    """Setting → (environment or command line, the variable's name)."""
    problems: dict[str, Problem] = field(default_factory=dict)
    """By variable, so that a variable that turns out to hold a secret can be forgiven its name."""

    def origin_of(self, path: Path) -> tuple[str, str] | None:
        """What set a value, itself or as a part of something larger."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def from_environment(self, path: Path) -> bool:
        origin = self.origin_of(path)
        return origin is not None and origin[0] == ENVIRONMENT


class _UnknownError(Exception):
    """A name leads nowhere; carries the path walked so far, the odd part, and a hint."""

    def __init__(self, path: Path, hint: str) -> None:
        self.path = path
        self.hint = hint


def apply_environment(
    root: Kind, data: dict[str, Any], environ: Mapping[str, str], prefix: str, delimiter: str
) -> Overrides:
    """Write every override into `data`, larger ones first, so that TIDEGATE_SERVER yields to its parts."""
    overrides = Overrides()
    names = [name for name in environ if name.upper().startswith(prefix)]
    for name in sorted(names, key=lambda name: (name.count(delimiter), name)):
        rest = name[len(prefix) :]
        if _SERVICE_LINK.fullmatch(rest) or (rest.endswith("_PORT") and _LINKED_PORT.fullmatch(environ[name])):
            continue
        try:
            path = _locate(root, data, rest.lower().split(delimiter), prefix, delimiter)
        except _UnknownError as unknown:
            message = f"the variable {name} names no setting"
            close = difflib.get_close_matches(rest.upper(), _variables(root, delimiter), n=1, cutoff=0.8)
            hint = f"did you mean {prefix}{close[0]}?" if close else unknown.hint
            overrides.problems[name] = Problem(ENVIRONMENT, None, show_path(unknown.path), message, hint)
            continue
        _write(root, data, path, environ[name])
        overrides.origins[path] = (ENVIRONMENT, name)
    return overrides


def apply_command_line(root: Kind, data: dict[str, Any], options: Mapping[str, str], overrides: Overrides) -> None:
    """Write options such as `{"server.port": "7500"}` into `data`; they win over everything."""
    for name, text in options.items():
        path: Path = tuple(name.split("."))
        _write(root, data, path, text)
        overrides.origins[path] = (COMMAND_LINE, "")


def _locate(root: Kind, data: Any, parts: list[str], prefix: str, delimiter: str) -> Path:
    """The path that the parts of a variable's name stand for."""
    path: Path = ()
    kind: Kind = root
    for index, part in enumerate(parts):
        known = _keys(kind, data)
        key = _key(kind, data, part)
        if key is None:
            corrected = did_you_mean(part, known)
            match = re.fullmatch(r"did you mean (.*)\?", corrected)
            if match:
                better = delimiter.join([*parts[:index], match[1], *parts[index + 1 :]])
                corrected = f"did you mean {prefix}{better.upper()}?"
            elif not known:
                corrected = f"nothing can stand below {show_path(path)}" if path else ""
            raise _UnknownError(path, corrected)
        path = (*path, key)
        kind = _below(kind, key)
        if isinstance(data, dict):
            data = data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            data = None
    return path


def _variables(root: Kind, delimiter: str) -> list[str]:
    """The variables whose names are known in advance, without their prefix."""
    names = []
    for path, definition in setting_paths(root):
        if "<" not in path:
            name = path.replace(".", delimiter).upper()
            secret = kind_of(definition.annotation) is SecretStr
            names += [name, f"{name}{delimiter}ENV", f"{name}{delimiter}FILE"] if secret else [name]
    return names


def _keys(kind: Kind, data: Any) -> list[str]:
    model = model_of(kind)
    if model is not None:
        return list(fields_of(model))
    if kind_of(kind) is SecretStr:
        return ["env", "file"]
    return list(data) if is_mapping(kind) and isinstance(data, dict) else []


def _key(kind: Kind, data: Any, part: str) -> str | int | None:
    if is_list(kind):
        count = len(data) if isinstance(data, list) else 0
        return int(part) if re.fullmatch(r"[0-9]{1,4}", part) and int(part) <= count else None
    known = _keys(kind, data)
    if not is_mapping(kind):
        return part if part in known else None
    # Variables cannot have dashes, dots or case: `my-model` of the file is reached as MY_MODEL.
    same = [key for key in known if _folded(key) == _folded(part)]
    if len(same) > 1:
        return None
    return same[0] if same else part or None


def _folded(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", text.lower())


def _below(kind: Kind, key: str | int) -> Kind:
    return str if kind_of(kind) is SecretStr else child(kind, key)


def _write(root: Kind, data: dict[str, Any], path: Path, text: str) -> None:
    """Set one value, making the mappings and lists that lead to it."""
    here: Any = data
    kind: Kind = root
    for position, key in enumerate(path):
        secret = kind_of(kind) is SecretStr
        kind = _below(kind, key)
        if isinstance(here, list) and isinstance(key, int) and key == len(here):
            here.append(None)
        if position == len(path) - 1:
            if secret:  # one kind of reference replaces the other instead of standing beside it
                here.clear()
            here[key] = _value(kind, text)
            return
        inner = here.get(key) if isinstance(here, dict) else here[key]
        wanted = list if is_list(kind) else dict
        if not isinstance(inner, wanted):
            inner = wanted()
            here[key] = inner
        here = inner


def _value(kind: Kind, text: str) -> Any:
    """The text of a variable as the type its setting wants; unchanged when it cannot be, for the error."""
    bare = kind_of(kind)
    if text == "null" and may_be_none(kind):
        return None
    try:
        if bare is bool:
            return {"true": True, "1": True, "yes": True, "on": True}.get(text.lower()) or {
                "false": False,
                "0": False,
                "no": False,
                "off": False,
            }.get(text.lower(), text)
        if bare is int or bare is float:
            return bare(text)
        if model_of(kind) or is_mapping(kind) or is_list(kind) or (bare is SecretStr and text.startswith("{")):
            value = json.loads(text)
            return value if isinstance(value, (dict, list)) else text
    except (ValueError, RecursionError):
        pass
    return text
