"""What the fake engine does with a request: one frozen record, written in Python, in a header or in the body.

In a test:         ``engine.script = Behaviour(chunks=3, cut_after=2)``
As a header:       ``x-fake: chunks=3; cut_after=2; crlf``   (a bare key means true)
In the JSON body:  ``"fake": {"chunks": 3, "cut_after": 2, "crlf": true}``   (passes any gateway)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import msgspec


class BadBehaviour(ValueError):
    """The script names an unknown key, or a value has the wrong type."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How to answer one request. The default is a healthy engine that answers at once.

    "After n" counts content events; the role event and reasoning events come before and do not count.
    Fields marked (stream) do nothing to a plain JSON answer and the other way round.
    """

    mark: str = ""
    """A name for the request in the log that `loadtests.served_log` writes; changes nothing else."""

    # -- the shape of a healthy answer
    chunks: int = 16
    """Content events of a stream; also the completion tokens that the usage reports."""
    chunk_bytes: int = 230
    """Approximate size of one content event on the wire (never below what its JSON needs)."""
    prompt_tokens: int = 256
    cached_tokens: int = 128
    reasoning: int = 0
    """Reasoning events before the content (stream), or a reasoning text in the message."""
    tool_calls: int = 0
    """Answer with this many tool calls instead of text; a stream sends a name and two argument pieces."""
    refusal: bool = False
    """Answer with ``refusal`` instead of ``content``."""
    no_usage: bool = False
    usage_null: bool = False
    """(stream) Every event but the usage event carries ``"usage": null``, as OpenAI does it."""
    counting: bool = False
    """A text whose pieces are numbered, and which is gone on with where a chat begins it (`loadtests.counting`)."""
    timestamps: bool = True
    """(stream) A paced stream's content events carry CLOCK_MONOTONIC in nanoseconds as ``"t"``."""

    # -- timing, in seconds
    interval_s: float = 0.0
    """(stream) Time between content events; 0 sends all of them at once."""
    delay_head_s: float = 0.0
    """Time before the status line."""
    ttft_s: float = 0.0
    """Time between the head and the first event of a stream; for a plain answer it adds to delay_head_s."""
    hang: bool = False
    """Read the request and never answer."""
    hang_mid: int | None = None
    """(stream) Fall silent after n content events, with the connection open."""
    role_only_then_hang: bool = False
    """(stream) Send the role event and fall silent."""
    slow_body_read_s: float = 0.0
    """Stop reading for this long after every read of a request body. Only from the script or the header."""

    # -- errors in the status and the body
    status: int = 200
    """Anything but 200 is answered with an OpenAI-shaped JSON error."""
    error_body: str | None = None
    """Replaces that JSON error's body."""
    retry_after: str | None = None
    """Value of a ``Retry-After`` header, sent with any answer."""
    bad_json: bool = False
    """A plain answer that stops in the middle of its JSON; in a stream, the last content event does."""
    error_first: bool = False
    """(stream) Status 200, then an error event and [DONE] instead of anything else."""
    error_event_after: int | None = None
    """(stream) After n content events an error event, then [DONE]."""

    # -- streams that end in the wrong way
    cut_after: int | None = None
    """(stream) After n content events the connection is reset (TCP RST; a plain close on a unix socket)."""
    truncate_after: int | None = None
    """(stream) After n content events the body ends properly: no finish_reason, no usage, no [DONE]."""
    done_without_finish: bool = False
    finish_without_done: bool = False
    early_done: int | None = None
    """(stream) [DONE] after n content events, and then everything else all the same."""
    empty_stream: bool = False
    """(stream) Status 200 and an event stream without a single byte."""

    # -- spelling
    pings: bool = False
    """(stream) A comment line (``: ping``) before every event."""
    crlf: bool = False
    """(stream) Lines end in CR LF."""
    spaces: bool = False
    """JSON with a space after each comma and colon, as Python's json writes it."""
    big_event_bytes: int = 0
    """(stream) The first content event has a text of this size."""
    huge_body_bytes: int = 0
    """A plain answer whose text has this size."""

    # -- HTTP
    split: int = 0
    """Write the whole response, head included, in pieces of this size, each in its own turn of the loop."""
    interim: int = 0
    """An interim response with this status (100, 103) before the real one."""
    content_length_short: int = 0
    """(plain) Close the connection this many bytes before the announced Content-Length."""
    close_delimited: bool = False
    """Neither Content-Length nor chunks: the body ends where the connection does."""
    connection_close: bool = False
    """Say ``Connection: close`` and do it."""
    keepalive_s: float | None = None
    """Close the connection without a word after it was idle for so long (0: right after the answer)."""
    raw: str | None = None
    """Send exactly these characters (latin-1) instead of an answer, then close."""

    def updated(self, values: Mapping[str, object]) -> Behaviour:
        """This behaviour with some keys replaced; strings are read as the key's type ("0.5", "true", "3")."""
        unknown = values.keys() - _NAMES
        if unknown:
            raise BadBehaviour(f"unknown behaviour: {', '.join(sorted(unknown))}")
        try:
            parsed = msgspec.convert(dict(values), Behaviour, strict=False)
        except msgspec.ValidationError as error:
            raise BadBehaviour(str(error)) from error
        return replace(self, **{name: getattr(parsed, name) for name in values})

    def updated_from_header(self, value: str) -> Behaviour:
        """The same from ``key=value; key=value; key``."""
        pairs = (part.partition("=") for part in value.split(";") if part.strip())
        return self.updated({key.strip(): text.strip() if equals else "true" for key, equals, text in pairs})


_NAMES = frozenset(field.name for field in fields(Behaviour))
