"""Hedging: a short prompt whose first token is late is sent to a second replica as well, and the first content wins.

It is for the tail: one replica that hangs, collects garbage or has just taken a prompt of 100,000 tokens, while the
others are free. So a second replica is asked only after the time in which 95 of 100 such prompts have their first token
(the 95th percentile of the last `WINDOW` of about the same length), for few requests, and where there is room:

    delay    p95 of the time to first token of prompts with 2^(k-1) to 2^k - 1 tokens, `min_delay_s` at least
    budget   credit += share for each answered request, at most BURST; a second sending costs 1
    room     nothing above `max_busy` of what the pool takes at once

With share = 0.02: of any 1,000 requests in a row at most 0.02 x 1,000 + 2 = 22 are sent twice, of all that were ever
answered at most 2 %. Pure: no clock, no I/O.

The idea and the percentile are those of Dean and Barroso, "The Tail at Scale" (CACM 56(2), 2013), and of Finagle's
backup requests, whose budget is of this kind too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from routing.types import Replica

WINDOW = 128
"""Times kept for each length of prompts: a few minutes at a request a second, and a p95 within ±4 points."""
MIN_SAMPLES = 20
"""Below these, a 95th percentile is the largest value or says nothing."""
BURST = 2.0
"""Credit that can be saved up. A replica that hangs with 200 requests must not have all of them sent again at once."""
_QUANTILE = 0.95
_STALE = 8
"""New times after which the percentile is worked out anew: sorting costs as much as thirty notes."""


class _Times:
    """The last times to first token of prompts of about one length."""

    __slots__ = ("_delay_s", "_kept", "_new", "_next")

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._next = 0
        self._new = 0
        self._delay_s: float | None = None

    def note(self, ttft_s: float) -> None:
        kept = self._kept
        if len(kept) < WINDOW:
            kept.append(ttft_s)
        else:
            kept[self._next] = ttft_s
            self._next = (self._next + 1) % WINDOW
        self._new += 1

    def high_s(self) -> float | None:
        """The 95th percentile; None before there are enough."""
        kept = self._kept
        if len(kept) < MIN_SAMPLES:
            return None
        if self._delay_s is None or self._new >= _STALE:
            self._delay_s = sorted(kept)[ceil(_QUANTILE * len(kept)) - 1]
            self._new = 0
        return self._delay_s


class Hedges:
    """One model's, in one process: when a request may be sent a second time. Outlasts a reload."""

    __slots__ = ("_credit", "_times", "max_busy", "max_prompt_tokens", "min_delay_s", "share")

    def __init__(
        self, share: float = 0.02, max_prompt_tokens: int = 2048, max_busy: float = 0.7, min_delay_s: float = 0.05
    ) -> None:
        """`share`: of the answered requests, how many may be sent twice, 0 to 1. `max_busy`: of what the pool takes at
        once, 0 to 1. Prompts longer than `max_prompt_tokens` are never sent twice."""
        self._times: dict[int, _Times] = {}
        self._credit = 0.0
        self.configure(share, max_prompt_tokens, max_busy, min_delay_s)

    def configure(self, share: float, max_prompt_tokens: int, max_busy: float, min_delay_s: float) -> None:
        """Go by these from now on; what was learned and earned stays."""
        self.share = share
        self.max_prompt_tokens = max_prompt_tokens
        self.max_busy = max_busy
        self.min_delay_s = min_delay_s

    def note(self, prompt_tokens: int, ttft_s: float) -> None:
        """A request has its first content, `ttft_s` after it was first sent, from whichever replica that came.

        For requests that were sent twice as well. Their times are above the delay, as they would have been, so that
        hedging does not lower the percentile that it goes by.
        """
        self._credit = min(BURST, self._credit + self.share)
        if prompt_tokens > self.max_prompt_tokens:
            return
        size = prompt_tokens.bit_length()
        times = self._times.get(size)
        if times is None:
            times = self._times[size] = _Times()
        times.note(ttft_s)

    def delay_s(self, prompt_tokens: int) -> float | None:
        """How long to wait for the first content before a second replica is asked; None: as long as it takes."""
        if prompt_tokens > self.max_prompt_tokens:
            return None
        times = self._times.get(prompt_tokens.bit_length())
        high_s = None if times is None else times.high_s()
        return None if high_s is None else max(self.min_delay_s, high_s)

    def may(self, busy: float) -> bool:
        """Whether a request that is late may be sent once more now; charged when it is True. `busy`: see
        `busy_share`."""
        if busy > self.max_busy or self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True


def busy_share(replicas: Sequence[Replica], now: float) -> float:
    """Part of what the pool's own replicas take at once that is taken, all gateways and other clients together: 0 to 1
    and above. `now`: monotonic seconds.

    A replica of unknown capacity is left out. 1 where none is known: what cannot be told is not taken for room.
    """
    taken, places = 0, 0
    for each in replicas:
        requests = each.meter.capacity.requests
        if requests is None or each.hosted or not (each.available(now) or each.unavailable_reason(now) == "full"):
            continue
        load, work = each.load, each.work
        said = 0 if load is None else (load.running or 0) + (load.waiting or 0)
        taken += max(each.in_flight, work.running + work.queued, said)
        places += requests
    return taken / places if places else 1.0


def rivals(replicas: Sequence[Replica], first: Replica) -> list[Replica]:
    """Who may be asked beside the first: nobody who is paid for each answer."""
    return [each for each in replicas if each is not first and not each.hosted]
