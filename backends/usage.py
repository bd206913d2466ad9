"""Tokens as a model server reports them, and the reader of OpenAI's way of reporting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Usage(msgspec.Struct, gc=False):
    """What one answer used. Counts are tokens."""

    prompt_tokens: int = 0
    """All tokens of the prompt, cached ones included."""
    completion_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens that the server had in its cache; None when it does not say, which is not the same as none."""
    cache_write_tokens: int = 0
    """Prompt tokens that were written to a cache that charges for it (Anthropic)."""


MAX_TOKENS = 100_000_000
"""In one answer. No model has a hundredth of it as context; a number above is a fault of the server's, and taken for
tokens it would keep a caller's limits closed for years."""


def read_openai_usage(usage: Mapping[str, Any]) -> Usage | None:
    """Read OpenAI's usage object. A missing count is 0, missing or malformed details are None.

    None when the count of the prompt or of the completion is there and is none: whoever garbles one has reported
    nothing that anybody should be charged for.
    """
    prompt = tokens_or_none(usage.get("prompt_tokens"))
    completion = tokens_or_none(usage.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    details = usage.get("prompt_tokens_details")
    cached: int | None = None
    written = 0
    if isinstance(details, dict):
        cached = known_tokens(details.get("cached_tokens"))
        if "cache_write_tokens" in details:
            written = known_tokens(details["cache_write_tokens"]) or 0
    return Usage(prompt, completion, cached, written)


def tokens_or_none(value: Any) -> int | None:
    """Tokens of one answer; 0 for null, as some servers say it, None for what cannot be a count of them."""
    if type(value) is int and 0 <= value <= MAX_TOKENS:
        return value
    return 0 if value is None else None


def known_tokens(value: Any) -> int | None:
    """Tokens of one answer; None when the server does not say, or says what cannot be a count of them."""
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def count_or_none(value: Any) -> int | None:
    """The value when it is a count, else None."""
    return value if type(value) is int and value >= 0 else None
