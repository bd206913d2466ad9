"""Counts per bucket, for the path of a request: an observation is a binary search and two additions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import ceil, log

FINE_RATIO = 1.1
"""Between two bounds of a fine histogram, at most: a percentile read from it is within a tenth of the true one."""


class Histogram:
    """Counts per bucket and a sum; the exposition makes them cumulative."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the text format wants them."""
        cumulative = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self.counts, strict=True):
            cumulative += count
            found.append((bound, cumulative))
        return found


class FineHistogram(Histogram):
    """Counts in finer buckets than it shows: few go to Prometheus, the dashboard's percentiles need more."""

    __slots__ = ("_shown",)

    def __init__(self, shown: Sequence[float], fine: Sequence[float]) -> None:
        """`fine` has all bounds of `shown` (`fine_bounds`)."""
        super().__init__(fine)
        self._shown = shown

    def buckets(self) -> list[tuple[str, float]]:
        cumulative, begin = 0, 0
        found: list[tuple[str, float]] = []
        for bound in self._shown:
            end = bisect_left(self._bounds, bound) + 1
            cumulative += sum(self.counts[begin:end])
            found.append((str(bound), cumulative))
            begin = end
        found.append(("+Inf", cumulative + sum(self.counts[begin:])))
        return found


def fine_bounds(shown: Sequence[float]) -> tuple[float, ...]:
    """The same bounds and more between them, none more than `FINE_RATIO` times the one before.

    >>> [round(each, 3) for each in fine_bounds((1.0, 1.25))]
    [1.0, 1.077, 1.16, 1.25]
    """
    found = [shown[0]]
    for low, high in pairwise(shown):
        steps = ceil(log(high / low) / log(FINE_RATIO))
        found += [low * (high / low) ** (step / steps) for step in range(1, steps)]
        found.append(high)
    return tuple(found)
