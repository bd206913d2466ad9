"""How long replicas take to answer, from the records of the requests that they answered.

Read when somebody asks, from the records that the ledger keeps anyway: nothing is done for a request. What is kept are
sums of logarithms, so that one odd answer does not make a replica look slow: their mean is that of the usual answer.
"""

from __future__ import annotations

from collections.abc import Collection
from math import log

from gateway.ledger import Ledger
from gateway.record import OUTRUN, Attempt, Exchange

_SHORTEST_S = 1e-4


class Pace:
    """One worker's. A gateway that settles more than a thousand requests between two looks counts the last thousand."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: Exchange | None = None
        self.of: dict[tuple[str, str], list[float]] = {}
        """By pool and replica, since the start: streams and the sum of ln(seconds to their first content), answers that
        came whole and the sum of ln(seconds to their end); both from when they were sent."""

    def catch_up(self, known: Collection[tuple[str, str]]) -> None:
        """Take in what was settled since the last time; of replicas that are not `known`, nothing stays."""
        recent, last = self._ledger.recent, self._last
        for exchange in reversed(recent):
            if exchange is last:
                break
            for tried in exchange.tries:
                self._take(tried, exchange.stream)
        if recent:
            self._last = recent[-1]
        if len(self.of) > 2 * len(known):
            self.of = {at: sums for at, sums in self.of.items() if at in known}

    def _take(self, tried: Attempt, stream: bool) -> None:
        """One attempt. The slower of a hedged pair has taken at least as long as it was waited for: were it left out,
        a slow replica would be the one that nobody sees."""
        if tried.code == OUTRUN or not (stream or tried.code):
            ended_at = tried.ended_at
        else:
            ended_at = tried.first_content_at if stream else None
        if tried.sent_at is None or ended_at is None:
            return
        place = 0 if stream else 2
        at = (tried.pool, tried.replica)
        sums = self.of.get(at)
        if sums is None:
            sums = self.of[at] = [0, 0.0, 0, 0.0]
        sums[place] += 1
        sums[place + 1] += log(max(ended_at - tried.sent_at, _SHORTEST_S))
