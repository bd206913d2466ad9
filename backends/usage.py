"""Tokens as a model server reports them, and the reader of OpenAI's way of reporting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Usage(msgspec.Struct):
    """What one answer used. Counts are tokens."""

    prompt_tokens: int = 0
    """All tokens of the prompt, cached ones included."""
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that the server had in its cache; None when it does not say, which is not the same as none."""
    cache_write_tokens: int = 0
    """Prompt tokens that were written to a cache that charges for it (Anthropic)."""


def read_openai_usage(usage: Mapping[str, Any]) -> Usage:
    """Read OpenAI's usage object. A missing or malformed count is 0, missing details are None."""
    details = usage.get("prompt_tokens_details")
    cached: int | None = None
    written = 0
    if isinstance(details, dict):
        cached = count_or_none(details.get("cached_tokens"))
        written = count(details.get("cache_write_tokens"))
    return Usage(count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")), cached, written)


def count(value: Any) -> int:
    """The value when it is a count, else 0."""
    return value if type(value) is int and value >= 0 else 0


def count_or_none(value: Any) -> int | None:
    """The value when it is a count, else None."""
    return value if type(value) is int and value >= 0 else None
