"""A request's place in its trace, read from and written as the W3C's `traceparent` and `tracestate`.

https://www.w3.org/TR/trace-context/: version 00 is written. A later version is read as far as 00 goes; what is
malformed is ignored, with its `tracestate`, and the request begins a trace of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import getrandbits
from typing import TYPE_CHECKING

import msgspec

from gateway.telemetry.names import RESPONSE_HEADER

if TYPE_CHECKING:
    from gateway.telemetry.content import Captured

SAMPLED = 1
"""The flag of the last field: whoever sent it records this trace."""
MAX_STATE_BYTES = 512
"""Of `tracestate`: what the recommendation has everybody pass on. A longer one is dropped, whole."""

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_STATE = re.compile(rb"[\x20-\x7e\t]*")


class Parent(msgspec.Struct, frozen=True, gc=False):
    """What a caller says of the trace that its request is part of."""

    trace_id: int
    span_id: int
    sampled: bool


class TraceContext(msgspec.Struct, gc=False):
    """The ids of one request. They are chosen before it is known how it ends, since engines get them."""

    trace_id: int
    """128 bits, not 0."""
    span_id: int
    """64 bits, not 0: of the request's own span."""
    parent_id: int
    """Of the caller's span; 0: the trace begins here."""
    sampled: bool
    """What engines are told. A request that was left out may still be kept when it ends badly (`tracing.unusual`)."""
    state: bytes = b""
    """The caller's `tracestate`, as it came."""
    own: bool = True
    """Engines of one's own are told."""
    hosted: bool = False
    """Rented APIs are told as well."""
    replied: bool = False
    """The response says which trace it belongs to."""
    capture_max_bytes: int = 0
    """How much of each text is kept, where any is."""
    captured: Captured | None = None
    """The texts of request and answer, where the caller's key asks for them to be kept."""

    def headers(self, span_id: int, *, hosted: bool) -> list[tuple[bytes, bytes]]:
        """What goes to the server that an attempt asks, with the attempt's span as the parent."""
        if not (self.hosted if hosted else self.own):
            return []
        parent = (b"traceparent", self.parent_of(span_id))
        return [parent, (b"tracestate", self.state)] if self.state else [parent]

    def reply_headers(self) -> list[tuple[bytes, bytes]]:
        """What the response says of its trace, where it is to say anything."""
        return [(RESPONSE_HEADER, self.parent_of(self.span_id))] if self.replied else []

    def parent_of(self, span_id: int) -> bytes:
        """The value of `traceparent` for what this span calls."""
        return b"00-%032x-%016x-%02x" % (self.trace_id, span_id, self.sampled)


def new_span_id() -> int:
    """64 random bits, never 0. They are no secret, and need not be hard to guess."""
    return getrandbits(64) or 1


def new_trace_id() -> int:
    """128 random bits, never 0."""
    return getrandbits(128) or 1


def parent_in(headers: Sequence[tuple[bytes, bytes]]) -> tuple[Parent | None, bytes]:
    """The caller's place in a trace, and its `tracestate`; None where it says none, or not as it should be.

    Header names are lower case. Two `traceparent` fields are malformed; several `tracestate` are one list.
    """
    parent: bytes | None = None
    states: list[bytes] = []
    for name, value in headers:
        if name == b"traceparent":
            if parent is not None:
                return None, b""
            parent = value
        elif name == b"tracestate":
            states.append(value)
    if parent is None:
        return None, b""
    found = parsed(parent)
    if found is None or not states:
        return found, b""
    state = b",".join(states)
    return found, state if len(state) <= MAX_STATE_BYTES and _STATE.fullmatch(state) else b""


def parsed(value: bytes) -> Parent | None:
    """A `traceparent`, or None for one that is malformed."""
    match = _PARENT.fullmatch(value.strip(b" \t"))
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & SAMPLED))
