"""How long replicas take to answer, from the records of the requests that they answered.

Read when somebody asks, from the records that the ledger keeps anyway: nothing is done for a request. What is kept are
sums of logarithms, so that one odd answer does not make a replica look slow: their mean is that of the usual answer.
"""

from __future__ import annotations

from collections.abc import Collection
from math import log

from gateway.ledger import Ledger
from gateway.record import Exchange, Outcome

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
            sent_at = exchange.dispatched_at
            if sent_at is None or not exchange.replica:
                continue
            if exchange.stream:
                ended_at, place = exchange.first_content_at, 0
            else:
                ended_at, place = exchange.finished_at if exchange.outcome is Outcome.COMPLETED else None, 2
            if ended_at is None:
                continue
            at = (exchange.pool, exchange.replica)
            sums = self.of.get(at)
            if sums is None:
                sums = self.of[at] = [0, 0.0, 0, 0.0]
            passed_s = ended_at - sent_at
            sums[place] += 1
            sums[place + 1] += log(passed_s if passed_s > _SHORTEST_S else _SHORTEST_S)
        if recent:
            self._last = recent[-1]
        if len(self.of) > 2 * len(known):
            self.of = {at: sums for at, sums in self.of.items() if at in known}
