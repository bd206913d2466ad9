"""Rates of arrival over days: what they are in the mean, and what a bad day makes of them.

Days look as those of published traces do (Azure's of 2023 and 2024, https://github.com/Azure/AzurePublicDataset; the
figures of SageServe, https://arxiv.org/abs/2502.14617): a night at a tenth of the day, two humps around noon, a steep
morning. On top lies noise that lasts for minutes: services have more of it than a Poisson process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, exp, pi, sqrt
from random import Random

HOUR_S = 3600.0
NOISE = 0.08
"""Standard deviation of the logarithm."""
NOISE_S = 600.0
"""How long it lasts."""


@dataclass(frozen=True, slots=True)
class Course:
    """One scenario."""

    name: str
    text: str
    hours: float
    rate: Callable[[float], float]
    """Requests a second, by seconds from the beginning."""


def courses() -> dict[str, Course]:
    """All of them, by name. None has a rate that any decider is tuned to by more than its scale."""
    return {
        each.name: each
        for each in (
            Course("diurnal", "two working days, 2 to 20 requests/s", 48.0, diurnal),
            Course("monday", "a quiet night, and a Monday morning from 2 to 24 in 20 minutes", 18.0, monday),
            Course("viral", "1 request/s, 50 times as many within 45 minutes, for 48 hours", 60.0, viral),
            Course(
                "viral at once",
                "the same from one second to the next, and the first six hours of it",
                12.0,
                lambda at: viral(at, 1.0),
            ),
            Course("sawtooth", "8 to 16 requests/s and back in one second, every half an hour", 24.0, sawtooth),
            Course("growth", "2 to 16 requests/s in one day", 24.0, growth),
        )
    }


def diurnal(at: float) -> float:
    hour = at / HOUR_S % 24.0
    day = _hump(hour, 10.5, 2.3) + 0.95 * _hump(hour, 15.0, 2.6) + 0.3 * _hump(hour, 20.0, 2.5)
    return 2.0 + 17.5 * min(1.05, day)


def _hump(hour: float, middle: float, width: float) -> float:
    return exp(-((hour - middle) / width) * ((hour - middle) / width))


def monday(at: float) -> float:
    if at < 6.0 * HOUR_S:
        return 2.0
    up = min(1.0, (at - 6.0 * HOUR_S) / 1200.0)
    late = max(0.0, at / HOUR_S - 14.0)
    return 2.0 + 22.0 * up * _hump(late, 0.0, 2.0)


def viral(at: float, ramp_s: float = 2700.0) -> float:
    begins = 6.0 * HOUR_S
    if at < begins:
        return 1.0
    up = min(1.0, (at - begins) / ramp_s)
    ends = begins + 48.0 * HOUR_S
    down = exp(-0.693 * max(0.0, at - ends) / (2.0 * HOUR_S))
    day = 1.0 - 0.3 * (0.5 - 0.5 * cos(2.0 * pi * (at - begins) / (24.0 * HOUR_S)))
    return 1.0 + 49.0 * up * day * down


def sawtooth(at: float) -> float:
    return 8.0 + 8.0 * (at % 1800.0) / 1800.0


def growth(at: float) -> float:
    return 2.0 + 14.0 * at / (24.0 * HOUR_S)


class Noise:
    """A factor around 1 that wanders: the exponential of an Ornstein-Uhlenbeck process, told every ten seconds."""

    def __init__(self, rng: Random, step_s: float = 10.0) -> None:
        self._rng = rng
        self._keep = exp(-step_s / NOISE_S)
        self._value = rng.gauss(0.0, NOISE)

    def next(self) -> float:
        self._value = self._keep * self._value + sqrt(1.0 - self._keep**2) * self._rng.gauss(0.0, NOISE)
        return exp(self._value - 0.5 * NOISE * NOISE)
