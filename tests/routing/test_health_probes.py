"""What probes and the progress watchdog say, and what outweighs them."""

from __future__ import annotations

import pytest

from routing.health import ALIVE_S, Change, Evidence, Health, HealthState
from routing.observing import observe
from routing.types import Replica

NOW = 1000.0


def pool_of_one() -> list[Replica]:
    return [Replica("r0", "p", "http://x", "openai")]


def test_not_ready_excludes_at_once_and_one_ready_brings_it_back() -> None:
    health = Health()
    health.probed(False, NOW)
    assert health.unavailable_reason(NOW) == "not_ready"
    health.probed(True, NOW + 1.0)
    assert health.unavailable_reason(NOW + 1.0) is None


def test_streams_that_go_on_do_not_make_it_ready() -> None:
    """An engine that is being stopped finishes its streams, and takes no new ones."""
    pool = pool_of_one()
    pool[0].health.probed(False, NOW)
    observe(pool[0], pool, Evidence.ANSWERED, NOW + 1.0)
    pool[0].health.progressed_at = NOW + 2.0
    assert pool[0].unavailable_reason(NOW + 2.0) == "not_ready"
    assert pool[0].health.share(NOW + 2.0) == 1.0


def test_a_refused_probe_is_a_refused_connection() -> None:
    health = Health()
    health.progressed_at = NOW
    assert health.probe_failed(True, NOW) is Change.UNREACHABLE
    assert health.probe_failed(True, NOW) is None
    assert health.unavailable_reason(NOW) == "cooling_down"
    health.probed(True, NOW + 0.1)
    assert health.unavailable_reason(NOW + 0.1) is None


def silent(health: Health, first: float = NOW, times: int = 3) -> float:
    for index in range(times):
        health.probe_failed(False, first + 5.0 * index)
    return first + 5.0 * (times - 1)


def test_three_unanswered_probes_in_a_row_make_it_unresponsive() -> None:
    health = Health()
    assert health.unavailable_reason(silent(health, times=2)) is None
    now = silent(health, NOW + 10.0, 1)
    assert health.unavailable_reason(now) == "unresponsive"
    health.probed(True, now + 1.0)
    assert health.unavailable_reason(now + 1.0) is None
    assert health.unavailable_reason(silent(health, now + 2.0, 2)) is None


def test_progress_since_the_first_of_them_wins_over_the_probes() -> None:
    health = Health()
    silent(health, times=1)
    health.progressed_at = NOW + 1.0
    now = silent(health, NOW + 5.0, 2)
    assert health.unavailable_reason(now) is None
    now = silent(health, now + 5.0, 1)
    assert health.unavailable_reason(now) == "unresponsive", "the count began anew at the progress, and is full now"


def test_progress_ends_unresponsive_and_not_only_for_a_moment() -> None:
    health = Health()
    now = silent(health)
    health.progressed_at = now + 1.0
    assert health.unavailable_reason(now + 1.0) is None
    assert health.unavailable_reason(now + 60.0) is None, "no probe has failed since"


def test_a_busy_replica_whose_probes_all_fail_stays_in() -> None:
    health = Health()
    for second in range(600):
        now = NOW + second
        health.progressed_at = now - 0.5
        health.probe_failed(False, now)
        assert health.unavailable_reason(now) is None


def test_recent_life_outweighs_any_number_of_quick_probes() -> None:
    health = Health()
    health.progressed_at = NOW - 0.1
    for _ in range(10):
        health.probe_failed(False, NOW)
    assert health.unavailable_reason(NOW) is None
    assert health.unavailable_reason(NOW + ALIVE_S) == "unresponsive"


@pytest.mark.parametrize("evidence", [Evidence.ANSWERED, Evidence.REJECTED, Evidence.OVERLOADED])
def test_any_answer_ends_unresponsive(evidence: Evidence) -> None:
    pool = pool_of_one()
    now = silent(pool[0].health)
    observe(pool[0], pool, evidence, now + 1.0)
    assert pool[0].health.state(now + 1.0) is HealthState.HEALTHY


def test_progress_of_the_engine_itself_is_life_too() -> None:
    health = Health()
    now = silent(health)
    health.checked_progress(1, True, now)
    assert health.unavailable_reason(now) is None


# The watchdog.


def watch(health: Health, first: float, seconds: int, in_flight: int = 1, engine: bool = False) -> float:
    for second in range(seconds + 1):
        health.checked_progress(in_flight, engine, first + second)
    return first + seconds


def test_silence_with_work_in_flight_is_a_stall() -> None:
    health = Health()
    assert health.unavailable_reason(watch(health, NOW, 29)) is None
    now = watch(health, NOW + 30.0, 0)
    assert health.unavailable_reason(now) == "stalled"
    health.progressed_at = now + 0.5
    assert health.unavailable_reason(now + 0.5) is None
    assert health.unavailable_reason(watch(health, now + 1.0, 29)) is None
    assert health.unavailable_reason(watch(health, now + 31.0, 0)) == "stalled"


def test_a_long_prefill_is_no_stall_while_the_counters_of_the_engine_move() -> None:
    health = Health()
    assert health.unavailable_reason(watch(health, NOW, 300, engine=True)) is None
    now = watch(health, NOW + 301.0, 29)
    assert health.unavailable_reason(now) == "stalled", "30 s after the counters last moved"
    health.checked_progress(1, True, now + 1.0)
    assert health.unavailable_reason(now + 1.0) is None


def test_nothing_in_flight_is_no_stall() -> None:
    health = Health()
    assert health.unavailable_reason(watch(health, NOW, 600, in_flight=0)) is None
    assert health.unavailable_reason(watch(health, NOW + 601.0, 29)) is None


def test_an_answer_ends_a_stall_and_a_client_error_does_not() -> None:
    pool = pool_of_one()
    now = watch(pool[0].health, NOW, 30)
    observe(pool[0], pool, Evidence.REJECTED, now)
    assert pool[0].unavailable_reason(now) == "stalled"
    observe(pool[0], pool, Evidence.ANSWERED, now)
    assert pool[0].available(now)


@pytest.mark.parametrize("probe_first", [True, False])
def test_an_idle_and_probed_replica_is_no_longer_stalled(probe_first: bool) -> None:
    health = Health()
    now = watch(health, NOW, 30)
    health.probed(True, now + 1.0)
    assert health.unavailable_reason(now + 1.0) == "stalled", "its requests still hang"
    if probe_first:
        health.checked_progress(0, False, now + 2.0)
    else:
        health.checked_progress(0, False, now + 1.5)
        health.probed(True, now + 2.0)
    assert health.unavailable_reason(now + 2.0) is None


def test_without_probes_an_idle_replica_gets_another_chance() -> None:
    health = Health()
    now = watch(health, NOW, 30)
    assert health.unavailable_reason(watch(health, now + 1.0, 29, in_flight=0)) == "stalled"
    assert health.unavailable_reason(watch(health, now + 31.0, 0, in_flight=0)) is None


def test_what_waits_is_given_up_only_after_a_longer_silence() -> None:
    health = Health()
    health.probed(True, NOW)
    now = silent(health, NOW + 5.0)
    assert health.unavailable_reason(now) == "unresponsive"
    assert not health.silent(now)
    assert not health.silent(NOW + health.rules.stall_s - 0.1)
    assert health.silent(NOW + health.rules.stall_s)
    health.progressed_at = NOW + 20.0
    assert not health.silent(NOW + health.rules.stall_s)
