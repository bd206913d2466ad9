"""The cost policy: what it prefers, that its parts add up, and that nothing excluded or hidden decides."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.policies.cost import Cost, averages
from routing.types import InferenceRequest, Replica, View

NOW = 100.0


def replica(name: str = "r", **fields: object) -> Replica:
    return Replica(name, "pool", f"http://{name}", "sglang", **fields)  # type: ignore[arg-type]


def request(tokens: int = 1000, **fields: object) -> InferenceRequest:
    return InferenceRequest("q", "m", True, tokens * 4, prompt_tokens=tokens, **fields)  # type: ignore[arg-type]


def view(matches: dict[Replica, int] | None = None, output: float = 100.0) -> View:
    return View(NOW, Random(1), matches or {}, output)


def chosen(candidates: list[Replica], seen: View | None = None, **fields: object) -> Replica:
    return Cost(Random(3))(request(**fields), candidates, seen or view())  # type: ignore[arg-type]


def test_a_warm_replica_is_preferred_as_long_as_the_wait_there_costs_less_than_it_saves() -> None:
    warm, idle = replica("warm"), replica("idle")
    seen = view({warm: 4000})
    assert chosen([idle, warm], seen, tokens=5000) is warm
    warm.work.queue(1000, NOW)
    assert chosen([idle, warm], seen, tokens=5000) is warm
    warm.work.queue(20_000, NOW)
    assert chosen([idle, warm], seen, tokens=5000) is idle


def test_what_all_hold_does_not_count() -> None:
    one, other = replica("one"), replica("other")
    one.work.queue(500, NOW)
    assert chosen([one, other], view({one: 900, other: 900})) is other


def test_the_faster_replica_gets_more_when_both_are_equally_busy() -> None:
    slow, fast = replica("slow"), replica("fast")
    slow.speed.prefill_ms, slow.speed.step_ms = 0.12, 24.0
    for each in (slow, fast):
        each.work.begin(0, 1000, NOW)
        each.work.queued = 0
    assert chosen([slow, fast]) is fast


def test_equals_are_drawn_at_random_all_of_them() -> None:
    replicas = [replica(f"r{number}") for number in range(8)]
    policy = Cost(Random(5))
    counts = Counter(policy(request(), replicas, view()).name for _ in range(4000))
    assert set(counts) == {each.name for each in replicas}
    assert max(counts.values()) < 1.3 * 4000 / 8


def test_a_distant_replica_is_taken_when_it_is_warmer_than_it_is_far() -> None:
    near, far = replica("near"), replica("far")
    near.speed.rtt_ms, far.speed.rtt_ms = 1.0, 80.0
    assert chosen([near, far], view({far: 1000}), tokens=1200) is near  # saves 40 ms, costs 79
    assert chosen([near, far], view({far: 8000}), tokens=9000) is far


def test_loading_an_adapter_costs_its_time_and_thrash_costs_more() -> None:
    holder, free, full = replica("holder"), replica("free"), replica("full")
    holder.adapters = frozenset({"a"})
    free.adapters, free.adapter_slots = frozenset({"b"}), 4
    full.adapters, full.adapter_slots = frozenset({"b", "c"}), 2
    for each in (free, full):
        each.loadable = frozenset({"a"})
    policy, asked = Cost(Random(1)), request(adapter="a")
    costs = [policy.terms(asked, each, view(), averages([each]))["adapter"] for each in (holder, free, full)]
    assert costs == [0.0, pytest.approx(250.0), pytest.approx(500.0)]
    holder.work.queue(100, NOW)
    assert policy(asked, [full, free, holder], view()) is holder


def test_money_counts_at_the_exchange_rate_of_the_class() -> None:
    own, rented = replica("own"), replica("rented", hosted=True, input_usd_per_million=1.0, output_usd_per_million=4.0)
    own.work.queue(20_000, NOW)
    assert chosen([own, rented]) is rented
    # A request of 1,000 + 100 tokens costs 0.0014 dollars there.
    assert chosen([own, rented], ms_per_usd=2_000_000.0) is own


def test_a_replica_that_comes_back_is_given_less_at_first() -> None:
    back, old = replica("back"), replica("old")
    back.health.warm_from = NOW
    old.work.begin(0, 500, NOW)
    old.work.queued = 0
    assert chosen([back, old]) is old


def test_a_long_prompt_does_not_gather_where_few_but_waiting_requests_are() -> None:
    """Each other request there counts the wait as well as the prefill, so both have to be small."""
    few, many = replica("few"), replica("many")
    few.work.queue(20_000, NOW)
    for _ in range(3):
        many.work.begin(0, 1000, NOW)
        many.work.queued = 0
    assert chosen([few, many], tokens=8000) is many


def test_what_is_computed_twice_counts_against_the_whole_fleet_but_an_idle_one_takes_a_copy() -> None:
    holder, other, idle = replica("holder"), replica("other"), replica("idle")
    for each in (holder, other):
        for _ in range(10):
            each.work.begin(0, 500, NOW)
            each.work.queued = each.work.queued_tokens = 0
    seen = view({holder: 8000})
    holder.work.queue(8000, NOW)  # a sibling that is being computed: as quick here as with the other one
    assert chosen([holder, other], seen, tokens=8200) is holder
    assert chosen([holder, other, idle], seen, tokens=8200) is idle


def test_who_comes_behind_a_long_prompt_is_told_how_much_of_it_is_left() -> None:
    early, late = replica("early"), replica("late")
    for each, begun in ((early, NOW - 1.0), (late, NOW)):
        each.work.queue(40_000, begun)
    policy, usual = Cost(Random(1)), averages([early, late])
    waits = [policy.terms(request(), each, view(), usual)["wait"] for each in (early, late)]
    # Less than the second that has passed: the running batch had its share of it.
    assert 850.0 < waits[1] - waits[0] < 950.0


def test_a_round_trip_counts_the_more_the_busier_all_are() -> None:
    near, far = replica("near"), replica("far")
    near.speed.rtt_ms, far.speed.rtt_ms = 1.0, 80.0
    for each, running in ((near, 42), (far, 40)):
        for _ in range(running):
            each.work.begin(0, 300, NOW)
        each.work.queued = each.work.queued_tokens = 0
    assert chosen([near, far], tokens=300) is near
    for _ in range(60):
        near.work.begin(0, 300, NOW)
    near.work.queued = near.work.queued_tokens = 0
    assert chosen([near, far], tokens=300) is far


works = st.tuples(st.integers(0, 20), st.integers(0, 60_000), st.integers(0, 60), st.integers(0, 400_000))
speeds = st.tuples(st.floats(1e-3, 10), st.floats(0, 1e-4), st.floats(0.1, 200), st.floats(0, 2), st.floats(0, 1e-2))


@given(
    st.lists(st.tuples(works, speeds, st.integers(0, 9000), st.floats(0.1, 8)), min_size=1, max_size=6),
    st.integers(1, 9000),
    st.floats(1, 4000),
)
def test_the_chosen_one_is_the_cheapest_by_the_terms_that_are_shown(
    fleet: list[tuple[tuple[int, ...], tuple[float, ...], int, float]], tokens: int, output: float
) -> None:
    replicas: list[Replica] = []
    matches: dict[Replica, int] = {}
    for number, (work, speed, held, weight) in enumerate(fleet):
        one = replica(f"r{number}", weight=weight)
        one.work.queued, one.work.queued_tokens, one.work.running, one.work.running_tokens = work
        one.work.since = NOW - 0.01
        one.speed.prefill_ms, one.speed.curve, one.speed.step_ms, one.speed.request_ms, one.speed.kv_ms = speed
        one.meter.state(None, 200_000)
        matches[one] = min(held, tokens)
        replicas.append(one)
    policy, seen, asked = Cost(Random(2)), view(matches, output), request(tokens)
    best = policy(asked, replicas, seen)
    terms = {each: policy.terms(asked, each, seen, averages(replicas)) for each in replicas}
    cheapest = min(terms.values(), key=lambda each: each["cost"])
    assert terms[best]["cost"] <= (cheapest["cost"] + 0.02 * cheapest["ttft"]) * (1 + 1e-6) + 1e-6
    for each in terms.values():
        parts = sum(value for name, value in each.items() if name not in ("cost", "ttft"))
        assert parts == pytest.approx(each["cost"], rel=1e-6)
