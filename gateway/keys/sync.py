"""Keeps a directory current: reads what changed in the database twice a second, and at once when told to.

One thread does all the reading, so that there is never a second question while the first hangs; it is a daemon, so that
a database that never answers cannot keep the process from ending. What was read is applied in the event loop, and how
old it is, is judged there, whatever the thread is stuck in: see `gateway.keys.directory.Freshness`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from gateway.database.answers import Changes
from gateway.database.errors import DatabaseError
from gateway.keys.directory import Directory, Freshness

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""A revocation by another process holds here after this time and one reading, also when no fact tells of it."""
AGED_AFTER_S = 5.0
"""From then on a key that is not known may be one that was made since: nobody can say (503)."""
DEFAULT_STALE_S = 900.0
"""As `keys.stale_s`: how long known keys are let in while the database is away."""
_END_WITHIN_S = 2.0

Read = Callable[[int], Changes]
"""Everything newer than a version, and everything there is for version 0; `KeyStore.changed_since`."""


@dataclass
class Counts:
    """For metrics."""

    readings: int = 0
    failures: int = 0
    changes: int = 0
    """Keys and tenants that were new, different or gone."""


@dataclass
class _Handover:
    """What the thread and the event loop tell each other."""

    wake: threading.Event = field(default_factory=threading.Event)
    closing: bool = False


class KeySync:
    """Built, started and closed in one event loop."""

    def __init__(
        self,
        directory: Directory,
        read: Read,
        *,
        stale_s: float = DEFAULT_STALE_S,
        poll_s: float = POLL_S,
        aged_after_s: float = AGED_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = Counts()
        self._directory = directory
        self._read = read
        self._stale_s = stale_s
        self._poll_s = poll_s
        self._aged_after_s = min(aged_after_s, stale_s)
        self._clock = clock
        self._read_at: float | None = None
        self._failing_since: float | None = None
        self._loaded = asyncio.Event()
        self._handover = _Handover()
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Event | None = None
        self._judging: asyncio.TimerHandle | None = None

    @property
    def keys_known(self) -> int:
        return len(self._directory)

    def age_s(self) -> float | None:
        """Seconds since the last reading that succeeded was begun; None before the first."""
        return None if self._read_at is None else self._clock() - self._read_at

    def start(self) -> None:
        """Begin to read, now and from now on."""
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._follow, args=(loop, self._ended), name="keys", daemon=True)
        self._thread.start()
        self._judge()

    async def first_load(self, within_s: float) -> bool:
        """Whether the keys are known by then. They go on being asked for afterwards, and nobody is let in before."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._loaded.wait(), within_s)
        return self._loaded.is_set()

    def nudge(self) -> None:
        """Something has changed: look now instead of at the next turn. May be called as often as one likes."""
        self._handover.wake.set()

    async def aclose(self) -> None:
        """End. A reading that hangs is left to itself after two seconds; nothing it says is heard any more."""
        self._handover.closing = True
        self._handover.wake.set()
        if self._judging is not None:
            self._judging.cancel()
        if self._ended is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _END_WITHIN_S)

    # -- in the thread

    def _follow(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        handover = self._handover
        version = 0
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            while not handover.closing:
                handover.wake.clear()
                begun = self._clock()
                try:
                    changes = self._read(version)
                except Exception as error:
                    loop.call_soon_threadsafe(self._failed, error)
                else:
                    version = changes.version
                    loop.call_soon_threadsafe(self._succeeded, changes, begun)
                handover.wake.wait(self._poll_s)
            loop.call_soon_threadsafe(ended.set)

    # -- in the loop

    def _succeeded(self, changes: Changes, begun: float) -> None:
        if self._handover.closing:
            return
        self.counts.readings += 1
        count = len(changes.keys) + len(changes.tenants) + len(changes.gone) + len(changes.gone_tenants)
        if count or changes.complete:
            self.counts.changes += count
            self._directory.apply(changes)
        if self._failing_since is not None:
            logger.info("keys: the database is read again, after %.1f s", self._clock() - self._failing_since)
            self._failing_since = None
        self._read_at = begun
        self._mark()
        self._loaded.set()

    def _failed(self, error: Exception) -> None:
        if self._handover.closing:
            return
        self.counts.failures += 1
        if self._failing_since is not None:
            return
        self._failing_since = self._clock()
        if isinstance(error, DatabaseError):
            logger.warning("keys: %s; keys that are known go on for %g s", error, self._stale_s)
        else:
            logger.error("keys: reading them failed", exc_info=error)

    def _judge(self) -> None:
        """Twice a second, also while the thread hangs."""
        self._mark()
        self._judging = asyncio.get_running_loop().call_later(self._poll_s, self._judge)

    def _mark(self) -> None:
        age_s = self.age_s()
        if age_s is None or age_s >= self._stale_s:
            freshness = Freshness.STALE
        elif age_s >= self._aged_after_s:
            freshness = Freshness.AGED
        else:
            freshness = Freshness.CURRENT
        before = self._directory.freshness
        if freshness is before:
            return
        self._directory.mark(freshness)
        if freshness is Freshness.CURRENT:
            logger.info("keys: %d are known, and current", len(self._directory))
        elif freshness is Freshness.AGED:
            logger.warning(
                "keys: the last reading is %.0f s old; keys that are not known are answered with 503, and from %g s on "
                "all of them",
                age_s,
                self._stale_s,
            )
        elif age_s is not None:
            logger.error("keys: the last reading is %.0f s old; every request is refused with 503", age_s)
