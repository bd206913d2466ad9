"""Reads what a model server says it used, and what that costs."""

from __future__ import annotations

import re
from typing import Any

import orjson

from backends.usage import Usage
from gateway.config import Price
from gateway.record import Exchange
from gateway.sse import ReadUsage, StreamReader, openai_usage

_PARSE_WHOLE_BYTES = 16_384
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_MAX_USAGE_BYTES = 4096


def from_stream(exchange: Exchange, reader: StreamReader) -> None:
    """Add what the stream's reader saw, however the stream ended; once for each that the client has seen content of.

    The usage of a later one is that of the whole answer; without it nothing is known of the whole any more.
    """
    exchange.content_events += reader.content_events
    exchange.content_bytes += reader.content_bytes
    if reader.usage is not None or reader.content_events:
        exchange.usage = reader.usage


def parsed(body: bytes) -> Any:
    """The body as a tree, when it is small enough to be parsed for a few numbers; else, or when it is no JSON, None."""
    return _json(body) if len(body) <= _PARSE_WHOLE_BYTES else None


def parses(body: bytes) -> bool:
    """Whether `parsed` looks at a body of this size."""
    return len(body) <= _PARSE_WHOLE_BYTES


def from_whole(body: bytes, read_usage: ReadUsage = openai_usage, tree: Any = None) -> Usage | None:
    """The usage of a reply that came whole; None when there is none to be found.

    Small bodies are parsed. In large ones (embeddings: megabytes of numbers) only the last `usage` object is, which
    stands outside the data.
    """
    if len(body) <= _PARSE_WHOLE_BYTES:
        if tree is None:
            tree = _json(body)
        return read_usage(tree) if isinstance(tree, dict) else None
    found_at = [match.end() for match in _USAGE.finditer(body)]
    if not found_at:
        return None
    start = found_at[-1]
    end = start
    while (end := body.find(b"}", end + 1, start + _MAX_USAGE_BYTES)) >= 0:
        tree = _json(body[start : end + 1])
        if isinstance(tree, dict):
            return read_usage({"usage": tree})
    return None


def cost_usd(usage: Usage, price: Price) -> float:
    """Dollars for these tokens; cached prompt tokens are charged at their own price.

        >>> from backends.usage import Usage
    from gateway.config import Price
        >>> cost_usd(Usage(1000, 500, 400), Price(input=2.0, cached_input=0.5, output=8.0))
        0.0054
    """
    cached = usage.cached_tokens or 0
    fresh = max(0, usage.prompt_tokens - cached - usage.cache_write_tokens)
    return (
        fresh * price.input
        + cached * price.cached_input
        + usage.cache_write_tokens * price.cache_write
        + usage.completion_tokens * price.output
    ) / 1_000_000


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
