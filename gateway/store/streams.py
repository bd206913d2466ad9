"""What the workers of a gateway tell each other in a steady flow: streams of messages, and the last word of one worker.

A *stream* holds the last messages that were published to it, of whatever form. It is for what may be lost: somebody who
is slow, or comes late, misses what was dropped since, and is not told so; who needs to know numbers the messages. So no
reader, however slow, makes a store grow. A *kept* blob is a whole that was put together from such messages, for those
who come late; it is larger than a fact may be, and nobody is woken by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

MAX_MESSAGE_BYTES = 65_536
MAX_BLOB_BYTES = 4 * 1024 * 1024
MAX_STREAM_MESSAGES = 16_384
"""About how many messages of a stream are kept. Sixteen busy workers fill that in ten seconds."""
PAGE_MESSAGES = 256
"""Of one stream in one answer."""


class Passage(msgspec.Struct, frozen=True, array_like=True):
    """What is new in one stream."""

    stream: str
    cursor: str
    """Where to go on reading. Means something to the store that gave it, and to nobody else."""
    payloads: tuple[bytes, ...]
    """The oldest first. May be empty: then only the cursor has moved."""


class Streams(Protocol):
    """A part of `Store`, to which what that says of errors, repetition and time applies as well.

    Publishing is the one operation that may not be repeated without harm: readers see the message twice.
    """

    async def publish(self, stream: str, payload: bytes) -> None:
        """Append a message of at most `MAX_MESSAGE_BYTES`. Those of one caller stay in their order."""
        ...

    async def follow(self, cursors: Mapping[str, str], wait_s: float = 0.0) -> tuple[Passage, ...]:
        """What was published to these streams since their cursors; waits up to `wait_s` seconds for the first message.

        `START`, and a cursor that the store cannot continue from (of another life of it, or text that no store ever
        gave), get everything that is kept. An answer has at most `PAGE_MESSAGES` of each stream: ask again until there
        are none. Streams without a message may be left out. Cancelling a call that waits leaves nothing behind.
        """
        ...

    async def keep(self, name: str, blob: bytes, ttl_s: float) -> None:
        """Store a blob of at most `MAX_BLOB_BYTES` for `ttl_s` seconds, in place of what was kept under this name.

        Raises `StoreFull`.
        """
        ...

    async def kept(self, name: str) -> bytes | None:
        """The blob of this name; None when there is none (any more)."""
        ...


def check_payload(payload: bytes) -> None:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message may have {MAX_MESSAGE_BYTES} bytes, got {len(payload)}")


def check_blob(blob: bytes) -> None:
    if len(blob) > MAX_BLOB_BYTES:
        raise ValueError(f"a kept blob may have {MAX_BLOB_BYTES} bytes, got {len(blob)}")
