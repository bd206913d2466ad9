"""What the workers of a gateway share, and the few whole operations by which they share it.

Two kinds of state live in a store, besides the streams of `streams`, and losing all of it costs duplicate work, never a
wrong answer:

*Leases* say who does a job that one worker is enough for. They are efficiency locks: a holder that was paused longer
than its lease may find that somebody else has begun too, so a lease must never guard what has to happen once. See
Martin Kleppmann, "How to do distributed locking", 2016.

*Facts* are short notes under a key that every worker wants to know. The last write wins, and every reader follows
them with a cursor of its own.

There is no get and no set: whoever reads, decides and writes back races with everybody else, so each operation is
decided as a whole inside the store. This module is what another implementation is built from, and
`tests/gateway/store/test_contract.py` holds every implementation to it.

    StoreError             the operation was not carried out
    ├── StoreFull          the store holds as much as it may; nothing changed
    └── StoreUnavailable   nobody answered; whether the operation took effect is unknown
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from gateway.store.streams import Streams

START = ""
"""The cursor of a reader that knows nothing yet."""

MAX_NAME_BYTES = 512
"""Longest lease name, holder and key, in UTF-8."""
MAX_VALUE_BYTES = 65_536
MAX_TTL_S = 86_400.0
MAX_WAIT_S = 60.0


class StoreError(Exception):
    """The operation was not carried out."""


class StoreFull(StoreError):
    """The store holds as much as it may. Nothing changed; what expires makes room again."""


class StoreUnavailable(StoreError):
    """Nobody answered at `address`. Whether the operation took effect is unknown; all of them may be repeated."""

    def __init__(self, address: str, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"the store at {address} is unavailable: {reason}")
        self.address = address
        self.reason = reason
        self.retry_after_s = retry_after_s
        """Seconds for which another attempt would fail at once."""

    def __reduce__(self) -> tuple[type[StoreUnavailable], tuple[str, str, float]]:
        return type(self), (self.address, self.reason, self.retry_after_s)


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """What a key says now; a value of None says that it was withdrawn or has expired."""

    key: str
    value: bytes | None


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """What is new to one reader."""

    cursor: str
    """Where to go on reading. Means something to the store that gave it, and to nobody else."""
    changes: tuple[Fact, ...] = ()
    """Each key at most once, the longest unchanged first."""
    reset: bool = False
    """Forget every fact known before these changes, which are then all that hold."""


class Store(Streams, Protocol):
    """Shared state, in this process or behind a connection. One event loop's; tasks of that loop may share it.

    Every operation is atomic, and may be repeated without harm when its outcome is unknown (`publish` aside). The ones
    that a single caller awaits one after the other take effect in that order. All time is measured by the store's own
    clock, never by a caller's. Each operation may raise `StoreUnavailable`, and does so after `aclose`; arguments
    outside the limits of this module are a `ValueError`.
    """

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        """Take the lease, or renew it: True when `holder` has it for the `ttl_s` seconds from now on.

        False, and nothing changed, while somebody else has it. A renewal replaces what was left of the earlier one,
        also by less. From the end of its time a lease is free, as if it had never been. `holder` names one life of
        one worker: a number that a restarted worker would use again would have it inherit its predecessor's leases.
        Raises `StoreFull`.
        """
        ...

    async def release(self, lease: str, holder: str) -> None:
        """Give the lease up. Nothing happens when `holder` does not have it (any more)."""
        ...

    async def post(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """State a fact, in place of what the key said before; after `ttl_s` seconds it no longer holds.

        None is for facts that hold until they are withdrawn, or until the store itself ends. A post always counts as a
        change, so readers see it even if the value stayed the same. Raises `StoreFull`.
        """
        ...

    async def withdraw(self, key: str) -> None:
        """End a fact. Nothing happens, and readers are told nothing, when the key says nothing."""
        ...

    async def read_since(self, cursor: str, wait_s: float = 0.0) -> Facts:
        """What was posted, was withdrawn or has expired since `cursor` was given; waits for it up to `wait_s` seconds.

        - A reader that goes from cursor to cursor sees every change, or a later value of the same key, and never an
          older value after a newer one. Applied in order, what it read is what holds.
        - Of changes in quick succession to one key, only the last needs to be shown. A store may hold an answer back
          for up to `GATHER_S` (never beyond `wait_s`) in order to tell several changes at once.
        - A key that was posted and ended since `cursor` may be shown as None although this reader never saw a value.
        - Expiry is shown like a withdrawal, at most `EXPIRY_SEEN_WITHIN_S` after the fact has ended. An answer never
          has a value that no longer held when the answer was made.
        - `START`, and a cursor that the store cannot continue from, get everything: `reset` is set, and the changes
          are all facts that hold. That is so at once, without waiting, even if there are none. A store cannot continue
          from a cursor of another life of the store (it lost its memory in a restart), nor from one so old that the
          ends of facts since then are no longer remembered. It may set `reset` whenever it likes; it must not leave it
          out. The same holds for text that no store ever gave as a cursor.
        - After `wait_s` without news the answer has the same cursor, or an equivalent one, and no changes.

        Cancelling a read that waits leaves nothing behind.
        """
        ...

    async def aclose(self) -> None:
        """End this connection to the store, and every read that waits on it. What was stored stays."""
        ...


GATHER_S = 0.02
"""Bounds how often a busy store wakes each reader: 50 times a second, whatever the number of posts."""
EXPIRY_SEEN_WITHIN_S = 1.0


def check_name(what: str, name: str) -> None:
    """Raises `ValueError`, which says what the name is of, unless it has 1 to `MAX_NAME_BYTES` bytes of UTF-8."""
    if not name or len(name) > MAX_NAME_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{what} must have 1 to {MAX_NAME_BYTES} bytes, got {name[:40]!r}")


def check_value(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"a fact's value may have {MAX_VALUE_BYTES} bytes, got {len(value)}")


def check_ttl(ttl_s: float | None) -> None:
    if ttl_s is not None and not 0 < ttl_s <= MAX_TTL_S:  # which NaN is not either
        raise ValueError(f"ttl_s must be above 0 and at most {MAX_TTL_S:g}, got {ttl_s}")


def check_wait(wait_s: float) -> None:
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise ValueError(f"wait_s must be 0 to {MAX_WAIT_S:g}, got {wait_s}")
