"""What bounds the output of a request: the fields of its body that say how much may be generated, and how often.

They are read strictly where everything else is the engine's business, since limits are reserved by them: engines that
validate leniently would take `"9999"`, `9999.0` or `" 5000 "` for numbers that the gateway has not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.dialects.protocol import CHAT, COMPLETIONS
from gateway.errors import InvalidRequest

_OF_CHAT = ("max_completion_tokens", "max_tokens", "n_predict")
_OF_COMPLETIONS = ("max_tokens", "n_predict")
"""`n_predict` is llama.cpp's; `max_completion_tokens` means nothing to engines here."""
BOUNDING_FIELDS = frozenset(_OF_CHAT)
"""All that `bounding` may set."""
_CHAT_FIELD = {"openai": "max_completion_tokens", "azure": "max_completion_tokens"}
"""Of those that refuse `max_tokens` for their newer models."""


def asked_output(path: str, fields: Mapping[str, Any]) -> int | None:
    """Tokens that one answer may have: the most of all fields that say so, since engines differ in which they heed.

    None: nothing bounds it, or a negative number, which stands for that. Raises `InvalidRequest`.
    """
    asked: int | None = None
    for name in _OF_CHAT if path == CHAT else _OF_COMPLETIONS:
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int:
            raise InvalidRequest(f"{name!r} must be a whole number.", param=name, code="invalid_type")
        if value < 0:
            return None
        if asked is None or value > asked:
            asked = value
    return asked


def asked_choices(path: str, fields: Mapping[str, Any]) -> int:
    """How many answers are asked for: `n` for each prompt. Raises `InvalidRequest`."""
    choices = 1
    for name in ("n", "best_of"):
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise InvalidRequest(f"{name!r} must be a whole number, at least 1.", param=name, code="invalid_type")
        if name == "n":
            choices = value
    prompt = fields.get("prompt")
    if path == COMPLETIONS and isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        choices *= len(prompt)
    return choices


def bounding(path: str, fields: Mapping[str, Any], bound: int, engine: str) -> dict[str, int]:
    """The fields to set so that an engine generates no more than `bound`: its own, and every other that is there."""
    own = _CHAT_FIELD.get(engine, "max_tokens") if path == CHAT else "max_tokens"
    return {own: bound, **dict.fromkeys((name for name in _OF_CHAT if fields.get(name) is not None), bound)}
