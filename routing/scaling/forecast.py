"""How much will be asked for when a replica that is ordered now is ready.

Two windows say what is asked for *now*. The long one (five minutes) is steady. The short one (30 seconds) counts as
soon as it is above the long one by more than chance explains, so that a step is seen within seconds: the idea is
Knative's panic window, https://knative.dev/docs/serving/autoscaling/kpa-specific, with a limit of three standard
deviations in place of a fixed factor, since at one request a second half as many again are chance, and at 50 they
are not.

    noise = 3 sqrt(2 * rate / window)        rate 1/s, window 30 s: 0.8      50/s: 5.5

(arrivals of a Poisson process vary by sqrt(rate / window); those of real services by more, hence the 2).

Holt's linear trend, damped, says what will be added until then (C. Holt 1957, reprinted
https://doi.org/10.1016/j.ijforecast.2003.09.015; damping: Gardner and McKenzie 1985,
https://doi.org/10.1287/mnsc.31.10.1237), over minutes:

    level = a x + (1 - a)(level + d trend)        trend = b (level - before) + (1 - b) d trend
    growth after n minutes = trend (d + d^2 + ... + d^n)

After a step, such a trend foresees that it goes on, and twice too many replicas would be ordered. So no more is
foreseen than the median of the last minutes' increases would add: that of a step is none, that of a ramp is its slope.
Growth within the noise is none. What is foreseen is never below what is asked for now: what was ordered for nothing
costs minutes of a replica, what was not ordered costs users.
"""

from __future__ import annotations

from collections import deque
from math import exp, sqrt
from statistics import median

from routing.scaling.learned import MOST_SAMPLES, Aged, LearnedCourse, age_at

SHORT_S = 30.0
LONG_S = 300.0
BIN_S = 60.0
CHANCE = 3.0
"""Standard deviations that are taken for chance."""
BURSTY = 2.0
"""Variance of arrivals beside a Poisson process'."""
LEVEL, TREND, DAMPING = 0.5, 0.3, 0.97
INCREASES = 5
"""Whose median bounds the trend."""


class Series:
    """One rate over time, in units per second, told every few seconds."""

    __slots__ = ("_bin", "_bin_at", "_bin_s", "_increases", "_last", "_level", "_rate_before", "_samples", "_trend")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, float]] = deque()
        """When, for how many seconds, rate."""
        self._last: float | None = None
        self._bin = self._bin_s = 0.0
        self._bin_at: float | None = None
        self._level: float | None = None
        self._rate_before = 0.0
        self._trend = 0.0
        self._increases: deque[float] = deque(maxlen=INCREASES)

    def observe(self, rate: float, at: float) -> None:
        """The rate since it was told last. What comes out of order is passed over."""
        if self._last is not None and at <= self._last:
            return
        span = min(at - self._last, SHORT_S) if self._last is not None else 5.0
        self._last = at
        self._samples.append((at, span, rate))
        while self._samples and self._samples[0][0] <= at - LONG_S:
            self._samples.popleft()
        if self._bin_at is None:
            self._bin_at = at
        self._bin += rate * span
        self._bin_s += span
        if at - self._bin_at >= BIN_S - 1e-6:
            self._close(self._bin / self._bin_s)
            self._bin_at, self._bin, self._bin_s = at, 0.0, 0.0

    def now(self) -> float:
        """What is asked for now."""
        short, long = self._mean(SHORT_S), self._mean(LONG_S)
        return short if short > long + self._noise(long, SHORT_S) else long

    @property
    def steady(self) -> bool:
        """Whether the last seconds are like the last minutes, but for chance."""
        long = self._mean(LONG_S)
        return abs(self._mean(SHORT_S) - long) <= self._noise(long, SHORT_S)

    def growth(self, ahead_s: float) -> float:
        """What `ahead_s` seconds will add to it; never below 0."""
        if len(self._increases) < 3 or self._trend <= 0.0:
            return 0.0
        steps = ahead_s / BIN_S
        damped = self._trend * DAMPING * (1.0 - DAMPING**steps) / (1.0 - DAMPING)
        found = min(damped, median(self._increases) * steps)
        now = self.now()
        # A trend over five minutes is known to about a bin's noise a bin, divided by the bins it is seen over.
        chance = self._noise(now, BIN_S) * steps / INCREASES
        return found if found > chance else 0.0

    def learned(self, now: float) -> LearnedCourse:
        """What it knows, as of `now`; samples beyond the last `MOST_SAMPLES` are left out."""
        kept = list(self._samples)[-MOST_SAMPLES:]
        return LearnedCourse(
            samples=tuple((age_at(now, at), span, rate) for at, span, rate in kept),
            minute=None if self._bin_at is None else (age_at(now, self._bin_at), self._bin, self._bin_s),
            level=self._level,
            before=self._rate_before,
            trend=self._trend,
            increases=tuple(self._increases),
        )

    def restore(self, learned: LearnedCourse, then: float) -> None:
        """Go on from there. `then`: when it was, on this clock."""
        self._samples = deque((then - age_s, span, rate) for age_s, span, rate in learned.samples)
        self._last = self._samples[-1][0] if self._samples else None
        if learned.minute is not None:
            self._bin_at, self._bin, self._bin_s = then - learned.minute[0], learned.minute[1], learned.minute[2]
        self._level, self._rate_before, self._trend = learned.level, learned.before, learned.trend
        self._increases = deque(learned.increases, maxlen=INCREASES)

    def _mean(self, window_s: float) -> float:
        if self._last is None:
            return 0.0
        since = self._last - window_s
        total = seconds = 0.0
        for at, span, rate in reversed(self._samples):
            if at <= since + 1e-6:
                break
            total += rate * span
            seconds += span
        return total / seconds if seconds else 0.0

    @staticmethod
    def _noise(rate: float, window_s: float) -> float:
        return CHANCE * sqrt(BURSTY * rate / window_s)

    def _close(self, rate: float) -> None:
        if self._level is None:
            self._level = self._rate_before = rate
            return
        before, foreseen = self._level, self._level + DAMPING * self._trend
        self._level = LEVEL * rate + (1.0 - LEVEL) * foreseen
        self._trend = TREND * (self._level - before) + (1.0 - TREND) * DAMPING * self._trend
        self._increases.append(rate - self._rate_before)
        self._rate_before = rate


class Smooth:
    """An average over about `over_s` seconds, of which later ones count more."""

    __slots__ = ("_at", "over_s", "value")

    def __init__(self, over_s: float) -> None:
        self.over_s = over_s
        self.value: float | None = None
        self._at = 0.0

    def observe(self, value: float, at: float) -> float:
        if self.value is None:
            self.value = value
        else:
            keep = exp(-max(0.0, at - self._at) / self.over_s)
            self.value = keep * self.value + (1.0 - keep) * value
        self._at = at
        return self.value

    def learned(self, now: float) -> Aged | None:
        """Its value and age; None: it has none."""
        return None if self.value is None else (self.value, age_at(now, self._at))

    def restore(self, learned: Aged | None, then: float) -> None:
        """Go on from there."""
        if learned is not None:
            self.value, self._at = learned[0], then - learned[1]
