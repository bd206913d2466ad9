"""The judge of the limiter must itself be right: against the definition, interval by interval."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtests.hammer_bounds import US_PER_MINUTE, allowed, most_at_once, overshoot, percentile

EVENTS = st.lists(st.tuples(st.integers(0, 20_000_000), st.integers(1, 12)), min_size=1, max_size=12)


@given(EVENTS, st.integers(1, 30), st.integers(1, 600))
def test_one_pass_finds_what_looking_at_every_interval_finds(
    events: list[tuple[int, int]], burst: int, per_minute: int
) -> None:
    events = sorted(events)
    worst = max(
        sum(cost for _, cost in events[first : last + 1]) * US_PER_MINUTE
        - burst * US_PER_MINUTE
        - per_minute * (events[last][0] - events[first][0])
        for first in range(len(events))
        for last in range(first, len(events))
    )
    assert overshoot(events, burst, per_minute) == -(-worst // US_PER_MINUTE)


def test_a_single_one_too_many_is_seen() -> None:
    full = [(0, 1)] * 10
    assert overshoot(full, 10, 60) == 0
    assert overshoot([*full, (999_999, 1)], 10, 60) == 1
    assert overshoot([*full, (1_000_000, 1)], 10, 60) == 0


def test_a_pause_earns_no_more_than_the_burst() -> None:
    assert overshoot([(0, 10), (3_600_000_000, 10), (3_600_000_000, 1)], 10, 60) == 1


def test_the_bound_of_an_interval_is_rounded_down() -> None:
    assert allowed(1000, 60, 4_600_000) == 1004
    assert overshoot([], 7, 60) == -7


def test_overlap_counts_instants_that_are_really_shared() -> None:
    assert most_at_once([(0, 10), (10, 20), (5, 15)]) == 2
    assert most_at_once([]) == 0


def test_percentiles() -> None:
    assert percentile(list(range(100)), 99) == 99
    assert percentile([], 50) == 0
    assert percentile([3.0], 99.9) == 3
