"""What the tests of hosted APIs share: how a recorded answer is judged and relayed, and what a reader must stand."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from backends.dialects.openai import OpenAI
from backends.dialects.protocol import Fault
from gateway.sse import StreamReader
from gateway.upstream_errors import error_of
from tests.backends.dialects.asking import recorded

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def objects_with(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects that often have members of these names, with values of any kind."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=8), JSON, max_size=6)


ERRORS = objects_with("code", "message", "type", "metadata", "availability", "status", "limit_source", "patterns")
STATUSES = st.integers(300, 599)


def judged(dialect: OpenAI, name: str) -> Fault:
    """Whose fault a recorded error answer is."""
    status, body = recorded(name)
    return dialect.judge_error(status, error_of(body))


def relayed(dialect: OpenAI, name: str, piece_bytes: int, *, hide_usage: bool = False) -> tuple[bytes, StreamReader]:
    """A recorded stream sent through the relay's reader in pieces of a size; what came out, and the reader."""
    _, body = recorded(name)
    reader = StreamReader(hide_usage=hide_usage, read_usage=dialect.read_usage)
    pieces = [body[start : start + piece_bytes] for start in range(0, len(body), piece_bytes)]
    return b"".join([reader.feed(piece) for piece in pieces]), reader
