"""Which pools are shut, because nobody is there to serve while somebody starts, and how wide those are that have just
been opened.

Requests for a pool that is shut wait in its line, where no place is given. When its first replica is ready they go out
in the line's order, and not all at once: an engine that has just been started is the slowest that it will ever be, and
what it can carry is often not known yet. So at first `FIRST` for each replica may be under way, twice as many after
each `DOUBLES_IN_S`, and after `OPENING_S` the pool's own room is all that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.fleet import Pool
    from gateway.starting.prospects import Prospect, Starts

NOT_THERE = frozenset({"joining", "not_ready", "cooling_down", "draining"})
"""Reasons of replicas that are not there yet, or any more: requests fail at once."""
FIRST = 8
DOUBLES_IN_S = 0.5
OPENING_S = 5.0
BETWEEN_S = 5.0
"""For which a pool stays shut after nothing starts any more: what is ready has to be found, and probed, first."""


class Doors:
    """One worker's. `now` is monotonic seconds."""

    def __init__(self, starts: Starts, exists: Callable[[str], bool] = lambda name: True) -> None:
        """`exists`: whether there is a pool of this name still."""
        self._starts = starts
        self._exists = exists
        self._opened_at: dict[str, float | None] = {}
        """By pool; None: it is shut. The pools that are open have no entry."""
        self._hoped_at: dict[str, float] = {}
        """When a replica was last known to come, of pools that are shut."""

    @property
    def moving(self) -> bool:
        """Some pool has just been opened."""
        return any(at is not None for at in self._opened_at.values())

    @property
    def some_shut(self) -> bool:
        """Some pool was shut when it was looked at last."""
        return any(at is None for at in self._opened_at.values())

    def prospect(self, pool: Pool) -> Prospect | None:
        """What is known of its start; None: nobody starts any."""
        return self._starts.of(pool) if self._exists(pool.name) else None

    def width(self, pool: Pool, now: float) -> int | None:
        """Requests that may be under way: 0 while it is shut; None: as many as it has room for."""
        name = pool.name
        there = False
        for each in pool.replicas:
            reason = each.unavailable_reason(now)
            # One refused connection says little of an engine at work, and to open again would hold back the rest.
            if reason not in NOT_THERE or (reason == "cooling_down" and each.in_flight and name not in self._opened_at):
                there = True
                break
        if not there:
            if self.prospect(pool) is not None:
                self._hoped_at[name] = now
            elif not self._exists(name) or now - self._hoped_at.get(name, -BETWEEN_S) >= BETWEEN_S:
                self._opened_at.pop(name, None)
                self._hoped_at.pop(name, None)
                return None
            self._opened_at[name] = None
            return 0
        if name not in self._opened_at:
            return None
        opened_at = self._opened_at[name]
        if opened_at is None:
            opened_at = self._opened_at[name] = now
        if now - opened_at >= OPENING_S:
            del self._opened_at[name]
            return None
        self._hoped_at.pop(name, None)
        count = sum(each.unavailable_reason(now) not in NOT_THERE for each in pool.replicas)
        return int(FIRST * count * 2.0 ** ((now - opened_at) / DOUBLES_IN_S))
