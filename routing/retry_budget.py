"""How much a pool is asked again: a share of what it is asked anyway, so that nobody storms one that is sick.

`RetryBudget` is Finagle's (`com.twitter.finagle.service.RetryBudget`, `TokenRetryBudget` over a leaky bucket): each
request pays in a share of a retry, each retry takes out a whole one, both are forgotten after ten seconds, and a
reserve lets a quiet pool retry at all. It is charged when a retry is decided, not when it is sent: in Envoy retries
that wait out their backoff escaped the count (envoyproxy/envoy #30205).

`Losses` is what Finagle does not have. A replica that dies with two hundred requests in flight is one event and no two
hundred retries: they were sent to a pool that was well, and the rest of it still is. So what was dispatched before the
first loss moves without charge; what is sent there after it and lost as well is charged.

And a retry that is answered is paid back, where the server before had only refused (busy, broken, not there): it took
the place of the first send and added no work, and one bad replica in a pool must not use up what the pool has for real
trouble. Not where work may have been lost: a pool that is too slow must not be asked twice for everything.

The bound that they keep together, over any time t in seconds:

    sends <= requests * (1 + share) + per_s * (t + 10) + what was in flight at each event
             + retries answered after a refusal
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import StrEnum
from math import ceil
from random import Random

WINDOW_S = 10.0
"""How long what was paid in and taken out counts (Finagle's default `ttl`)."""
SLICES = 10
_SLICE_S = WINDOW_S / SLICES
_ROUNDING = 1e-9


class Ruling(StrEnum):
    """Whether a request may be sent once more."""

    ALLOWED = "allowed"
    """It may, and the budget has paid for it."""
    MOVED = "moved"
    """It may, without charge: it was under way when its replica began to fail."""
    REFUSED = "refused"
    """It may not: the budget is spent."""


class RetryBudget:
    """A bucket of retries for one pool. `now` is seconds of any one clock that never goes back."""

    __slots__ = ("_ends", "_latest", "_paid", "_requests", "_taken", "per_s", "share")

    def __init__(self, share: float = 0.1, per_s: float = 1.0) -> None:
        """`share`: retries for each request, 0 to 1. `per_s`: retries a second on top, which a pool without traffic
        has as well; ten seconds' worth of them can be used at once."""
        self.share = share
        self.per_s = per_s
        self._requests = 0
        """First dispatches in the slice of time that is running."""
        self._ends = float("-inf")
        """When that slice is over."""
        # One more than make up the window: nothing taken out is forgotten too early.
        self._paid = [0] * (SLICES + 1)
        self._taken = [0] * (SLICES + 1)
        self._latest = 0

    def request(self, now: float) -> None:
        """A request is dispatched for the first time. On the way of every request, so it is short."""
        if now >= self._ends:
            self._turn(now)
        self._requests += 1

    def retry(self, now: float) -> bool:
        """Whether one more may be sent. Where it may, it is charged."""
        if now >= self._ends:
            self._turn(now)
        if self.left(now) < 1.0 - _ROUNDING:
            return False
        self._taken[self._latest] += 1
        return True

    def refund(self, charged_at: float, now: float) -> None:
        """Give back what was charged at that time, as long as it still counts."""
        if now >= self._ends:
            self._turn(now)
        back = max(0, ceil((self._ends - _SLICE_S - charged_at) / _SLICE_S))
        if back <= SLICES:
            slice_ = (self._latest - back) % (SLICES + 1)
            self._taken[slice_] = max(0, self._taken[slice_] - 1)

    def left(self, now: float) -> float:
        """Retries that may be sent now."""
        if now >= self._ends:
            self._turn(now)
        paid = (sum(self._paid) + self._requests) * self.share + self.per_s * WINDOW_S
        return max(0.0, paid - sum(self._taken))

    def _turn(self, now: float) -> None:
        """Begin the slice that `now` is in, and forget those that are older than the window."""
        self._paid[self._latest] += self._requests
        self._requests = 0
        behind = (now - self._ends) / _SLICE_S
        if behind >= SLICES:
            self._paid = [0] * (SLICES + 1)
            self._taken = [0] * (SLICES + 1)
            self._ends = now + _SLICE_S
            return
        for _ in range(int(behind) + 1):
            self._latest = (self._latest + 1) % (SLICES + 1)
            self._paid[self._latest] = self._taken[self._latest] = 0
            self._ends += _SLICE_S


class Losses:
    """Tells the requests that went down with a replica from those that were sent to it afterwards."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: dict[Hashable, tuple[float, int]] = {}
        """By what failed: when its first loss was, and how many more may move without charge."""

    def moves(self, target: Hashable, dispatched_at: float, in_flight: int, now: float) -> bool:
        """A request was lost at `target`; whether it may move without charge.

        The first loss begins an event, and so does the first one more than ten seconds after the last event began.
        `in_flight`: requests that were under way there, this one included; no more than these move with one event.
        """
        event = self._events.get(target)
        if event is None or now - event[0] >= WINDOW_S:
            self._events = {each: event for each, event in self._events.items() if now - event[0] < WINDOW_S}
            event = (now, in_flight)
        began, left = event
        free = dispatched_at <= began and left > 0
        self._events[target] = (began, left - free)
        return free


class Retries:
    """One pool's: its budget, its losses, and how it was decided. Belongs to one event loop."""

    __slots__ = ("attempts", "budget", "counts", "losses", "rng")

    def __init__(self, rng: Random, share: float = 0.1, per_s: float = 1.0, attempts: int = 3) -> None:
        """`attempts`: how often one request is sent at most. `rng`: for the jitter of whoever waits before a retry."""
        self.rng = rng
        self.attempts = attempts
        self.budget = RetryBudget(share, per_s)
        self.losses = Losses()
        self.counts = dict.fromkeys(Ruling, 0)

    def configure(self, share: float, per_s: float, attempts: int) -> None:
        """Go by these from now on; what was paid in and taken out stays."""
        self.attempts = attempts
        self.budget.share = share
        self.budget.per_s = per_s

    def pay_back(self, charged: Sequence[float], now: float) -> None:
        """An attempt that followed mere refusals has been answered; `charged`: when they were."""
        for charged_at in charged:
            self.budget.refund(charged_at, now)

    def rule(self, target: Hashable, dispatched_at: float, in_flight: int, now: float) -> Ruling:
        """Whether a request that was lost at `target` may be sent once more; see `Losses.moves`."""
        if self.losses.moves(target, dispatched_at, in_flight, now):
            ruling = Ruling.MOVED
        else:
            ruling = Ruling.ALLOWED if self.budget.retry(now) else Ruling.REFUSED
        self.counts[ruling] += 1
        return ruling
