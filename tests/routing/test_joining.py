"""A replica that is new to a pool at work, or begins anew: held back until it is ready and warm, then slow start."""

from __future__ import annotations

from random import Random

import pytest

from routing.filters import SOFT
from routing.health import Evidence, Health, HealthState, Rules
from routing.observing import observe
from routing.policies.balanced import LeastOutstanding
from routing.router import ALL_UNHEALTHY, NEW_OR_CORDONED, Router
from routing.types import InferenceRequest, Replica

NOW = 1000.0
RULES = Rules(slow_start_s=60.0)
REQUEST = InferenceRequest("req_1", "m", stream=True, prompt_bytes=1)


def replica(name: str = "new") -> Replica:
    return Replica(name, "p", f"http://{name}", "sglang", health=Health(RULES))


def joined(*, until_ready: bool = True, warm_s: float = 30.0) -> Replica:
    new = replica()
    new.health.join(NOW, until_ready=until_ready, warm_s=warm_s)
    return new


def router() -> Router:
    return Router(LeastOutstanding(Random(1)))


def test_it_gets_nothing_before_the_first_probe_that_says_yes() -> None:
    new, old = joined(), replica("old")
    assert new.unavailable_reason(NOW + 3600.0) == "joining"
    assert new.health.state(NOW) is HealthState.JOINING
    for number in range(10):
        old.in_flight = number
        assert router().decide(REQUEST, [new, old], NOW).replica is old
    new.health.probed(False, NOW + 1.0)
    assert new.unavailable_reason(NOW + 1.0) == "not_ready"
    new.health.probed(True, NOW + 2.0)
    assert new.unavailable_reason(NOW + 2.0) == "warming"


def test_once_ready_it_is_held_back_until_it_is_warm_and_then_begins_with_a_small_share() -> None:
    new = joined()
    new.health.probed(True, NOW + 10.0)
    assert new.health.warming(NOW + 20.0)
    assert new.health.share(NOW + 20.0) == pytest.approx(0.1)
    new.health.warmed(NOW + 20.0)
    assert new.unavailable_reason(NOW + 20.0) is None
    assert new.health.share(NOW + 20.0) == pytest.approx(0.1)
    assert new.health.share(NOW + 50.0) == pytest.approx(0.55)
    assert new.health.share(NOW + 80.0) == 1.0
    assert new.health.state(NOW + 50.0) is HealthState.WARMING


def test_the_time_for_warming_ends_by_itself() -> None:
    new = joined()
    new.health.probed(True, NOW + 10.0)
    assert new.unavailable_reason(NOW + 39.9) == "warming"
    assert new.unavailable_reason(NOW + 40.0) is None
    assert new.health.share(NOW + 40.0) == pytest.approx(0.1)
    assert new.health.share(NOW + 70.0) == pytest.approx(0.55)


def test_after_an_answer_it_is_as_cheap_to_look_at_as_any() -> None:
    new = joined()
    new.health.probed(True, NOW)
    new.health.warmed(NOW + 1.0)
    observe(new, [new], Evidence.ANSWERED, NOW + 2.0)
    assert new.health.calm
    late = joined()
    late.health.probed(True, NOW)
    observe(late, [late], Evidence.ANSWERED, NOW + 31.0)
    assert late.health.calm


def test_without_probes_and_without_warming_slow_start_begins_at_once() -> None:
    new = joined(until_ready=False, warm_s=0.0)
    assert new.unavailable_reason(NOW) is None
    assert new.health.share(NOW) == pytest.approx(0.1)
    assert joined(until_ready=False).unavailable_reason(NOW) == "warming"


def test_without_slow_start_it_has_its_whole_share_at_once() -> None:
    new = Replica("new", "p", "http://new", "sglang", health=Health(Rules(slow_start_s=0.0)))
    new.health.join(NOW, until_ready=True, warm_s=30.0)
    new.health.probed(True, NOW)
    assert new.health.share(NOW + 1.0) == 1.0


def test_word_that_it_is_warm_may_come_before_the_probe() -> None:
    """Through the store both come from the worker that looks after it; a worker that reads late has them at once."""
    new = joined()
    new.health.warmed(NOW + 5.0)
    assert new.unavailable_reason(NOW + 5.0) is None


def test_it_is_used_when_nobody_else_is_left_and_shows_itself_ready() -> None:
    new, old = joined(), replica("old")
    old.draining = True
    decision = router().decide(REQUEST, [new, old], NOW)
    assert (decision.replica, decision.reason) == (new, ALL_UNHEALTHY)
    observe(new, [new, old], Evidence.ANSWERED, NOW + 1.0)
    assert new.unavailable_reason(NOW + 1.0) == "warming"
    decision = router().decide(REQUEST, [new, old], NOW + 1.0)
    assert (decision.replica, decision.reason) == (new, NEW_OR_CORDONED)


def test_one_that_is_being_warmed_is_asked_before_one_that_is_ejected() -> None:
    new, old = joined(until_ready=False), replica("old")
    for _ in range(5):
        observe(old, [new, old], Evidence.FAILED, NOW)
    assert old.unavailable_reason(NOW) == "ejected"
    assert router().decide(REQUEST, [old, new], NOW).replica is new
    assert router().fits(REQUEST, [old, new], NOW)


def test_one_that_has_begun_anew_is_warmed_again() -> None:
    old = replica("old")
    old.health.begin_anew(NOW, 30.0)
    assert old.unavailable_reason(NOW + 29.0) == "warming"
    assert old.unavailable_reason(NOW + 30.0) is None
    old.health.begin_anew(NOW + 40.0, 30.0)
    old.health.warmed(NOW + 41.0)
    assert old.health.share(NOW + 41.0) == pytest.approx(0.1)


def test_beginning_anew_changes_nothing_where_nothing_is_warmed() -> None:
    old = replica("old")
    old.health.begin_anew(NOW, 0.0)
    assert (old.unavailable_reason(NOW), old.health.share(NOW)) == (None, 1.0)


def test_being_told_that_it_is_warm_does_not_slow_one_that_was_not_held_back() -> None:
    old = replica("old")
    old.health.warmed(NOW)
    assert old.health.share(NOW) == 1.0


def test_refused_probes_of_a_process_that_starts_are_no_reason_to_wait_longer() -> None:
    new = joined()
    for second in range(20):
        new.health.probe_failed(True, NOW + second)
    assert new.unavailable_reason(NOW + 19.0) == "cooling_down"
    new.health.probed(True, NOW + 20.0)
    assert new.unavailable_reason(NOW + 20.0) == "warming"
    new.health.warmed(NOW + 21.0)
    assert new.available(NOW + 21.0)


def test_probes_that_are_turned_off_hold_nobody_back() -> None:
    new = joined()
    new.health.forget_probes()
    assert new.available(NOW)


def test_the_reason_is_a_suspicion_only() -> None:
    assert "joining" in SOFT
    assert "warming" not in SOFT
