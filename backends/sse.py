"""Server-sent events taken apart, whatever the chunking and whichever of the three line endings is used."""

from __future__ import annotations

import re

BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
"""End of an event: a line end and an empty line, in any of the three line endings that SSE allows."""
_LINE_END = re.compile(rb"\r\n|\n|\r")
BOM = b"\xef\xbb\xbf"
"""May stand before a stream and is no part of it."""
DONE = b"[DONE]"


class EventTooLarge(Exception):
    """One event exceeded the limit without ending."""


def fields(event: bytes) -> tuple[bytes, bytes | None]:
    """An event's name and its data; None for the data when it has no data line (comments, pings)."""
    if event.startswith(b"data:") and b"\n" not in event and b"\r" not in event:
        return b"", event[5:].strip()
    name = b""
    data: list[bytes] = []
    for line in _LINE_END.split(event):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
    return name, b"\n".join(data).strip() if data else None


class EventSplitter:
    """Turns reads of any size into whole events. For translations; the relay of untouched streams has its own."""

    __slots__ = ("_late_line_feed", "_max_event_bytes", "_pending", "_scanned")

    def __init__(self, max_event_bytes: int = 1 << 20) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = bytearray()
        self._scanned = 0
        self._late_line_feed = False

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The events that are complete now, as (name, data); those without data are left out.

        Raises `EventTooLarge`.
        """
        if not self._pending and not self._late_line_feed and data[-2:] == b"\n\n" and b"\r" not in data:
            if len(data) > self._max_event_bytes and max(map(len, data.split(b"\n\n"))) > self._max_event_bytes:
                raise EventTooLarge
            # Nearly every read: whole events, plain line ends.
            told = [fields(event.removeprefix(BOM)) for event in data.split(b"\n\n")[:-1]]
            return [(name, payload) for name, payload in told if payload is not None]
        if self._late_line_feed and data:
            self._late_line_feed = False
            if data[:1] == b"\n":
                data = data[1:]
        pending = self._pending
        pending += data
        start = 0
        found: list[tuple[bytes, bytes]] = []
        for boundary in BOUNDARY.finditer(pending, self._scanned):
            name, payload = fields(bytes(pending[start : boundary.start()]).removeprefix(BOM))
            start = boundary.end()
            if payload is not None:
                found.append((name, payload))
        self._late_line_feed = bool(start) and start == len(pending) and pending.endswith(b"\r")
        del pending[:start]
        if len(pending) > self._max_event_bytes:
            raise EventTooLarge
        # A boundary is at most four bytes long, so only the last three seen can still become part of one.
        self._scanned = max(0, len(pending) - 3)
        return found
