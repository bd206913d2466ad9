"""Percentiles from counts per bucket.

The one that is asked for is the smallest value that at least so many of all values do not exceed (nearest rank). It is
known which bucket it is in, and within that bucket values are taken to be spread evenly. So what is returned is never
further from the truth than the bucket is wide: with the bounds of `gateway.histogram.fine_bounds` a tenth of the value,
or, below the lowest bound, that bound. Above the highest one, that bound is returned: it is longer than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil


def quantiles(counts: Mapping[int, int], bounds: Sequence[float], shares: Sequence[float]) -> list[float | None]:
    """The values at these shares, 0 to 1 and rising; None of no values. `counts`: by the number of their bucket.

    >>> quantiles({1: 10}, (1.0, 2.0), (0.5, 1.0))
    [1.5, 2.0]
    """
    total = sum(counts.values())
    if not total:
        return [None] * len(shares)
    found: list[float | None] = []
    places = iter(sorted(counts))
    place, before = next(places), 0
    for share in shares:
        rank = max(1, ceil(share * total))
        while before + counts[place] < rank:
            before += counts[place]
            place = next(places)
        if place >= len(bounds):
            found.append(bounds[-1])
            continue
        low = bounds[place - 1] if place else 0.0
        found.append(low + (bounds[place] - low) * (rank - before) / counts[place])
    return found
