"""Looks on at a server-sent-event stream of completions while its bytes pass through unchanged.

`StreamReader.feed` takes what one socket read brought and returns what may go to the client now: whole events only,
byte for byte, so that an error event can always be placed between two events. It learns on the way what settlement
and honesty need: when content began, which choices finished, the usage, an error sent in the stream, `[DONE]`.

Two events are kept back. The usage chunk, when the caller did not ask for it (the gateway always asks). And
`[DONE]` while some choice has no `finish_reason`: engines send it early when they are stopped, and passing it on
would turn a cut answer into a complete one.

Parsing every event would cost more than relaying it, so an event is parsed only when a few substring counts cannot
show that it is an ordinary content delta, unless somebody observes the stream. That is safe because a double quote
inside a JSON string is always escaped: the bytes `"finish_reason":null` can only be a key and its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from backends.sse import BOM, BOUNDARY, EventTooLarge, fields
from backends.usage import Usage, read_openai_usage

CUT_SHORT = frozenset({"abort", "insufficient_system_resource"})
"""Finish reasons that say the server gave up: vLLM and SGLang when they are stopped, DeepSeek when it has no room.

OpenAI's API knows none of them, and a client would take what it has for the whole answer.
"""
ABORTED = {"message": "The model server aborted the answer.", "code": 500}

ReadUsage = Callable[[Mapping[str, Any]], Usage | None]
"""Finds the usage in a whole answer or in a chunk of a stream; None when there is none."""

Observe = Callable[[dict[str, Any]], bytes | None]
"""Is shown the chunk of every event, and may change it; {} stands for an event that cannot be read, which passes.

Says what passes: None, the event as it came; b"", nothing; else these bytes, whole events, in its place.
"""


def openai_usage(tree: Mapping[str, Any]) -> Usage | None:
    """The usage where OpenAI's API puts it."""
    usage = tree.get("usage")
    return read_openai_usage(usage) if isinstance(usage, dict) else None


class StreamReader:
    """Reads one completion stream, whatever the chunking. Synchronous; holds at most one unfinished event."""

    __slots__ = (
        "_finished",
        "_frame_bytes",
        "_late_line_feed",
        "_pending",
        "_scanned",
        "content_bytes",
        "content_events",
        "content_started",
        "done",
        "error",
        "expected_choices",
        "hide_usage",
        "malformed_events",
        "max_event_bytes",
        "observe",
        "read_usage",
        "usage",
    )

    def __init__(
        self,
        *,
        expected_choices: int = 1,
        hide_usage: bool = False,
        max_event_bytes: int = 1 << 20,
        read_usage: ReadUsage = openai_usage,
        observe: Observe | None = None,
    ) -> None:
        """With `observe`, every event is parsed. It sees none that carries an error; usage is read after it."""
        self.expected_choices = expected_choices
        self.hide_usage = hide_usage
        self.max_event_bytes = max_event_bytes
        self.read_usage = read_usage
        self.observe = observe
        self.content_started = False
        """A content, reasoning, refusal or tool-call delta, or a finish reason, has been seen."""
        self.content_events = 0
        self.content_bytes = 0
        """About how many bytes of text, as JSON, the content events had: without what frames it in each."""
        self._frame_bytes = 0
        """What an event of this stream has besides its text, seen at its first content."""
        self.malformed_events = 0
        self.usage: Usage | None = None
        self.done = False
        """`[DONE]` has been seen."""
        self.error: dict[str, Any] | None = None
        """The error object an event carried; nothing is passed on from there."""
        self._finished: set[int] = set()
        self._late_line_feed: bytes | None = None
        """After an event that ended in CR: what to pass on for an LF, should it come first in the next read."""
        self._pending = bytearray()
        self._scanned = 0

    @property
    def complete(self) -> bool:
        """Every choice has a finish reason. `[DONE]` plays no part in it."""
        return len(self._finished) >= self.expected_choices

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return the whole events that may be passed on. Raises `EventTooLarge`."""
        if self._late_line_feed is not None and data:
            passed, self._late_line_feed = self._late_line_feed, None
            if data[:1] == b"\n":
                return passed + self.feed(data[1:])
        if self.done or self.error is not None:
            return b""
        if not self._pending and data.endswith(b"\n\n") and b"\r" not in data:
            if self.content_started and self.observe is None and self._is_ordinary(data):
                return data
            return self._events(data.split(b"\n\n")[:-1], b"\n\n")
        return self._feed_pieces(data)

    def _is_ordinary(self, data: bytes) -> bool:
        """Whether these whole events are content deltas and nothing else; if so, count them."""
        events = data.count(b"\n\n")
        if (
            data.count(b'"finish_reason":null') == events
            and data.count(b'"finish_reason":') == events
            and data.count(b'"choices":[{') == events
            and b'"usage":{' not in data
            and b'"error":' not in data
            and len(data) <= self.max_event_bytes
        ):
            self.content_events += events
            self.content_bytes += max(events, len(data) - events * self._frame_bytes)
            return True
        return False

    def _feed_pieces(self, data: bytes) -> bytes:
        """The general case: events in pieces, or with carriage returns."""
        pending = self._pending
        pending += data
        start = 0
        passed: list[bytes] = []
        for boundary in BOUNDARY.finditer(pending, self._scanned):
            end = boundary.end()
            passed.append(self._event(bytes(pending[start : boundary.start()]), bytes(pending[boundary.start() : end])))
            start = end
            if self.done or self.error is not None:
                break
        if start and start == len(pending) and pending.endswith(b"\r"):
            self._late_line_feed = b"\n" if passed[-1] else b""
        del pending[:start]
        if len(pending) > self.max_event_bytes:
            raise self._too_large()
        # A boundary is at most four bytes long, so only the last three seen can still become part of one.
        self._scanned = max(0, len(pending) - 3)
        return b"".join(passed)

    def _events(self, events: list[bytes], terminator: bytes) -> bytes:
        passed: list[bytes] = []
        for event in events:
            passed.append(self._event(event, terminator))
            if self.done or self.error is not None:
                break
        return b"".join(passed)

    def _event(self, event: bytes, terminator: bytes) -> bytes:
        """Judge one event; return it with its terminator, or nothing when it must not be passed on."""
        if len(event) > self.max_event_bytes:
            raise self._too_large()
        name, payload = fields(event.removeprefix(BOM))
        if payload is None:
            return event + terminator
        if payload == b"[DONE]":
            self.done = True
            return event + terminator if self.complete else b""
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            self.malformed_events += 1
            if self.observe is not None:
                self.observe({})
            return event + terminator
        error = _error_in(chunk, name)
        if error is not None:
            self.error = error
            return b""
        if not self._read_choices(chunk.get("choices"), len(event) + len(terminator)):
            self.error = dict(ABORTED)
            return b""
        instead = None if self.observe is None else self.observe(chunk)
        if isinstance(chunk.get("usage"), dict):
            self.usage = self.read_usage(chunk)
            if self.hide_usage and not chunk.get("choices"):
                return b""
        return event + terminator if instead is None else instead

    def _too_large(self) -> EventTooLarge:
        """Whoever observes is told, too: what came before it in the same read was shown, and is not passed on."""
        if self.observe is not None:
            self.observe({})
        return EventTooLarge()

    def _read_choices(self, choices: Any, size_bytes: int) -> bool:
        """Take note of what each choice brought; False when the server gave one up."""
        if not isinstance(choices, list):
            return True
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            reason = choice.get("finish_reason")
            if reason:
                if isinstance(reason, str) and reason in CUT_SHORT:
                    return False
                index = choice.get("index")
                self._finished.add(index if type(index) is int else 0)
                self.content_started = True
            text_bytes = _content_bytes(choice)
            if text_bytes:
                self.content_events += 1
                self.content_bytes += text_bytes
                self._frame_bytes = max(0, size_bytes - text_bytes)
                self.content_started = True
        return True


def _error_in(chunk: dict[str, Any], name: bytes) -> dict[str, Any] | None:
    """The error an event carries: OpenAI's nested form, a bare string, or SGLang's flat object."""
    error = chunk.get("error")
    if isinstance(error, dict) and error:
        return error
    if error:
        return {"message": str(error)}
    if chunk.get("object") == "error" or name == b"error":
        return chunk
    return None


def _content_bytes(choice: dict[str, Any]) -> int:
    """About the bytes of what a choice brings, at least 1; 0 when it brings nothing.

    Any delta besides the role counts: content, reasoning under any of its names, refusal, tool calls, audio.
    """
    text = choice.get("text")
    if text:
        return _size_bytes(text)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return 0
    return sum(_size_bytes(value) for key, value in delta.items() if value and key != "role")


def _size_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode(errors="replace")) or 1
    try:
        return len(orjson.dumps(value))
    except TypeError:
        return 1
