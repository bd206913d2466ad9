"""What the limits allow, judged from what was admitted, without any knowledge of how the limiter works.

A rate lets through at most `burst + rate * T` in every interval of length T. That is the same as: a bucket of `burst`
that leaks at `rate` never overflows, which one pass over the admissions in order of time decides for all intervals
(there are n²/2 of them). With a burst of 10, a rate of 1 per second and admissions of 6 at second 0 and second 1, the
bucket holds 6, leaks 1, and 11 would be in it: over by 1. Whole numbers throughout, so that "exactly" means it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

US_PER_MINUTE = 60_000_000


def allowed(burst: int, per_minute: int, interval_us: int) -> int:
    """The most that may be admitted in an interval of this length, both ends included. Rounded down."""
    return burst + per_minute * interval_us // US_PER_MINUTE


def overshoot(events: Iterable[tuple[int, int]], burst: int, per_minute: int) -> int:
    """By how much the worst of all intervals was over its bound; negative: what the tightest one had to spare.

    events: (time in µs, cost). In whole units of cost, rounded up. No events: -burst.
    """
    # The bucket in units of cost * µs per minute, so that leaking is whole too.
    level = 0
    worst = -burst * US_PER_MINUTE
    last_us: int | None = None
    for now_us, cost in sorted(events):
        if last_us is not None:
            level = max(0, level - (now_us - last_us) * per_minute)
        last_us = now_us
        level += cost * US_PER_MINUTE
        worst = max(worst, level - burst * US_PER_MINUTE)
    return -(-worst // US_PER_MINUTE)


def most_at_once(spans: Sequence[tuple[int, int]]) -> int:
    """The largest number of spans (from, to) that share an instant; a span that ends where another begins does not."""
    edges = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, step in edges:
        running += step
        most = max(most, running)
    return most


def percentile(values: Sequence[float], percent: float) -> float:
    """The value at or below which so many percent lie; 0 for none at all."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
