"""The client's side of an exchange: what an edge must offer for a reply to be written.

Two edges implement it, the protocol edge (straight to the socket) and the ASGI edge (through `send`). All methods are
synchronous: a relay writes from inside the upstream's read callback, so that no task wakes up per chunk. Bounds are
kept by flow control instead: when the client's side is full the edge calls `on_pause(True)`, and the relay stops
reading from the upstream until `on_pause(False)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Headers = list[tuple[bytes, bytes]]


class Reply(Protocol):
    """One HTTP response to be written. A client that has gone makes every method a no-op."""

    started: bool
    """The status line is out (or on its way); only the body can still change."""
    on_pause: Callable[[bool], None] | None

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a whole response in one go. `content-length` is added."""

    def start(self, status: int, headers: Headers) -> None:
        """Begin a streamed response. The head goes out together with the first `write`."""

    def write(self, data: bytes) -> None:
        """One piece of a streamed body. Never empty."""

    def finish(self) -> None:
        """End a streamed response cleanly."""

    def abort(self) -> None:
        """End it in a way that the client sees as broken."""
