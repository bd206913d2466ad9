"""The streams and kept blobs of a memory store: plain synchronous code, and readers that wait around it.

The messages of all streams stand in one log with one bound, since everybody follows all of them anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway.store.protocol import StoreFull
from gateway.store.streams import MAX_STREAM_MESSAGES, PAGE_MESSAGES, Passage

MAX_LOG_BYTES = 16 * 1024 * 1024
MESSAGE_BYTES = 150
"""What a message is counted with on top of its payload: about what this process spends on keeping one."""
PAGE_BYTES = 262_144
"""An answer has at most this, and one message more."""
MAX_KEPT_BYTES = 64 * 1024 * 1024


class MessageLog:
    """The last messages, numbered without gaps. A cursor is the number of the last message its reader was shown."""

    def __init__(
        self, generation: str, *, max_messages: int = MAX_STREAM_MESSAGES, max_bytes: int = MAX_LOG_BYTES
    ) -> None:
        self._generation = generation
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: dict[int, tuple[str, bytes]] = {}
        self._size_bytes = 0
        self._first = 1
        """The number of the oldest message that is kept."""
        self._last = 0

    def __len__(self) -> int:
        return len(self._messages)

    def publish(self, stream: str, payload: bytes) -> None:
        self._last += 1
        self._messages[self._last] = stream, payload
        self._size_bytes += len(payload) + MESSAGE_BYTES
        while len(self._messages) > self._max_messages or self._size_bytes > self._max_bytes:
            _, dropped = self._messages.pop(self._first)
            self._size_bytes -= len(dropped) + MESSAGE_BYTES
            self._first += 1

    def read(self, cursors: Mapping[str, str]) -> tuple[Passage, ...]:
        """A page of what is new, for every stream that is asked for; empty when there is nothing new in any of them."""
        seen = {stream: self._seen(cursor) for stream, cursor in cursors.items()}
        news: dict[str, list[bytes]] = {}
        count = size_bytes = 0
        number = min(seen.values(), default=self._last)
        while number < self._last and count < PAGE_MESSAGES and size_bytes < PAGE_BYTES:
            number += 1
            stream, payload = self._messages[number]
            if seen.get(stream, number) < number:
                news.setdefault(stream, []).append(payload)
                count += 1
                size_bytes += len(payload)
        if not news:
            return ()
        return tuple(
            Passage(stream, self._cursor(max(number, last)), tuple(news.get(stream, ())))
            for stream, last in seen.items()
        )

    def _cursor(self, number: int) -> str:
        return f"{self._generation}.{number}"

    def _seen(self, cursor: str) -> int:
        """The number of the last message seen, at least that before the oldest one kept."""
        generation, _, number = cursor.rpartition(".")
        if generation != self._generation or not (number.isascii() and number.isdecimal() and len(number) < 20):
            return self._first - 1
        return max(self._first - 1, int(number)) if int(number) <= self._last else self._first - 1


class KeptBlobs:
    """`now` is in seconds and never goes back."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._blobs: dict[str, tuple[bytes, float]] = {}

    def keep(self, name: str, blob: bytes, ends_at: float, now: float) -> None:
        others = {each: kept for each, kept in self._blobs.items() if each != name and kept[1] > now}
        if sum(len(kept) for kept, _ in others.values()) + len(blob) > self._max_bytes:
            raise StoreFull(f"all kept blobs together may have {self._max_bytes} bytes")
        self._blobs = {**others, name: (blob, ends_at)}

    def get(self, name: str, now: float) -> bytes | None:
        blob, ends_at = self._blobs.get(name, (b"", 0.0))
        if ends_at > now:
            return blob
        self._blobs.pop(name, None)
        return None


class Followers:
    """Those who wait for the next message of any stream."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, within_s: float) -> None:
        """Returns at the next `wake`, or when the time is over."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        timer = loop.call_later(within_s, _wake, woken)
        self._waiting.add(woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._waiting.discard(woken)

    def wake(self) -> None:
        for woken in self._waiting:
            _wake(woken)
        self._waiting.clear()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
