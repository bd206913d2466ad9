"""The marks of a replica: what sets each, what ends it, and the ceiling over a pool."""

from __future__ import annotations

from random import Random

import pytest

from routing.health import LONG_AWAY_S, Change, Evidence, Health, HealthState, Rules
from routing.observing import heed_ejection, observe
from routing.types import InferenceRequest, Replica

NOW = 1000.0
REQUEST = InferenceRequest("req_1", "m", stream=True, prompt_bytes=1)


def pool_of(count: int, rules: Rules | None = None) -> list[Replica]:
    return [Replica(f"r{index}", "p", "http://x", "openai", health=Health(rules)) for index in range(count)]


def fail(replica: Replica, pool: list[Replica], times: int = 5, now: float = NOW) -> list[Change | None]:
    return [observe(replica, pool, Evidence.FAILED, now) for _ in range(times)]


def recover(replica: Replica, pool: list[Replica]) -> float:
    """Bring an ejected replica back through its trial; when that was."""
    now = replica.health.ejection.until
    replica.health.begin_trial(now)
    changes = [observe(replica, pool, Evidence.ANSWERED, now) for _ in range(3)]
    assert changes == [None, None, Change.RECOVERED]
    return now


# Evidence.


@pytest.mark.parametrize("evidence", [Evidence.FAILED, Evidence.STALLED])
def test_the_fifth_failure_in_a_row_ejects(evidence: Evidence) -> None:
    pool = pool_of(2)
    changes = [observe(pool[0], pool, evidence, NOW) for _ in range(5)]
    assert changes == [None] * 4 + [Change.EJECTED]
    assert pool[0].unavailable_reason(NOW) == "ejected"
    assert pool[0].health.state(NOW) is HealthState.EJECTED


def test_an_answer_in_between_begins_the_count_anew() -> None:
    pool = pool_of(2)
    fail(pool[0], pool, 4)
    observe(pool[0], pool, Evidence.ANSWERED, NOW)
    assert fail(pool[0], pool, 4) == [None] * 4


@pytest.mark.parametrize("between", [Evidence.REJECTED, Evidence.OVERLOADED])
def test_a_client_error_or_an_overload_neither_counts_nor_interrupts_a_row(between: Evidence) -> None:
    pool = pool_of(2)
    for _ in range(50):
        assert observe(pool[0], pool, between, NOW) is None
    fail(pool[0], pool, 4)
    assert observe(pool[0], pool, between, NOW) is None
    assert pool[0].available(NOW)
    assert fail(pool[0], pool, 1) == [Change.EJECTED]


@pytest.mark.parametrize("neutral", [Evidence.REJECTED, Evidence.OVERLOADED])
def test_a_client_error_or_an_overload_is_no_sample(neutral: Evidence) -> None:
    pool = pool_of(2)
    changes: list[Change | None] = []
    for _ in range(5):
        observe(pool[0], pool, Evidence.ANSWERED, NOW)
        observe(pool[0], pool, neutral, NOW)
        changes += fail(pool[0], pool, 1)
    assert changes == [None] * 4 + [Change.EJECTED]


@pytest.mark.parametrize("neutral", [Evidence.REJECTED, Evidence.OVERLOADED])
def test_a_client_error_or_an_overload_neither_passes_nor_fails_a_trial(neutral: Evidence) -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    now = pool[0].health.ejection.until
    pool[0].health.begin_trial(now)
    for _ in range(10):
        assert observe(pool[0], pool, neutral, now) is None
    assert pool[0].health.state(now) is HealthState.HALF_OPEN
    assert pool[0].available(now)


def test_a_refused_connection_begins_a_cool_down_which_is_told_once() -> None:
    pool = pool_of(2)
    assert [observe(pool[0], pool, Evidence.UNREACHABLE, NOW) for _ in range(20)] == [Change.UNREACHABLE] + [None] * 19
    assert pool[0].unavailable_reason(NOW) == "cooling_down"
    assert pool[0].health.state(NOW) is HealthState.COOLING_DOWN
    assert pool[0].available(NOW + 0.5)
    assert observe(pool[0], pool, Evidence.UNREACHABLE, NOW + 0.5) is Change.UNREACHABLE
    assert pool[0].unavailable_reason(NOW + 1.4) == "cooling_down"


@pytest.mark.parametrize("answer", [Evidence.ANSWERED, Evidence.REJECTED, Evidence.OVERLOADED])
def test_any_answer_ends_a_cool_down(answer: Evidence) -> None:
    pool = pool_of(1)
    observe(pool[0], pool, Evidence.UNREACHABLE, NOW)
    observe(pool[0], pool, answer, NOW + 0.1)
    assert pool[0].health.state(NOW + 0.1) is HealthState.HEALTHY
    assert pool[0].cooldown.failures == 0


def test_a_cool_down_marked_from_outside_is_ended_by_an_answer_too() -> None:
    pool = pool_of(1)
    observe(pool[0], pool, Evidence.ANSWERED, NOW)
    pool[0].cooldown.failed(NOW)
    observe(pool[0], pool, Evidence.ANSWERED, NOW)
    assert pool[0].available(NOW)


# The ceiling.


def test_a_replica_that_is_alone_is_never_ejected_and_that_is_told_once() -> None:
    pool = pool_of(1)
    assert fail(pool[0], pool, 20) == [None] * 4 + [Change.SPARED] + [None] * 15
    assert pool[0].available(NOW)


def test_the_next_episode_is_told_again() -> None:
    pool = pool_of(1)
    fail(pool[0], pool, 6)
    for _ in range(20):
        observe(pool[0], pool, Evidence.ANSWERED, NOW)
    assert fail(pool[0], pool, 6) == [None] * 4 + [Change.SPARED, None]


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
def test_no_more_than_half_of_the_pool_is_out_at_once(count: int, most: int) -> None:
    pool = pool_of(count)
    changes = [fail(each, pool)[-1] for each in pool]
    assert changes == [Change.EJECTED] * most + [Change.SPARED] * (count - most)


def test_half_open_ones_count_as_out() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    later = pool[0].health.ejection.until + 1.0
    assert pool[0].health.state(later) is HealthState.HALF_OPEN
    assert fail(pool[1], pool, now=later)[-1] is Change.SPARED


def test_a_spared_replica_that_goes_on_failing_is_ejected_once_there_is_room() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    fail(pool[1], pool)
    now = recover(pool[0], pool)
    assert fail(pool[1], pool, 1, now) == [Change.EJECTED]


# The way back.


def trying(pool: list[Replica]) -> float:
    fail(pool[0], pool)
    now = pool[0].health.ejection.until
    assert pool[0].unavailable_reason(now) == "half_open"
    pool[0].health.begin_trial(now)
    return now


@pytest.mark.parametrize("evidence", [Evidence.FAILED, Evidence.STALLED, Evidence.UNREACHABLE])
def test_one_failure_ends_a_trial_and_the_next_time_out_is_longer(evidence: Evidence) -> None:
    pool = pool_of(2)
    now = trying(pool)
    observe(pool[0], pool, Evidence.ANSWERED, now)
    observe(pool[0], pool, Evidence.ANSWERED, now)
    assert observe(pool[0], pool, evidence, now) is Change.EJECTED
    assert pool[0].health.ejection.until == now + 20.0


def test_a_trial_takes_one_request_at_a_time_then_two_then_all() -> None:
    pool = pool_of(2)
    now = trying(pool)
    with pool[0].reserve(REQUEST):
        assert pool[0].unavailable_reason(now) == "half_open"
        observe(pool[0], pool, Evidence.ANSWERED, now)
        with pool[0].reserve(REQUEST):
            assert pool[0].unavailable_reason(now) == "half_open"
        assert pool[0].available(now)
        observe(pool[0], pool, Evidence.ANSWERED, now)
        with pool[0].reserve(REQUEST), pool[0].reserve(REQUEST):
            assert pool[0].available(now)
            assert observe(pool[0], pool, Evidence.ANSWERED, now) is Change.RECOVERED
    assert pool[0].health.state(now) is HealthState.WARMING
    assert pool[0].health.ejection.trial_in_flight == 0


def test_long_requests_from_before_the_ejection_do_not_take_the_place_of_the_trial() -> None:
    pool = pool_of(2)
    with pool[0].reserve(REQUEST), pool[0].reserve(REQUEST):
        now = trying(pool)
        assert pool[0].available(now)
        with pool[0].reserve(REQUEST):
            assert pool[0].unavailable_reason(now) == "half_open"


def test_a_request_cancelled_during_a_trial_leaves_its_place() -> None:
    pool = pool_of(2)
    now = trying(pool)
    for _ in range(5):
        with pool[0].reserve(REQUEST):
            assert pool[0].unavailable_reason(now) == "half_open"
        assert pool[0].available(now)


def test_a_request_of_an_earlier_trial_does_not_free_a_place_in_the_next() -> None:
    pool = pool_of(2)
    trying(pool)
    hanging = pool[0].reserve(REQUEST)
    with hanging:
        fail(pool[0], pool, 1, pool[0].health.ejection.until)
        now = pool[0].health.ejection.until
        pool[0].health.begin_trial(now)
        current = pool[0].reserve(REQUEST)
        current.__enter__()
    assert pool[0].unavailable_reason(now) == "half_open"
    current.__exit__()
    assert pool[0].available(now)


def test_answers_in_panic_count_once_its_time_is_over() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    now = pool[0].health.ejection.until
    changes = [observe(pool[0], pool, Evidence.ANSWERED, now) for _ in range(3)]
    assert changes[-1] is Change.RECOVERED


# Slow start.


def test_a_replica_seen_for_the_first_time_has_its_full_share() -> None:
    assert Health().share(NOW) == 1.0


def test_after_an_ejection_the_share_climbs_from_a_tenth_to_all_in_a_minute() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    now = recover(pool[0], pool)
    health = pool[0].health
    assert [round(health.share(now + each), 3) for each in (0, 20, 30, 59, 60, 600)] == [0.1, 0.4, 0.55, 0.985, 1, 1]
    assert health.state(now + 59.9) is HealthState.WARMING
    assert health.state(now + 60.0) is HealthState.HEALTHY
    assert pool[1].health.share(now) == 1.0


def test_a_trial_has_the_full_share_or_light_traffic_would_never_reach_it() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    recover(pool[0], pool)
    fail(pool[0], pool, now=pool[0].health.ejection.until + 1.0)
    now = pool[0].health.ejection.until
    pool[0].health.begin_trial(now)
    assert pool[0].health.share(now) == 1.0


def test_slow_start_can_be_turned_off() -> None:
    pool = pool_of(2, Rules(slow_start_s=0.0))
    fail(pool[0], pool)
    assert pool[0].health.share(recover(pool[0], pool)) == 1.0


@pytest.mark.parametrize(("away_s", "share"), [(LONG_AWAY_S - 0.1, 1.0), (LONG_AWAY_S, 0.1)])
@pytest.mark.parametrize("away", ["refused", "refused_probe", "not_ready"])
@pytest.mark.parametrize("back", ["answer", "probe"])
def test_a_replica_that_was_away_for_long_starts_slowly(away: str, back: str, away_s: float, share: float) -> None:
    pool = pool_of(1)
    health = pool[0].health
    for at in (NOW, NOW + away_s / 2):
        if away == "not_ready":
            health.probed(False, at)
        elif away == "refused":
            observe(pool[0], pool, Evidence.UNREACHABLE, at)
        else:
            health.probe_failed(True, at)
    now = NOW + away_s
    if back == "probe" or away == "not_ready":
        health.probed(True, now)
    else:
        observe(pool[0], pool, Evidence.ANSWERED, now)
    assert health.share(now) == share
    assert health.state(now + 60.0) is HealthState.HEALTHY


# What other workers say.


def test_two_other_workers_are_followed_below_the_ceiling() -> None:
    pool = pool_of(2)
    assert heed_ejection(pool[0], pool, "w1", NOW + 10.0, NOW) is None
    assert heed_ejection(pool[0], pool, "w2", NOW + 12.0, NOW) is Change.EJECTED
    assert pool[0].health.ejection.until == NOW + 12.0
    assert heed_ejection(pool[1], pool, "w1", NOW + 10.0, NOW) is None
    assert heed_ejection(pool[1], pool, "w2", NOW + 10.0, NOW) is None
    assert pool[1].available(NOW)


def test_one_other_worker_is_followed_after_a_connection_was_refused_here() -> None:
    pool = pool_of(2)
    observe(pool[0], pool, Evidence.UNREACHABLE, NOW)
    assert heed_ejection(pool[0], pool, "w1", NOW + 10.0, NOW + 1.0) is Change.EJECTED


def test_a_recovery_seen_elsewhere_ends_an_ejection_with_slow_start() -> None:
    pool = pool_of(2)
    fail(pool[0], pool)
    pool[0].health.hint_recovered(NOW + 1.0)
    assert pool[0].health.state(NOW + 1.0) is HealthState.WARMING
    assert pool[0].health.share(NOW + 1.0) == 0.1


def test_what_ejected_it_does_not_count_again_after_its_return() -> None:
    pool = pool_of(2)
    for evidence in (Evidence.ANSWERED, Evidence.FAILED) * 5:
        observe(pool[0], pool, evidence, NOW)
    assert pool[0].health.out
    pool[0].health.hint_recovered(NOW)
    assert [observe(pool[0], pool, each, NOW) for each in (Evidence.ANSWERED, Evidence.FAILED)] == [None, None]

    fail(pool[1], pool)
    pool[1].health.hint_recovered(NOW)
    assert fail(pool[1], pool) == [None] * 4 + [Change.EJECTED]


def test_a_recovery_seen_elsewhere_changes_nothing_where_it_was_never_out() -> None:
    pool = pool_of(2)
    heed_ejection(pool[0], pool, "w1", NOW + 10.0, NOW)
    pool[0].health.hint_recovered(NOW + 1.0)
    assert pool[0].health.state(NOW + 1.0) is HealthState.HEALTHY
    assert heed_ejection(pool[0], pool, "w2", NOW + 10.0, NOW + 2.0) is None, "the first word was taken back"


def test_jitter_comes_from_the_generator_that_was_given() -> None:
    times = set()
    for seed in range(20):
        pool = pool_of(2)
        pool[0].health = Health(Rules(), Random(seed))
        fail(pool[0], pool)
        times.add(pool[0].health.ejection.until)
    assert len(times) == 20
