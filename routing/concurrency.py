"""How many requests at once a server takes that says nothing of itself: learned from its refusals. Pure: no clock.

For hosted APIs and other servers that neither state a capacity nor report their load. The rule is TCP's: halve when
the other side says that it is too much, grow slowly while it does not, and only while the limit is in use (Chiu and
Jain, "Analysis of the increase and decrease algorithms", 1989; RFC 5681). It needs no word between the senders: each of
several gateways that share one account halves when it is refused, and their limits approach equal parts.

Nothing is limited before the first refusal. The way back is BIC's (Xu, Harfoush and Rhee, "Binary increase congestion
control", 2004): each calm `CALM_S` closes half of the distance to where it was refused last, one request at least;
beyond that it tries one more, then two, then four. The plain rule, one more each time, would need 500 s to return from
50 to 100, and for all that time half of what is paid for would stand idle.

How long answers take is not looked at, since that is the length of the output. Times to first token are, as in
Netflix's gradient2 (`concurrency-limits`): while they are twice what they usually are for prompts of their size, the
limit does not grow.

Worked example, of a server that takes 10: 11 are sent, one is refused, the other 10 go on. Limit 5; 10 s later 8, then
9, 10 and 11, where one is refused again: 50 s, in which 8.6 were allowed on average.
"""

from __future__ import annotations

FLOOR = 2
"""Lowest limit. With one, nothing could be told from what runs beside each other."""
EVENT_S = 1.0
"""Refusals within this time are one event: they are of requests that were sent before the limit fell."""
CALM_S = 10.0
"""Without a refusal for so long, the limit may grow."""
NEARLY = 0.9
"""Part of the limit that has to have been in use for it to grow; else it would say nothing."""
SLOW = 2.0
"""Times the usual time to first token from which it does not grow."""
_RECENT, _USUAL = 1 / 8, 1 / 128
"""Weights of one first token in what is recent and what is usual."""


class Learned:
    """The limit of one server, as refusals and answers show it. Times are seconds of any one monotonic clock.

    `in_flight` is what runs there, of all gateways as far as is known, beside the request that is told of.
    """

    __slots__ = (
        *("_before", "_calm_since", "_event_at", "_knee", "_most", "_recent", "_refused_at", "_step", "_usual"),
        "limit",
    )

    def __init__(self, in_flight: int, now: float) -> None:
        """The first refusal, beside so many that were not refused."""
        self.limit = max(float(FLOOR), in_flight / 2)
        """Requests at once, `FLOOR` or more."""
        self._knee = max(float(in_flight), self.limit)
        """Where it was refused last."""
        self._before = (self._knee, self._knee)
        """Limit and knee when the refusals began that have had no calm in between."""
        self._event_at = self._refused_at = now
        self._calm_since = now
        self._most = 0
        """The most that was in flight since the limit changed."""
        self._step = 1.0
        self._recent = self._usual = 0.0

    @property
    def requests(self) -> int:
        return int(self.limit + 0.5)

    def slow(self) -> bool:
        """First tokens take much longer than they usually do."""
        return self._recent > SLOW * self._usual

    def refused(self, in_flight: int, now: float) -> None:
        """It is too busy, by its own words or because no first token came in time."""
        if now - self._refused_at >= CALM_S:
            self._before = (self.limit, self._knee)
        self._refused_at = self._calm_since = now
        self._most = 0
        self._step = 1.0
        if now - self._event_at < EVENT_S:
            # The last of a burst to be refused shows what it takes, the first only what was sent.
            self._knee = max(self.limit, min(self._knee, float(in_flight)))
            return
        self._event_at = now
        before = self.limit
        self.limit = max(float(FLOOR), before / 2)
        self._knee = max(self.limit, min(before, float(in_flight)))

    def refused_by_rate(self, now: float) -> None:
        """It refuses beside next to nothing, so not for what runs there: the limit is again what it was before.

        A quota for each minute refuses everything until the next one. Without this the limit would halve each second
        of that, down to `FLOOR`, and half of the next minute's quota would be left over.
        """
        if now - self._event_at < EVENT_S:
            self.refused(0, now)  # of a burst that a server for one or two has refused
            return
        self._refused_at = self._calm_since = now
        self._most = 0
        self.limit, self._knee = self._before

    def answered(self, in_flight: int, now: float) -> bool:
        """It has answered one; True when the limit has grown for it."""
        if in_flight > self._most:
            self._most = in_flight
        if now - self._calm_since < CALM_S:
            return False
        used = self._most + 1 >= NEARLY * self.requests
        self._calm_since = now
        self._most = 0
        if not used or self.slow():
            return False
        if self.limit < self._knee:
            self.limit = max(self.limit + 1.0, (self.limit + self._knee) / 2)
        else:
            self.limit += self._step
            self._step *= 2.0
        return True

    def first_token(self, observed_ms: float, expected_ms: float) -> None:
        """A first token came; `expected_ms` is what the prompt would take there with nothing else to do, above 0.

        Only the change of their ratio counts, so that a wrong expectation harms nothing.
        """
        ratio = observed_ms / expected_ms
        if not self._usual:
            self._recent = self._usual = ratio
        self._recent += (ratio - self._recent) * _RECENT
        self._usual += (ratio - self._usual) * _USUAL
