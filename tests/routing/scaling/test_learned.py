"""What a scaler has learned, taken over by another one; and what is refused."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from math import inf, nan
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.scaling import Demand, Implausible, Learned, Rules, Scaler
from routing.scaling.learned import MOST_SAMPLES, OLDEST_S, RECENT_S, check, thinned

RULES = Rules(max=200, min=0, lead_time_s=120.0, down_after_s=60.0)
MOST_BYTES = 12 * 1024

demands = st.builds(
    Demand,
    at_s=st.just(0.0),
    arrivals_per_s=st.floats(0.0, 200.0),
    arrival_tokens_per_s=st.sampled_from([0.0, 0.0, 3000.0, 5e5]),
    in_flight=st.integers(0, 5000),
    waiting=st.sampled_from([0, 0, 7, 4000]),
    queue_wait_p90_s=st.none() | st.floats(0.0, 60.0),
    ttft_p90_ms=st.none() | st.floats(1.0, 1e5),
    kv_use=st.none() | st.floats(0.0, 1.0),
    replicas_ready=st.integers(0, 64),
    replicas_starting=st.integers(0, 16),
    replicas_unhealthy=st.sampled_from([0, 0, 0, 3]),
    capacity_requests=st.none() | st.floats(1.0, 512.0),
    tokens_per_s=st.floats(0.0, 1e5),
    served_per_s=st.floats(0.0, 200.0),
    complete=st.sampled_from([True, True, False]),
)
days = st.lists(st.tuples(demands, st.sampled_from([1, 2, 14])), min_size=1, max_size=6)
"""Each for so many periods, so that times long enough to be learned from come about."""


def lived(scaler: Scaler, day: list[tuple[Demand, int]], begin_s: float, period_s: float) -> tuple[list[Any], float]:
    """All that it says, and the time after it."""
    said, at = [], begin_s
    for each, periods in day:
        for _ in range(periods):
            said.append(scaler.decide(replace(each, at_s=at), at))
            at += period_s
    return said, at


def over_the_wire(learned: Learned) -> Learned:
    return msgspec.json.decode(msgspec.json.encode(learned), type=Learned)


@settings(max_examples=50, deadline=None)
@given(days, days, st.sampled_from([2.0, 5.0, 64.0]), st.lists(st.floats(0.0, 900.0), max_size=30))
def test_a_restored_scaler_says_the_same_as_one_that_lived_on(
    before: list[tuple[Demand, int]], after: list[tuple[Demand, int]], period_s: float, starts: list[float]
) -> None:
    scaler = Scaler(RULES, "kind")
    for each in starts:
        scaler.learned_start(each)
    _, at = lived(scaler, before, 1024.0, period_s)
    last = at - period_s
    data = msgspec.json.encode(scaler.learned(last))
    assert len(data) <= MOST_BYTES
    other = Scaler(RULES, "kind")
    other.restore(msgspec.json.decode(data, type=Learned), 0.0, last)
    if period_s != 2.0:  # where five minutes are more than are kept, what is left out may tell
        assert lived(other, after, at, period_s)[0] == lived(scaler, after, at, period_s)[0]


@settings(max_examples=30, deadline=None)
@given(days, st.floats(0.0, OLDEST_S), days)
def test_whatever_was_learned_whenever_is_plausible_and_what_is_said_after_it_keeps_to_the_rules(
    before: list[tuple[Demand, int]], age_s: float, after: list[tuple[Demand, int]]
) -> None:
    scaler = Scaler(RULES, "kind")
    _, at = lived(scaler, before, 0.0, 5.0)
    other = Scaler(RULES, "kind")
    other.restore(over_the_wire(scaler.learned(at)), age_s, 50.0)
    for said in lived(other, after, 50.0, 5.0)[0]:
        assert 0 <= said.count <= 200
    check(other.learned(1e6), "kind", 0.0)


def busy(per_s: float, ready: int, each: float, **more: Any) -> Demand:
    """Replicas with so many requests each, in which each takes 5 s and 0.4 more for each beside it."""
    service_s = 5.0 + 0.4 * each
    usual = Demand(
        at_s=0.0,
        arrivals_per_s=per_s,
        arrival_tokens_per_s=1000.0 * per_s,
        in_flight=round(ready * each),
        replicas_ready=ready,
        capacity_requests=100.0,
        tokens_per_s=1000.0 * ready * each / service_s,
        served_per_s=ready * each / service_s,
    )
    return replace(usual, **more)


def steady(each: float, ready: int = 10) -> Demand:
    return busy(ready * each / (5.0 + 0.4 * each), ready, each)


def taught() -> tuple[Scaler, float]:
    """One that has seen half full and full replicas for an hour."""
    scaler = Scaler(RULES, "kind")
    _, at = lived(scaler, [(steady(40.0), 240), (steady(75.0), 480)], 0.0, 5.0)
    return scaler, at


def serves(scaler: Scaler, at: float) -> float:
    """What it takes a replica to serve a second, by what it says."""
    said = scaler.decide(replace(steady(40.0), at_s=at), at)
    return float(said.reasons[0].text.partition("a replica serves ")[2].split()[0])


def test_what_a_full_replica_serves_is_known_after_a_day_and_gives_way_to_what_is_seen_then() -> None:
    scaler, at = taught()
    truth = 100.0 / 45.0
    assert serves(scaler, at) == pytest.approx(truth, rel=0.05)
    assert abs(serves(Scaler(RULES, "kind"), 0.0) / truth - 1.0) > 0.1, "one that has learned nothing guesses"
    fresh, day_old = Scaler(RULES, "kind"), Scaler(RULES, "kind")
    fresh.restore(scaler.learned(at), 30.0, 0.0)
    day_old.restore(scaler.learned(at), 86_400.0, 0.0)
    assert serves(fresh, 5.0) == pytest.approx(truth, rel=0.05)
    assert serves(day_old, 5.0) == pytest.approx(truth, rel=0.05)
    # Now replicas take twice as long for each. Ten minutes of that outweigh what was learned yesterday, and not what
    # was learned half a minute ago.
    slow = replace(steady(75.0), arrivals_per_s=steady(75.0).arrivals_per_s / 2.0)
    slow = replace(slow, arrival_tokens_per_s=1000.0 * slow.arrivals_per_s)
    for each in (fresh, day_old):
        lived(each, [(slow, 120)], 10.0, 5.0)
    assert serves(day_old, 615.0) < 0.75 * truth
    assert serves(fresh, 615.0) > serves(day_old, 615.0) * 1.15


def test_the_last_minutes_are_taken_over_for_two_minutes_and_only_by_one_that_has_decided_nothing() -> None:
    scaler, at = taught()
    learned = scaler.learned(at)
    said = scaler.decide(None, at)
    for age_s, knows in ((RECENT_S, True), (RECENT_S + 1.0, False)):
        other = Scaler(RULES, "kind")
        other.restore(learned, age_s, at)
        assert (other.decide(None, at).count == said.count) is knows
    other = Scaler(RULES, "kind")
    other.decide(replace(steady(10.0, 2), at_s=at), at)
    other.restore(learned, 0.0, at)
    assert other.decide(None, at).count == 2


def test_who_has_seen_more_knows_more() -> None:
    scaler, at = taught()
    learned = scaler.learned(at)
    assert Scaler(RULES, "kind").knows_less(learned, 0.0, 0.0)
    assert not scaler.knows_less(learned, 0.0, at)
    other = Scaler(RULES, "kind")
    lived(other, [(steady(40.0), 240)], 0.0, 5.0)
    assert other.knows_less(learned, 0.0, 1200.0)
    assert not other.knows_less(learned, 86_400.0, 1200.0)
    with pytest.raises(Implausible):
        other.knows_less(replace(learned, about="another"), 0.0, 1200.0)


def test_what_was_learned_of_other_replicas_is_not_taken_over_and_is_forgotten_when_they_change() -> None:
    scaler, at = taught()
    with pytest.raises(Implausible, match="another model"):
        Scaler(RULES, "other").restore(scaler.learned(at), 0.0, at)
    scaler.change(RULES, "other")
    assert scaler.learned(at).capacity.line is None
    assert scaler.capacity_requests is None


@pytest.mark.parametrize("age_s", [-301.0, OLDEST_S + 1.0, nan, inf, -inf])
def test_what_is_from_the_future_or_too_old_is_refused(age_s: float) -> None:
    scaler, at = taught()
    with pytest.raises(Implausible, match="its age"):
        Scaler(RULES, "kind").restore(scaler.learned(at), age_s, at)
    Scaler(RULES, "kind").restore(scaler.learned(at), -299.0, at)


def spoilt(value: Any, bad: float) -> list[Any]:
    """All ways to put a bad number in the place of one that is there."""
    if is_dataclass(value) and not isinstance(value, type):
        return [
            replace(value, **{each.name: made})
            for each in fields(value)
            for made in spoilt(getattr(value, each.name), bad)
        ]
    if isinstance(value, tuple):
        return [
            (*value[:place], made, *value[place + 1 :])
            for place, each in enumerate(value)
            for made in spoilt(each, bad)
        ]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    return [bad]


@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30, -1e30])
def test_one_number_that_cannot_be_refuses_all_of_it_and_nothing_is_changed(bad: float) -> None:
    scaler, at = taught()
    lived(scaler, [(busy(30.0, 10, 100.0, waiting=50, ttft_p90_ms=9000.0, kv_use=0.9), 30)], at, 5.0)
    scaler.learned_start(30.0)
    learned = scaler.learned(at + 150.0)
    assert learned.capacity.lowered is not None
    assert learned.orders.up_age_s is not None
    wrong = spoilt(learned, bad)
    assert len(wrong) > 100
    for each in wrong:
        other = Scaler(RULES, "kind")
        blank = other.learned(0.0)
        with pytest.raises(Implausible):
            other.restore(each, 0.0, 0.0)
        assert other.learned(0.0) == blank


@pytest.mark.parametrize("kind", ["capacity", "course", "orders"])
def test_less_than_nothing_is_refused(kind: str) -> None:
    scaler, at = taught()
    learned = scaler.learned(at)
    for each in spoilt(getattr(learned, kind), -1.0):
        if kind == "course" and each.samples == learned.course.samples and each.minute == learned.course.minute:
            continue  # a trend may fall
        with pytest.raises(Implausible):
            check(replace(learned, **{kind: each}), "kind", 0.0)


def test_more_than_is_kept_or_out_of_order_or_another_version_is_refused() -> None:
    scaler, at = taught()
    learned = scaler.learned(at)
    wrong = [
        replace(learned, version=2),
        replace(learned, starts=(1.0,) * 21),
        replace(learned, course=replace(learned.course, samples=((1.0, 5.0, 1.0),) * (MOST_SAMPLES + 1))),
        replace(learned, course=replace(learned.course, samples=learned.course.samples[::-1])),
        replace(learned, orders=replace(learned.orders, wanted=((9.0, 3), (5.0, 4)))),
        replace(learned, capacity=replace(learned.capacity, kv=None, kv_held=(1.0, 1.0))),
    ]
    for each in wrong:
        with pytest.raises(Implausible):
            check(each, "kind", 0.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=700, unique=True), st.floats(0.0, 4000.0))
def test_what_was_wanted_is_thinned_to_what_takes_nothing_away_sooner(counts: list[int], back_s: float) -> None:
    full = [(float(4000 - place), count) for place, count in enumerate(sorted(counts, reverse=True))]
    thin = thinned(full)
    assert len(thin) <= MOST_SAMPLES
    most = max((count for age_s, count in full if age_s <= back_s), default=0)
    assert max((count for age_s, count in thin if age_s <= back_s), default=0) >= most
    assert max((count for _, count in thin), default=0) == max(counts, default=0)


def test_requests_are_taken_to_be_as_long_as_before_while_a_gateway_that_was_started_again_cannot_tell() -> None:
    """It learns from answers what a byte is in tokens: until then it tells no tokens, and not that there are none."""
    scaler, at = taught()
    before = serves(scaler, at)
    untold = replace(steady(75.0), arrival_tokens_per_s=0.0, tokens_per_s=0.0)
    counts = {each.count for each in lived(scaler, [(untold, 120)], at + 5.0, 5.0)[0]}
    assert serves(scaler, at + 605.0) == pytest.approx(before, rel=0.02)
    assert max(counts) <= 14
    lived(scaler, [(untold, 240)], at + 610.0, 5.0)  # nobody ever tells again: requests are the unit from now on
    assert not scaler.learned(at + 1800.0).capacity.by_tokens


def test_a_weekend_without_load_does_not_make_a_replica_carry_hundreds_of_times_as_much() -> None:
    scaler = Scaler(RULES)
    late = busy(30.0, 10, 60.0, capacity_requests=None, ttft_p90_ms=4000.0)
    lived(scaler, [(late, 40)], 0.0, 5.0)
    tried = scaler.capacity_requests
    assert tried is not None
    quiet = busy(0.1, 10, 0.2, capacity_requests=None)
    lived(scaler, [(quiet, 4000)], 200.0, 60.0)
    assert scaler.capacity_requests == pytest.approx(2.0 * tried)


@pytest.mark.parametrize(
    "spoilt_capacity",
    [
        {"told": 1e-300},
        {"lowered": 1e-300, "tried": 1e-300},
        {"kv": (1.0, 0.0), "kv_held": (1e-200, 0.0)},
        {"kv": (1e-200, 0.0), "kv_held": (1e9, 0.0)},
    ],
)
def test_no_capacity_that_is_taken_over_stops_a_scaler(spoilt_capacity: dict[str, Any]) -> None:
    """Where all loads seen were much the same, so that the line has no slope of its own."""
    scaler, at = taught()
    learned = scaler.learned(at)
    assert learned.capacity.line is not None
    line = replace(learned.capacity.line, weight=512.0, b=512.0 * 8.0, bb=512.0 * 64.0)
    capacity = replace(learned.capacity, line=line, **{"told": None, **spoilt_capacity})
    other = Scaler(RULES, "kind")
    try:
        other.restore(over_the_wire(replace(learned, capacity=capacity)), 5.0, at)
    except Implausible:
        return
    calm = replace(steady(75.0), capacity_requests=None)
    lived(other, [(calm, 100)], at + 5.0, 5.0)
    assert (other.capacity_requests or 1.0) >= 1.0


def test_what_an_engine_said_of_its_capacity_is_forgotten_when_no_engine_says_it_any_more() -> None:
    """Nothing else would ever raise it: a new engine that tells nothing would be taken for the old one for good."""
    scaler, at = taught()
    untold = replace(steady(75.0), capacity_requests=None)
    learned = scaler.learned(at)
    assert learned.capacity.told is not None
    low = replace(learned, capacity=replace(learned.capacity, told=1.5))
    other = Scaler(RULES, "kind")
    other.restore(low, 5.0, at)
    lived(other, [(untold, 300)], at + 5.0, 5.0)
    assert other.learned(at + 1505.0).capacity.told is None
    lived(scaler, [(steady(75.0), 300)], at + 5.0, 5.0)  # it is said again and again
    assert scaler.learned(at + 1505.0).capacity.told == learned.capacity.told
