"""One coarse timer for everything that has a deadline.

A timer handle per request costs more than the request's own bookkeeping, and nearly all are cancelled unused.
So deadlines are plain numbers, and a few times a second somebody walks over them. The price is resolution: a
deadline is noticed up to one interval late, never early. A loop that was held up reads its sockets before it runs
its timers, so nobody is timed out for data that had arrived.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Ticking(Protocol):
    """Something with deadlines to look after."""

    def tick(self, now: float) -> None:
        """Act on what is overdue. `now` is the event loop's time in seconds. May add and discard members."""


class Ticker:
    """Calls `tick(now)` on each member every `interval_s` seconds, and sleeps while it has none.

    Belongs to one event loop: the one given, else the one running at the first `add`. Members are compared by
    hash and equality, so give it plain objects.
    """

    __slots__ = ("_handle", "_interval_s", "_loop", "_members")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, interval_s: float = 0.1) -> None:
        self._loop = loop
        self._interval_s = interval_s
        self._members: dict[Ticking, None] = {}
        self._handle: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<Ticker members={len(self._members)} running={self._handle is not None}>"

    def add(self, member: Ticking) -> None:
        """Have `member.tick` called from now on. Adding twice is adding once."""
        self._members[member] = None
        if self._handle is None:
            self._arm()

    def discard(self, member: Ticking) -> None:
        """Stop calling `member.tick`; unknown members are ignored. The timer runs out by itself."""
        self._members.pop(member, None)

    def close(self) -> None:
        """Forget all members and cancel the timer."""
        self._members.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(self._interval_s, self._run)

    def _run(self) -> None:
        self._handle = None
        assert self._loop is not None
        now = self._loop.time()
        for member in tuple(self._members):
            if member not in self._members:
                continue
            try:
                member.tick(now)
            except Exception:
                logger.exception("tick of %r failed", type(member).__name__)
        if self._members and self._handle is None:  # a tick may have added a member, and so armed it
            self._arm()
