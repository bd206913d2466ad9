"""What may stand in an entry of the audit: text on one line, and no secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import SecretStr

from gateway.config.problems import looks_secret
from gateway.keys.format import hidden

MAX_TEXT_CHARACTERS = 200
MAX_VALUE_CHARACTERS = 4096
MAX_ITEMS = 1000
MAX_DEPTH = 16
MAX_DIFF_BYTES = 32_768
"""Half of what the database takes."""
STARS = "***"
_SECRET_NAMES = ("token", "secret", "password", "api_key", "apikey", "authorization", "cookie", "pepper", "credential")
_COUNTED = ("_tokens", "tokens_", "max_tokens")
"""Words that are about the tokens of language models."""


def printable(text: str, characters: int = MAX_TEXT_CHARACTERS) -> str:
    """On one line, of bounded length, never empty; what cannot be printed is escaped.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    text = hidden(text[: 4 * characters])
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return (text if len(text) <= characters else text[: characters - 1] + "…") or "-"


def cleaned(diff: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain data, with stars in the place of secrets, and no larger than the audit takes."""
    found = {str(name)[:MAX_TEXT_CHARACTERS]: _value(str(name), value, MAX_DEPTH) for name, value in diff.items()}
    try:
        size = len(msgspec.json.encode(found))
    except (msgspec.MsgspecError, TypeError, ValueError):
        return {"not_kept": "it is nothing that JSON can hold"}
    if size > MAX_DIFF_BYTES:
        return {"not_kept": f"{size} bytes", "fields": [name[:80] for name in list(found)[:100]]}
    return found


def _value(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, SecretStr | bytes | bytearray):
        return STARS
    if isinstance(value, Mapping):
        items = list(value.items())[:MAX_ITEMS]
        return (
            {str(key)[:MAX_TEXT_CHARACTERS]: _value(str(key), each, depth - 1) for key, each in items} if depth else "…"
        )
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(name, each, depth - 1) for each in list(value)[:MAX_ITEMS]] if depth else "…"
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if value and (_is_secret(name) or looks_secret(value)):
            return STARS
        text = hidden(value).encode("utf-8", "replace").decode()
        return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "…"
    try:
        return _value(name, msgspec.to_builtins(value), depth - 1) if depth else "…"
    except (msgspec.MsgspecError, TypeError, ValueError):
        return f"a {type(value).__name__}"


def _is_secret(name: str) -> bool:
    name = name.lower()
    return any(word in name for word in _SECRET_NAMES) and not any(word in name for word in _COUNTED)
