"""The online fit by itself."""

from __future__ import annotations

from math import isfinite, nan

from routing.fit import Fit


def test_what_is_no_number_counts_as_the_least_and_does_not_stay() -> None:
    fit = Fit(10.0, 0.5, 0.0)
    fit.learn(60.0, 100.0, 0.0)
    fit.learn(nan, 100.0, 0.0)
    assert isfinite(fit.expected(100.0, 0.0))
    for _ in range(200):
        fit.learn(60.0, 100.0, 0.0)
    assert 55.0 < fit.expected(100.0, 0.0) < 65.0
