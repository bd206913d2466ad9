"""When to stop asking a store that does not answer: counts of calls, no clock and no connection.

Opens after `IN_A_ROW` failed calls in a row, or when more than half of at least `AT_LEAST` calls failed within
`WINDOW_S`. It closes when a probe has succeeded (`close`), and by nothing else: what was on its way when it opened
says nothing about now.
"""

from __future__ import annotations

from collections import deque

IN_A_ROW = 5
AT_LEAST = 20
WINDOW_S = 2.0
BUCKET_S = 0.1


class Breaker:
    """`now` is in seconds and never goes back."""

    def __init__(self) -> None:
        self.open = False
        self._in_a_row = 0
        self._buckets: deque[list[float]] = deque()
        """Of `BUCKET_S` each: [begin, calls, failed calls]."""

    def succeeded(self, calls: int, now: float) -> None:
        self._in_a_row = 0
        if not self.open:
            self._bucket(now)[1] += calls

    def failed(self, calls: int, now: float) -> bool:
        """Whether this has opened it."""
        if self.open:
            return False
        self._in_a_row += calls
        bucket = self._bucket(now)
        bucket[1] += calls
        bucket[2] += calls
        while self._buckets[0][0] <= now - WINDOW_S:
            self._buckets.popleft()
        total = sum(bucket[1] for bucket in self._buckets)
        failed = sum(bucket[2] for bucket in self._buckets)
        self.open = self._in_a_row >= IN_A_ROW or (total >= AT_LEAST and failed * 2 > total)
        return self.open

    def close(self) -> None:
        """A probe has succeeded: count from nothing."""
        self.open = False
        self._in_a_row = 0
        self._buckets.clear()

    def _bucket(self, now: float) -> list[float]:
        buckets = self._buckets
        if not buckets or now - buckets[-1][0] >= BUCKET_S:
            buckets.append([now, 0, 0])
            if len(buckets) > WINDOW_S / BUCKET_S + 1:
                buckets.popleft()
        return buckets[-1]
