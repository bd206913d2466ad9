"""When a worker sheds, and when it stops to: readings in, a level out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.overload.levels import CALM_S, MARGIN, Cause, Levels, Reading, Thresholds

EVERY_S = 0.25
RULES = Thresholds()


class Clock:
    """Feeds samples a quarter of a second apart."""

    def __init__(self) -> None:
        self.levels = Levels()
        self.now = 0.0

    def see(self, reading: Reading, for_s: float = EVERY_S) -> int:
        for _ in range(max(1, round(for_s / EVERY_S))):
            self.now += EVERY_S
            self.levels.after(reading, RULES, self.now)
        return self.levels.level


@pytest.mark.parametrize(
    ("share", "level"),
    [(0.0, 0), (0.7999, 0), (0.8, 1), (0.8999, 1), (0.9, 2), (0.9499, 2), (0.95, 3), (1.0, 3), (7.0, 3)],
)
@pytest.mark.parametrize(
    ("resource", "cause"),
    [("memory", Cause.MEMORY), ("descriptors", Cause.DESCRIPTORS), ("held_bytes", Cause.BYTES)],
)
def test_a_level_is_entered_with_the_first_sample_and_names_its_cause(
    share: float, level: int, resource: str, cause: Cause
) -> None:
    clock = Clock()
    assert clock.see(replace(Reading(), **{resource: share})) == level
    if level:
        assert clock.levels.cause is cause


def test_the_levels_fire_in_order_and_end_in_order() -> None:
    clock = Clock()
    seen = [clock.see(Reading(memory=share / 100)) for share in range(70, 100)]
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}
    down = [clock.see(Reading(memory=share / 100), CALM_S + EVERY_S) for share in range(99, 69, -1)]
    assert down == sorted(down, reverse=True)
    assert set(down) == {0, 1, 2, 3}


def test_a_pressure_that_swings_around_a_threshold_changes_the_level_once() -> None:
    clock = Clock()
    seen = [clock.see(Reading(memory=0.9 + (0.01 if turn % 2 else -0.02))) for turn in range(200)]
    assert seen[0] == 1
    assert set(seen[1:]) == {2}


def test_a_level_is_left_one_step_at_a_time_after_so_long_below_it() -> None:
    clock = Clock()
    assert clock.see(Reading(memory=0.97)) == 3
    assert clock.see(Reading(), CALM_S) == 3
    assert clock.see(Reading()) == 2
    assert clock.see(Reading(), CALM_S) == 1
    assert clock.see(Reading(), CALM_S) == 0


def test_rising_again_on_the_way_down_starts_the_wait_anew() -> None:
    clock = Clock()
    clock.see(Reading(memory=0.91))
    clock.see(Reading(memory=0.5), CALM_S)
    clock.see(Reading(memory=0.89))
    assert clock.see(Reading(memory=0.5), CALM_S) == 2
    assert clock.see(Reading(memory=0.5)) == 1


def test_what_asks_for_the_highest_level_is_the_cause() -> None:
    clock = Clock()
    clock.see(Reading(memory=0.85, descriptors=0.96))
    assert (clock.levels.level, clock.levels.cause) == (3, Cause.DESCRIPTORS)
    clock.see(Reading(memory=0.85), 2 * CALM_S + 1)
    assert (clock.levels.level, clock.levels.cause) == (1, Cause.MEMORY)


# The event loop.


def test_a_loop_that_is_late_for_two_seconds_sheds_batch() -> None:
    clock = Clock()
    assert clock.see(Reading(lag_s=0.3), 2.0) == 0
    assert clock.see(Reading(lag_s=0.3)) == 2
    assert clock.levels.cause is Cause.LOOP
    assert clock.see(Reading(lag_s=9.0), 10.0) == 2


def test_a_process_that_slept_is_not_overloaded() -> None:
    clock = Clock()
    clock.now += 3600
    assert clock.see(Reading(lag_s=3600.0)) == 0
    assert clock.see(Reading(lag_s=0.001), 10.0) == 0


def test_single_late_samples_are_nothing() -> None:
    clock = Clock()
    for _ in range(50):
        assert clock.see(Reading(lag_s=0.9)) == 0
        assert clock.see(Reading(lag_s=0.01)) == 0


def test_a_loop_has_to_be_well_in_time_before_the_shedding_ends() -> None:
    clock = Clock()
    clock.see(Reading(lag_s=0.3), 3.0)
    assert clock.see(Reading(lag_s=0.2), 10.0) == 2
    assert clock.see(Reading(lag_s=0.01), CALM_S) == 2
    assert clock.see(Reading(lag_s=0.01)) == 0


# Whatever comes.

SHARES = st.floats(0, 1.2, allow_nan=False)


@given(st.lists(st.builds(Reading, SHARES, SHARES, SHARES, st.floats(0, 1)), max_size=80))
def test_it_is_never_below_what_a_sample_asks_for_and_falls_by_no_more_than_time_allows(samples: list[Reading]) -> None:
    clock = Clock()
    fell_at = float("-inf")
    for sample in samples:
        before = clock.levels.level
        level = clock.see(sample)
        worst = max(sample.memory, sample.descriptors, sample.held_bytes)
        assert level >= sum(worst >= each for each in RULES.shares)
        if level < before and sample.lag_s == 0:
            assert before - level == 1 or clock.now - fell_at >= CALM_S
        if level < before:
            fell_at = clock.now
    clock.see(Reading(), 4 * CALM_S + 1)
    assert clock.levels.level == 0


@given(SHARES, st.floats(0, MARGIN * 0.99))
def test_noise_within_the_margin_never_makes_it_flap(around: float, noise: float) -> None:
    clock = Clock()
    changes, before = 0, 0
    for turn in range(100):
        level = clock.see(Reading(memory=around + (noise if turn % 2 else 0)))
        changes += level != before
        before = level
    assert changes <= 2
