"""What a worker and the supervisor's store say to each other: msgpack messages, each behind its length.

Requests have numbers, so that many can be under way on one connection and a read that waits holds up nobody. Both
ends are this program and the socket lies in a private folder; the limits are there for defects, not for attackers.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from gateway.store.protocol import MAX_NAME_BYTES, Fact
from gateway.store.streams import MAX_BLOB_BYTES, Passage

_LENGTH_BYTES = 4
MAX_REQUEST_BYTES = MAX_BLOB_BYTES + 2 * MAX_NAME_BYTES + 256
"""The largest is one that keeps a blob."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""Everything that a memory store can hold, and then some: see `MAX_FACTS_BYTES` and `MAX_TOMBSTONES` in `memory`."""


class FrameError(Exception):
    """The other end said something that it cannot mean; the connection is of no further use."""


class Claim(msgspec.Struct, frozen=True, array_like=True, tag=1):
    number: int
    lease: str
    holder: str
    ttl_s: float


class Release(msgspec.Struct, frozen=True, array_like=True, tag=2):
    number: int
    lease: str
    holder: str


class Post(msgspec.Struct, frozen=True, array_like=True, tag=3):
    number: int
    key: str
    value: bytes
    ttl_s: float | None


class Withdraw(msgspec.Struct, frozen=True, array_like=True, tag=4):
    number: int
    key: str


class Read(msgspec.Struct, frozen=True, array_like=True, tag=5):
    number: int
    cursor: str
    wait_s: float


class Forget(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Nobody waits for the answer of this read any more. Has no answer itself."""

    number: int


class Publish(msgspec.Struct, frozen=True, array_like=True, tag=7):
    number: int
    stream: str
    payload: bytes


class Follow(msgspec.Struct, frozen=True, array_like=True, tag=8):
    number: int
    cursors: dict[str, str]
    wait_s: float


class Keep(msgspec.Struct, frozen=True, array_like=True, tag=9):
    number: int
    name: str
    blob: bytes
    ttl_s: float


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """What is kept under this name."""

    number: int
    name: str


Request = Claim | Release | Post | Withdraw | Read | Forget | Publish | Follow | Keep | Fetch


class Done(msgspec.Struct, frozen=True, array_like=True, tag=1):
    number: int
    claimed: bool = False


class Told(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The answer to a read: the fields of `Facts`."""

    number: int
    cursor: str
    changes: tuple[Fact, ...]
    reset: bool


class Full(msgspec.Struct, frozen=True, array_like=True, tag=3):
    number: int
    message: str


class Invalid(msgspec.Struct, frozen=True, array_like=True, tag=4):
    number: int
    message: str


class Followed(msgspec.Struct, frozen=True, array_like=True, tag=5):
    number: int
    passages: tuple[Passage, ...]


class Fetched(msgspec.Struct, frozen=True, array_like=True, tag=6):
    number: int
    blob: bytes | None


Answer = Done | Told | Full | Invalid | Followed | Fetched


def framed(encoder: msgspec.msgpack.Encoder, message: Request | Answer) -> bytearray:
    """A message as it is written."""
    frame = bytearray(_LENGTH_BYTES)
    encoder.encode_into(message, frame, _LENGTH_BYTES)
    frame[:_LENGTH_BYTES] = (len(frame) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "big")
    return frame


class Splitter:
    """Cuts what arrives, in whatever pieces, into the messages' bytes. Holds at most one unfinished message."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete now. Raises `FrameError` at one that announces too much."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH_BYTES:
                body = start + _LENGTH_BYTES
                size_bytes = int.from_bytes(buffer[start:body], "big")
                if size_bytes > self._max_bytes:
                    raise FrameError(f"a message of {size_bytes} bytes; {self._max_bytes} are allowed")
                if len(buffer) < body + size_bytes:
                    return
                start = body + size_bytes
                yield bytes(buffer[body:start])
        finally:
            del buffer[:start]
