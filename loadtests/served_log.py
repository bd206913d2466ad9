"""What a fake engine's process did, line by line: each is in the kernel before the engine goes on, so none is lost.

``python -m loadtests.engine --log FILE`` writes it. Times are `time.monotonic()`, which all processes share.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from loadtests.connection import Request

Event = Literal["received", "answered", "gone"]
"""`gone`: the peer's connection ended before the answer was complete."""


class Line(msgspec.Struct, array_like=True):
    """One event of one request."""

    event: Event
    id: str
    """Its `x-request-id`."""
    at_s: float
    tokens: int = 0
    """Of the answer, as its usage says."""
    begun_bytes: int = 0
    """Of a text that it went on with (`loadtests.counting`)."""
    status: int = 0
    authorization: str = ""
    """The credential it came with."""
    mark: str = ""
    """What the client calls it (`Behaviour.mark`)."""


def writing_to(path: Path) -> Callable[[Event, Request], None]:
    """A function that appends to the file; one system call for each event."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(event: Event, request: Request) -> None:
        at_s = request.received_at if event == "received" else request.completed_at or request.closed_at or 0.0
        line = Line(
            event,
            request.header("x-request-id") or "",
            at_s,
            request.behaviour.chunks,
            request.begun_bytes,
            request.behaviour.status,
            request.header("authorization") or "",
            request.behaviour.mark,
        )
        os.write(file, msgspec.json.encode(line) + b"\n")

    return write


def read_log(path: Path) -> list[Line]:
    """All of it so far; a file that does not exist yet is empty."""
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
