"""Percentiles read from counts per bucket: how far from the truth they may be."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from gateway.histogram import FINE_RATIO, FineHistogram, Histogram, fine_bounds
from gateway.metrics import DURATION_BUCKETS_S, DURATION_FINE_S, TTFT_BUCKETS_S, TTFT_FINE_S
from gateway.rollups.quantiles import quantiles

TIMES = st.lists(st.floats(0.0, 70.0), min_size=1, max_size=300)


def counted(values: list[float]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for value in values:
        place = bisect_left(TTFT_FINE_S, value)
        counts[place] = counts.get(place, 0) + 1
    return counts


@given(TIMES, st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
def test_a_percentile_is_within_a_tenth_of_the_true_one(values: list[float], shares: list[float]) -> None:
    values.sort()
    shares.sort()
    for share, found in zip(shares, quantiles(counted(values), TTFT_FINE_S, shares), strict=True):
        true = values[max(1, ceil(share * len(values))) - 1]
        assert found is not None
        if true > TTFT_FINE_S[-1]:
            assert found == TTFT_FINE_S[-1]
        elif true <= TTFT_FINE_S[0]:
            assert 0.0 <= found <= TTFT_FINE_S[0]
        else:
            assert true / FINE_RATIO - 1e-9 <= found <= true * FINE_RATIO + 1e-9


def test_percentiles_of_nothing_are_not_known() -> None:
    assert quantiles({}, TTFT_FINE_S, (0.5, 0.99)) == [None, None]


def test_percentiles_never_fall_with_their_share() -> None:
    found = quantiles({3: 5, 40: 1, 90: 2, 200: 1}, TTFT_FINE_S, (0.1, 0.5, 0.6, 0.7, 0.9, 1.0))
    assert found == sorted(each for each in found if each is not None)
    assert found[-1] == 60.0


def test_fine_bounds_have_all_that_is_shown_and_no_wider_step() -> None:
    for shown, fine in ((TTFT_BUCKETS_S, TTFT_FINE_S), (DURATION_BUCKETS_S, DURATION_FINE_S)):
        assert set(shown) <= set(fine)
        assert fine == fine_bounds(shown)
        assert all(1.0 < high / low <= FINE_RATIO + 1e-9 for low, high in pairwise(fine))


@given(TIMES)
def test_what_prometheus_gets_is_the_same_as_from_coarse_buckets(values: list[float]) -> None:
    coarse, fine = Histogram(TTFT_BUCKETS_S), FineHistogram(TTFT_BUCKETS_S, TTFT_FINE_S)
    for value in [*values, *TTFT_BUCKETS_S]:
        coarse.observe(value)
        fine.observe(value)
    assert fine.buckets() == coarse.buckets()
    assert fine.total == coarse.total
