"""How much replicas take at once: who is believed, what load reports show, and what a pool has when some are away."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.capacity import Capacity, Measured, Meter, derive, pool_capacity, set_ceilings
from routing.credential import Credential, Credentials
from routing.types import Replica

REPORTS = st.lists(
    st.tuples(st.none() | st.integers(0, 500), st.none() | st.integers(0, 50)) | st.just((7, 3)), max_size=60
)


def after(reports: Iterable[tuple[int | None, int | None]], measured: Measured | None = None) -> Measured:
    measured = measured or Measured()
    for running, waiting in reports:
        measured = measured.after(running, waiting)
    return measured


# What load reports show.


def test_an_engine_whose_requests_wait_twice_runs_no_more_than_it_runs_then() -> None:
    assert after([(8, 0), (9, 0), (10, 3)]).requests is None
    assert after([(8, 0), (9, 0), (10, 3), (10, 2)]).requests == 10


def test_what_has_just_arrived_at_an_idle_engine_says_nothing() -> None:
    assert after([(0, 0), (1, 40), (41, 0), (20, 0), (1, 30), (31, 0)]).requests is None
    assert after([(1, 40), (32, 9)]).requests == 32  # its first report counted those that the next step took up


def test_an_engine_that_never_has_a_queue_has_no_known_bound() -> None:
    assert after([(400, 0)] * 50).requests is None


def test_an_engine_that_runs_more_raises_the_estimate_at_once_whether_others_wait_or_not() -> None:
    known = after([(10, 2)] * 2)
    assert after([(12, 1)], known).requests == 12
    assert after([(14, 0)], known).requests == 14


def test_a_few_long_prompts_lower_it_little_and_many_lower_it_to_what_they_allow() -> None:
    known = after([(64, 2)] * 2)
    assert after([(20, 9)] * 2, known).requests == 59  # the first is judged together with the 64 before it
    assert after([(20, 9)] * 60, known).requests == 20


def test_it_grows_back_by_a_quarter_and_beyond_what_was_seen_by_one() -> None:
    low = after([(64, 2)] * 2 + [(10, 9)] * 60)
    assert low.requests == 10
    grown = []
    for _ in range(14):  # a queue here sends as many as the estimate says, and two more
        assert low.requests is not None
        low = low.after(min(64, low.requests + 2), 0)
        grown.append(low.requests)
    assert grown[:4] == [12, 18, 25, 34]
    assert max(filter(None, grown)) <= 66


def test_momentary_emptiness_of_a_full_engine_does_not_raise_it() -> None:
    full = after([(64, 2)] * 2)
    for _ in range(200):  # two ended since the last report, and what replaces them is on its way
        full = after([(64, 2), (64, 0), (63, 1), (64, 2)], full)
    assert full.requests == 64


def test_a_paused_engine_is_not_one_without_capacity() -> None:
    assert after([(0, 5)] * 20).requests is None
    assert after([(0, 5)] * 20, after([(10, 5)] * 2)).requests == 10


def test_reports_that_do_not_say_are_no_evidence_and_break_a_series() -> None:
    assert after([(10, 3), (None, None), (10, 3)]).requests is None
    assert after([(None, 3), (10, None)] * 9) == Measured()


def test_in_another_life_the_estimate_is_a_guess_that_grows_and_falls_freely() -> None:
    guess = after([(8, 4)] * 2).begun_anew()
    assert guess.requests == 8
    assert after([(3, 0), (7, 0)], guess).requests == 8
    assert after([(3, 0), (8, 0)], guess).requests == 10
    more = guess
    for _ in range(12):
        assert more.requests is not None
        more = more.after(more.requests + 2, 0)
    assert more.requests is not None
    assert more.requests > 50
    assert after([(2, 4)] * 40, guess).requests == 2


@given(REPORTS)
def test_the_estimate_is_at_least_one_and_at_most_one_more_than_was_ever_run(
    reports: list[tuple[int | None, int | None]],
) -> None:
    measured = Measured()
    most = 0
    for running, waiting in reports:
        measured = measured.after(running, waiting)
        most = max(most, running or 0)
        assert measured.requests is None or 1 <= measured.requests <= most + 1
        if running is not None and waiting is not None and measured.requests is not None:
            assert measured.requests >= running


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 2**32))
def test_a_queue_that_follows_it_fills_the_engine_and_little_more(true: int, headroom: int, seed: int) -> None:
    """An engine that runs `true` at once, fed by a queue that always has more, whose requests end at random."""
    rng = Random(seed)
    meter = Meter()
    meter.observe(min(true, 3), 2)
    meter.observe(min(true, 3), 2)  # a bad beginning: what it ran then was little
    for step in range(400):
        allowed = meter.capacity.dispatch(headroom)
        assert allowed is not None
        sent = max(0, allowed - rng.randint(0, 1))
        meter.observe(min(true, sent), max(0, sent - true))
        if step >= 350:
            assert meter.capacity.requests is not None
            assert true <= meter.capacity.requests <= true + 1


# Who is believed.


@pytest.mark.parametrize(
    ("configured", "stated", "measured", "expected"),
    [
        (None, None, None, Capacity()),
        (None, 256, None, Capacity(256, None, "stated")),
        (None, 256, 40, Capacity(40, None, "measured")),
        (None, 16, 17, Capacity(16, None, "stated")),
        (None, None, 40, Capacity(40, None, "measured")),
        (64, 256, 40, Capacity(64, None, "configured")),
    ],
)
def test_the_configuration_is_believed_then_the_lesser_of_what_is_stated_and_seen(
    configured: int | None, stated: int | None, measured: int | None, expected: Capacity
) -> None:
    assert derive((configured, None), (stated, None), measured) == expected


def test_tokens_are_the_configured_ones_else_those_of_the_engine() -> None:
    assert derive((None, 1000), (None, 32768), None).tokens == 1000
    assert derive((8, None), (None, 32768), None).tokens == 32768


def test_a_limit_is_kept_and_a_measured_capacity_is_always_tried_a_little_above() -> None:
    assert [Capacity(8, None, source).dispatch(2) for source in ("configured", "stated", "measured")] == [8, 10, 10]
    assert [Capacity(8, None, source).dispatch(0) for source in ("configured", "stated", "measured")] == [8, 8, 9]
    assert Capacity().dispatch(2) is None


def test_a_meter_forgets_what_an_engine_stated_before_its_restart() -> None:
    meter = Meter()
    meter.state(16, 4096)
    assert meter.capacity == Capacity(16, 4096, "stated")
    meter.state(0, 0)
    assert meter.capacity == Capacity()
    meter.state(16, 4096)
    for _ in range(2):
        meter.observe(5, 1)
    meter.begin_anew()
    assert meter.capacity == Capacity(5, None, "measured")
    meter.configure(3, 100)
    assert meter.capacity == Capacity(3, 100, "configured")


# A pool.


def replica(requests: int | None = None, tokens: int | None = None, **fields: object) -> Replica:
    made = Replica("r", "pool", "http://127.0.0.1:1", "openai", **fields)  # type: ignore[arg-type]
    made.meter.state(requests, tokens)
    return made


def refused() -> Replica:
    away = replica(10, 1000)
    away.health.unreachable(0.0)
    assert away.unavailable_reason(0.1) == "cooling_down"
    return away


def test_a_pool_has_what_its_replicas_have_and_the_headroom_of_each() -> None:
    assert pool_capacity([replica(8, 4096), replica(16, 8192)], 2, 0.0) == (28, 12288)
    assert pool_capacity([], 2, 0.0) == (None, None)


def test_full_replicas_count_and_drained_ones_do_not() -> None:
    full = replica(8, 4096, max_in_flight=3, in_flight=3)
    full.meter.configure(3, None)
    at_ceiling = replica(8, 4096, ceiling=10, in_flight=10)
    drained, idle = replica(8, 4096, draining=True), replica(1, 100)
    assert pool_capacity([full, at_ceiling, drained, idle], 2, 0.0) == (16, 8292)


def test_one_replica_of_unknown_capacity_makes_the_sum_unknown_unless_it_is_away() -> None:
    known, unknown = replica(8, 4096), replica()
    assert pool_capacity([known, unknown], 2, 0.0) == (None, None)
    assert pool_capacity([known, replica(4)], 2, 0.0) == (16, None)
    unknown.draining = True
    assert pool_capacity([known, unknown], 2, 0.0) == (10, 4096)


def test_nothing_waits_for_a_pool_in_which_nothing_can_serve() -> None:
    locked = replica(8, 4096, credential=Credentials([Credential()]))
    assert locked.credential is not None
    locked.credential.until = 60.0
    unready = replica(8, 4096)
    unready.health.probed(False, 0.0)
    assert unready.unavailable_reason(0.1) == "not_ready"
    for alone in ([replica(8, 4096, draining=True)], [locked], [refused()], [unready], [locked, refused()]):
        assert pool_capacity(alone, 2, 0.1) == (None, None)


def test_replicas_under_suspicion_count_only_where_routing_would_try_them() -> None:
    suspect, well = replica(10, 1000), replica(4, 500)
    suspect.health.adopt_ejection(60.0, 0.0)
    assert suspect.unavailable_reason(0.1) == "ejected"
    assert pool_capacity([suspect, well], 2, 0.1) == (6, 500)
    assert pool_capacity([suspect, refused()], 2, 0.1) == (12, 1000)


def test_ceilings_are_set_and_lifted() -> None:
    known, unknown = replica(8), replica()
    set_ceilings([known, unknown], 2)
    assert (known.ceiling, unknown.ceiling) == (10, None)
    set_ceilings([known, unknown], None)
    assert known.ceiling is None
