"""When requests leave for rented replicas: hysteresis, and money that is never overdrawn."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.spill import (
    DAY_CEILING,
    DWELL_S,
    HOUR_CEILING,
    IDLE_S,
    NOT_WORTH_IT,
    ON_TARGET,
    OWN_UNAVAILABLE,
    PREDICTED_WAIT,
    Ceilings,
    Spill,
    micros_of,
)

NOON = 1_795_348_800.0 - 1_795_348_800.0 % 86_400 + 43_200.0
"""A noon in UTC."""


def plenty() -> Spill:
    return Spill(1e6, 1e6)


def ask(
    spill: Spill, own_ms: float | None, now: float = NOON, *, hosted_ms: float | None = None, lane: str = ""
) -> str:
    return spill.decide(own_ms, hosted_ms, 2000.0, 0.01, now, lane).reason


def test_the_worked_example_of_the_module() -> None:
    spill = plenty()
    asked = [
        ask(spill, own_ms, NOON + 2.0 * index) for index, own_ms in enumerate((2500.0, 2100.0, 1700.0, 1500.0, 2100.0))
    ]
    assert asked == [PREDICTED_WAIT, PREDICTED_WAIT, PREDICTED_WAIT, ON_TARGET, ON_TARGET]


def test_between_the_thresholds_nothing_changes() -> None:
    spill = plenty()
    assert {ask(spill, own_ms) for own_ms in (1601.0, 2399.0)} == {ON_TARGET}
    ask(spill, 2401.0)
    assert {ask(spill, own_ms, NOON + 5.0) for own_ms in (1601.0, 2399.0)} == {PREDICTED_WAIT}


def test_a_request_that_is_fast_stays_even_in_a_rush_and_does_not_end_it_at_once() -> None:
    spill = plenty()
    ask(spill, 9000.0)
    assert ask(spill, 100.0, NOON + 0.1) == ON_TARGET
    assert ask(spill, 2000.0, NOON + 0.2) == PREDICTED_WAIT
    assert ask(spill, 100.0, NOON + DWELL_S + 0.1) == ON_TARGET
    assert ask(spill, 2000.0, NOON + DWELL_S + 0.2) == ON_TARGET


def test_a_rush_is_forgotten_when_nobody_has_come_for_long() -> None:
    spill = plenty()
    ask(spill, 9000.0)
    assert ask(spill, 2000.0, NOON + IDLE_S + 1.0) == ON_TARGET


def test_each_lane_is_judged_by_itself() -> None:
    spill = plenty()
    ask(spill, 9000.0, lane="critical")
    assert spill.leaving("critical")
    assert ask(spill, 2000.0, lane="standard") == ON_TARGET
    assert ask(spill, 2000.0, lane="critical") == PREDICTED_WAIT


def test_nobody_leaves_for_something_slower_or_for_the_unknown() -> None:
    assert ask(plenty(), 9000.0, hosted_ms=9000.0) == NOT_WORTH_IT
    assert ask(plenty(), 9000.0, hosted_ms=8999.0) == PREDICTED_WAIT
    assert ask(plenty(), None) == ON_TARGET
    assert ask(plenty(), inf) == OWN_UNAVAILABLE
    assert ask(plenty(), inf, hosted_ms=inf) == NOT_WORTH_IT


@given(st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(1601.0, 2399.0)), max_size=60), st.booleans())
def test_noise_between_the_thresholds_never_flips_anything(noise: list[tuple[float, float]], rush: bool) -> None:
    spill, now = plenty(), NOON
    if rush:
        ask(spill, 5000.0, now)
    expected = PREDICTED_WAIT if rush else ON_TARGET
    for step_s, own_ms in noise:
        now += step_s
        assert ask(spill, own_ms, now) == expected


@given(st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 6000.0)), max_size=200))
def test_it_flips_at_most_twice_a_second_whatever_is_predicted(steps: list[tuple[float, float]]) -> None:
    spill, now, flips, was = plenty(), NOON, 0, False
    for step_s, own_ms in steps:
        now += step_s
        ask(spill, own_ms, now)
        flips += spill.leaving("") is not was
        was = spill.leaving("")
    assert flips <= 2 + 2 * (now - NOON) / DWELL_S


def test_the_hour_slides_and_the_day_is_the_calendars() -> None:
    spill = Spill(1.0, 1.5)
    spill.ceilings.reserve("a", 1.0, NOON)
    assert ask(spill, 9000.0, NOON + 3599.0) == HOUR_CEILING
    assert ask(spill, 9000.0, NOON + 3661.0) == PREDICTED_WAIT
    spill.ceilings.reserve("b", 0.5, NOON + 3661.0)
    assert ask(spill, 9000.0, NOON + 3 * 3600.0) == DAY_CEILING
    assert ask(spill, 9000.0, NOON + 12 * 3600.0 - 1.0) == DAY_CEILING
    assert ask(spill, 9000.0, NOON + 12 * 3600.0) == PREDICTED_WAIT


def test_what_was_reserved_and_not_used_comes_back() -> None:
    ceilings = Ceilings(1.0, 1.0)
    ceilings.reserve("a", 0.9, NOON)
    assert ceilings.in_the_way(0.2, NOON) == HOUR_CEILING
    assert ceilings.settle("a", 0.1) == pytest.approx(0.1)
    assert ceilings.in_the_way(0.9, NOON) is None
    assert ceilings.in_the_way(0.91, NOON) == HOUR_CEILING
    assert ceilings.settle("a", 5.0) == 0.0  # once only
    assert ceilings.in_the_way(0.9, NOON) is None


def test_what_nobody_knows_the_cost_of_is_charged_as_reserved() -> None:
    ceilings = Ceilings(1.0, 1.0)
    ceilings.reserve("a", 0.9, NOON)
    assert ceilings.settle("a", None) == pytest.approx(0.9)
    assert ceilings.in_the_way(0.2, NOON) == HOUR_CEILING


def test_more_than_was_reserved_counts_too() -> None:
    ceilings = Ceilings(1.0, 10.0)
    ceilings.reserve("a", 0.1, NOON)
    ceilings.settle("a", 1.0)
    assert ceilings.in_the_way(1e-9, NOON) == HOUR_CEILING


def test_lower_ceilings_hold_at_once_and_what_is_spent_stays_spent() -> None:
    ceilings = Ceilings(1.0, 1.0)
    ceilings.reserve("a", 0.5, NOON)
    ceilings.change(0.6, 5.0)
    assert ceilings.in_the_way(0.1, NOON) is None
    assert ceilings.in_the_way(0.11, NOON) == HOUR_CEILING


def test_one_of_several_gateways_has_its_part_of_the_hour() -> None:
    ceilings = Ceilings(1.0, 9.0)
    assert ceilings.in_the_way(0.25, NOON, share=4) is None
    assert ceilings.in_the_way(0.26, NOON, share=4) == HOUR_CEILING


def test_and_of_the_day() -> None:
    ceilings = Ceilings(1.0, 2.0)
    for hour in range(2):
        assert ceilings.in_the_way(0.5, NOON + 7200.0 * hour, share=2) is None
        ceilings.reserve(str(hour), 0.5, NOON + 7200.0 * hour)
    assert ceilings.in_the_way(0.1, NOON + 14_400.0, share=2) == DAY_CEILING


def test_a_request_that_is_settled_long_after_leaves_nothing_behind() -> None:
    ceilings = Ceilings(1.0, 1.0)
    ceilings.reserve("a", 0.9, NOON)
    ceilings.reserve("b", 0.0, NOON + 4 * 86_400.0)
    ceilings.settle("a", 0.1)
    assert ceilings.hour_micros(NOON + 4 * 86_400.0) == ceilings.day_micros(NOON + 4 * 86_400.0) == 0


def test_costs_are_rounded_up() -> None:
    assert [micros_of(usd) for usd in (0.0, 1e-9, 1e-6, 0.5)] == [0, 1, 1, 500_000]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.floats(0.0, 0.4), st.floats(0.0, 1.0)),
        st.tuples(st.just("settle"), st.floats(0.0, 1.0), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.floats(0.0, 4000.0), st.just(0)),
    ),
    max_size=150,
)


@given(EVENTS, st.integers(1, 3))
def test_the_ceilings_are_never_passed(events: list[tuple[str, float, float]], share: int) -> None:
    """Reserved or spent, whichever a request has come to, in every 60 minutes and every day. No clock goes back."""
    spill, now = Spill(1.0, 3.0), NOON
    sent: dict[str, tuple[float, float]] = {}
    """By id: when it was sent and what it counts."""
    open_: list[str] = []
    for kind, amount, other in events:
        if kind == "pass":
            now += amount
        elif kind == "settle" and open_:
            id = open_.pop(int(other) % len(open_))
            at, reserved = sent[id]
            spill.ceilings.settle(id, reserved * amount)
            sent[id] = (at, reserved * amount)
        elif kind == "send":
            decision = spill.decide(inf, None, 1000.0, amount, now, share=share)
            if not decision.spill:
                continue
            id = str(len(sent))
            spill.ceilings.reserve(id, amount, now)
            sent[id] = (now, amount)
            open_.append(id)
            hour = sum(usd for at, usd in sent.values() if now - 3600.0 < at)
            day = sum(usd for at, usd in sent.values() if at // 86_400 == now // 86_400)
            assert hour * share <= 1.0 + 1e-6
            assert day * share <= 3.0 + 1e-6
