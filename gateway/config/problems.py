"""What can be wrong with a configuration, and how it is shown without showing a secret."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic_core import PydanticCustomError

Path = tuple[str | int, ...]
"""Where a setting lives: keys and list positions from the root."""

MAX_SHOWN_CHARACTERS = 80

# Beginnings that key issuers chose so that scanners can recognise their keys. "Bearer" catches a pasted
# header.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(sk-[A-Za-z0-9_-]{6,}|hf_[A-Za-z0-9]{8,}|gsk_[A-Za-z0-9]{8,}|nvapi-[A-Za-z0-9_-]{8,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|xox[abpr]-[A-Za-z0-9-]{8,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}|tgk_[A-Za-z0-9]{8,}|tg_(?:admin|pepper)_[A-Za-z0-9_-]{8,})"
    r"|Bearer\s+\S{8,}|-----BEGIN [A-Z ]*PRIVATE KEY",
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is, and what would be right."""

    file: str
    """The file as the operator named it, or `environment`, or `command line`."""
    line: int | None
    """Counted from 1; None when no line can be named."""
    path: str
    """The setting, such as `backends.pool.replicas[0].url`; empty when the whole file is meant."""
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"
        return f"{text}; {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Finding:
    """A problem before it is known which file or variable it came from."""

    path: Path
    message: str
    hint: str = ""


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds every reason found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def wrong(message: str, hint: str = "") -> PydanticCustomError:
    """The error a validator raises when it knows better than pydantic what to tell the operator."""
    return PydanticCustomError("tidegate", "{message}", {"message": message, "hint": hint})


def looks_secret(text: str) -> bool:
    """Whether a text resembles an API key, a token or a private key."""
    return _SECRET.search(text) is not None


def shown(value: object) -> str:
    """A value as it may appear in a message: quoted, short, and hidden where it could hold a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = value if isinstance(value, str) else str(value)
    # Whatever has an "@" may be a URL with a password in it, in a form that no parser recognises.
    if looks_secret(text) or "@" in text:
        return "the value (not shown: it may hold a secret)"
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = text[:MAX_SHOWN_CHARACTERS] + "..."
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return _quoted(text)


def _quoted(text: str) -> str:
    """In quotes; what could confuse a terminal, or cannot be encoded, is escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def show_path(path: Path) -> str:
    """`("backends", "pool", "replicas", 0)` as `backends.pool.replicas[0]`; odd names are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part) and not looks_secret(part):
            text += f".{part}" if text else part
        elif looks_secret(part) or "@" in part:
            text += "[not shown]"
        else:
            text += f"[{_quoted(part[:MAX_SHOWN_CHARACTERS])}]"
    return text


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or the few there are; empty when there are none."""
    words = sorted(known)
    close = difflib.get_close_matches(given.lower(), words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    if not words:
        return ""
    return "known here: " + ", ".join(words[:20]) + (", ..." if len(words) > 20 else "")
