from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from routing.scaling import Demand, Recommendation, Rules, Scaler

RULES = Rules(max=50, usd_per_hour=4.0)
SERVICE_S = 10.0
CAPACITY = 32.0


def demand(at_s: float, per_s: float, ready: int, **others: object) -> Demand:
    """An engine that takes ten seconds a request, whatever else it does."""
    held = min(per_s * SERVICE_S, CAPACITY * ready)
    served = min(per_s, CAPACITY * ready / SERVICE_S)
    usual = Demand(
        at_s=at_s,
        arrivals_per_s=per_s,
        served_per_s=served,
        in_flight=int(held),
        replicas_ready=ready,
        capacity_requests=CAPACITY,
    )
    return replace(usual, **others)  # type: ignore[arg-type]


def run(scaler: Scaler, per_s: float, begin_s: float, seconds: float, count: int) -> list[Recommendation]:
    """Replicas come and go at once."""
    said = []
    at = begin_s
    while at < begin_s + seconds:
        said.append(scaler.decide(demand(at, per_s, count), at))
        count = said[-1].count
        at += 5.0
    return said


def test_the_count_is_the_rate_over_what_replicas_serve_at_their_target() -> None:
    # 16 in each of eight for 10 s. Not seen full yet, W is taken to double from empty to full:
    # 10 + 16 * 10 / 48 = 13.3 s among 32, so one serves 2.4/s, and half of that is to be used: 12.8 / 1.2 = 10.7.
    said = Scaler(replace(RULES, target_use=0.5)).decide(demand(0.0, 12.8, 8), 0.0)
    assert (said.count, said.current, said.usd_per_hour) == (11, 8, 44.0)
    assert said.reasons[0].kind == "arrivals"
    assert said.reasons[0].text == (
        "12.80 requests/s come; a replica serves 2.40 (32 at once for 13.3 s each) and is to be used to 50%"
    )


def test_a_step_is_followed_within_a_minute() -> None:
    scaler = Scaler(RULES)
    run(scaler, 1.0, 0.0, 600.0, 1)
    said = run(scaler, 40.0, 600.0, 60.0, 1)
    assert said[-1].count > 10 * said[0].current
    assert said[0].count <= 5, "four at once at the first"


def test_a_step_is_not_taken_for_a_trend() -> None:
    scaler = Scaler(RULES)
    run(scaler, 2.0, 0.0, 600.0, 2)
    said = run(scaler, 20.0, 600.0, 600.0, 2)
    assert max(each.forecast for each in said) == pytest.approx(20.0, rel=0.01)


def test_a_ramp_is_foreseen() -> None:
    scaler = Scaler(RULES)
    count, per_s, said = 2, 5.0, scaler.decide(demand(0.0, 5.0, 2), 0.0)
    for step in range(1, 240):
        per_s = 5.0 + 0.02 * step * 5.0
        said = scaler.decide(demand(step * 5.0, per_s, count), step * 5.0)
        count = said.count
    assert said.reasons[0].kind == "trend"
    assert said.forecast == pytest.approx(per_s + 0.02 * 300.0, rel=0.15)


def test_what_is_starting_is_not_ordered_again() -> None:
    scaler = Scaler(RULES)
    run(scaler, 2.0, 0.0, 300.0, 2)
    counts: list[int] = []
    for step in range(60):
        at = 300.0 + 5.0 * step
        ordered = counts[-1] if counts else 2
        counts.append(scaler.decide(demand(at, 6.0, 2, replicas_starting=ordered - 2, waiting=0), at).count)
    assert counts[-1] == counts[20], "the same is ordered while it starts"
    assert counts[-1] <= 8


def test_replicas_that_take_no_requests_are_replaced() -> None:
    healthy = Scaler(RULES).decide(demand(0.0, 18.0, 6), 0.0)
    said = Scaler(RULES).decide(demand(0.0, 18.0, 6, replicas_unhealthy=2), 0.0)
    assert said.count == healthy.count + 2
    assert any(reason.kind == "replace" for reason in said.reasons)


def test_a_fleet_that_is_down_altogether_is_left_alone() -> None:
    scaler = Scaler(RULES)
    said = scaler.decide(demand(0.0, 9.0, 0, replicas_unhealthy=6), 0.0)
    assert said.count == 6
    assert said.limited_by == "unknown"


@pytest.mark.parametrize("missing", ["nothing", "stale", "incomplete"])
def test_nothing_goes_while_too_little_is_known(missing: str) -> None:
    scaler = Scaler(RULES)
    run(scaler, 30.0, 0.0, 900.0, 20)
    said = run(scaler, 30.0, 900.0, 5.0, 20)[-1]
    before = said.count
    for step in range(600):
        at = 905.0 + 5.0 * step
        seen = demand(at, 0.0, before, complete=missing != "incomplete")
        told = None if missing == "nothing" else replace(seen, at_s=100.0) if missing == "stale" else seen
        said = scaler.decide(told, at)
        assert said.count >= before
    assert said.reasons[0].kind == "unknown"


def test_what_goes_goes_slowly_and_in_the_end_to_the_floor() -> None:
    scaler = Scaler(RULES)
    run(scaler, 40.0, 0.0, 600.0, 30)
    high = run(scaler, 40.0, 600.0, 5.0, 30)[-1].count
    said = run(scaler, 0.5, 605.0, 2400.0, high)
    first = next(step for step, each in enumerate(said) if each.count < high)
    assert 5.0 * first >= RULES.down_after_s
    assert said[-1].count == 1
    changes = [step for step in range(1, len(said)) if said[step].count != said[step - 1].count]
    assert all(5.0 * (late - early) >= 60.0 for early, late in pairwise(changes))


def test_the_last_one_goes_only_when_nobody_has_asked_for_long() -> None:
    scaler = Scaler(replace(RULES, min=0))
    run(scaler, 0.01, 0.0, 600.0, 1)
    said = run(scaler, 0.0, 600.0, 1500.0, 1)
    gone = next(step for step, each in enumerate(said) if each.count == 0)
    assert 5.0 * gone >= RULES.down_after_s
    asked = scaler.decide(demand(2100.0, 0.2, 0, waiting=1, in_flight=0), 2100.0)
    assert asked.count >= 1


def test_a_pool_that_is_asked_at_zero_gets_one() -> None:
    said = Scaler(replace(RULES, min=0)).decide(demand(0.0, 0.0, 0, waiting=1), 0.0)
    assert (said.count, said.reasons[0].kind) == (1, "from_zero")
    assert "1 wait" in said.reasons[0].text


def test_what_waits_asks_for_more_than_what_comes() -> None:
    scaler = Scaler(RULES)
    run(scaler, 3.0, 0.0, 300.0, 3)
    said = scaler.decide(demand(300.0, 3.0, 3, in_flight=96, waiting=3000, queue_wait_p90_s=30.0), 300.0)
    queue = next(each for each in said.reasons if each.kind == "queue")
    assert queue.wanted > 4
    assert said.reasons[0].kind == "queue"
    assert "3000 wait" in queue.text


def test_first_tokens_that_are_late_ask_for_more_where_load_makes_them_late() -> None:
    late = scaled(demand(0.0, 6.0, 4, in_flight=100, ttft_p90_ms=3400.0), 40)
    assert next(each for each in late.reasons if each.kind == "ttft").wanted == 7
    idle = scaled(demand(0.0, 0.6, 4, in_flight=6, ttft_p90_ms=9000.0), 40)
    assert idle.count == 4
    assert not any(each.kind == "ttft" for each in idle.reasons), "prompts may just be long"


def scaled(seen: Demand, periods: int) -> Recommendation:
    """The last of so many periods that are all alike."""
    scaler = Scaler(replace(RULES, max=8))
    return [scaler.decide(replace(seen, at_s=5.0 * step), 5.0 * step) for step in range(periods)][-1]


def test_a_kv_cache_that_fills_up_asks_for_more() -> None:
    said = Scaler(RULES).decide(demand(0.0, 1.0, 10, in_flight=40, capacity_requests=None, kv_use=0.99), 0.0)
    kv = next(each for each in said.reasons if each.kind == "kv")
    assert kv.wanted == 12
    assert "99%" in kv.text


def test_the_lead_time_is_what_most_starts_took() -> None:
    scaler = Scaler(RULES)
    assert scaler.lead_time_s == 300.0
    scaler.learned_start(100.0)
    scaler.learned_start(120.0)
    assert scaler.lead_time_s == 300.0
    for took in (140.0, 200.0, 900.0):
        scaler.learned_start(took)
    assert scaler.lead_time_s == 200.0


def test_money_is_a_ceiling() -> None:
    scaler = Scaler(Rules(max=50, usd_per_hour=4.0, max_usd_per_hour=21.0))
    said = run(scaler, 100.0, 0.0, 600.0, 1)[-1]
    assert (said.count, said.limited_by, said.usd_per_hour) == (5, "budget", 20.0)


def test_what_is_rented_is_compared_with_a_replica() -> None:
    said = Scaler(RULES).decide(demand(0.0, 2.0, 2, spilled_per_s=0.3, spill_usd_per_hour=3.5), 0.0)
    assert "cheaper than one more replica for 4.00" in next(each.text for each in said.reasons if each.kind == "spill")


def test_an_order_that_is_not_carried_out_stands() -> None:
    scaler = Scaler(RULES)
    run(scaler, 1.0, 0.0, 600.0, 1)
    counts = [scaler.decide(demand(at, 20.0, 1), at).count for at in (600.0 + 5.0 * step for step in range(110))]
    assert counts == sorted(counts)
    assert counts[-1] > 5


def test_steps_up_wait_for_the_cool_down() -> None:
    scaler = Scaler(replace(RULES, up_cool_down_s=120.0))
    run(scaler, 1.0, 0.0, 600.0, 1)
    said = run(scaler, 40.0, 600.0, 600.0, 1)
    ups = [5.0 * step for step in range(1, len(said)) if said[step].count > said[step - 1].count]
    assert all(late - early >= 120.0 for early, late in pairwise(ups))
    assert any(each.limited_by == "up_cool_down" for each in said)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"max": 2, "min": 3}, "min 3 and max 2"),
        ({"max": 8, "min": 4, "usd_per_hour": 5.0, "max_usd_per_hour": 19.0}, "does not pay for the 4 replicas"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(rules: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules(**rules)  # type: ignore[arg-type]


def test_what_nobody_has_told_yet_is_not_taken_for_what_there_is() -> None:
    scaler = Scaler(replace(RULES, min=1))
    assert scaler.decide(None, 0.0).count == 1
    said = run(scaler, 8.0, 5.0, 300.0, 8)
    assert {each.count for each in said} == {8}, "none of the eight goes before it was seen for a while"
