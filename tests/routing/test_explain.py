"""Explanations say what is decided, why, and enough to decide it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from threading import Lock
from typing import Any

import pytest

from routing.explain import UNDECIDED, explain, rehearsal, replay
from routing.load import Load
from routing.policies import POLICY_NAMES, make_policy
from routing.policies.cost import Cost
from routing.prefix import Prefix
from routing.router import Router
from routing.types import InferenceRequest, Replica, View

PROMPT = Prefix([11, 12], [512, 1024], 1100, [(2**64 - 19, 1100)], 0.25)
OTHER = Prefix([21, 22], [512, 1024], 1100, [(29, 1100)], 0.25)


def replica(name: str, **fields: object) -> Replica:
    return Replica(name, "pool", f"http://{name}", "sglang", **fields)  # type: ignore[arg-type]


def request(**fields: Any) -> InferenceRequest:
    return InferenceRequest("q", "m", True, 1100, **{"prompt_tokens": 275, "prefix": PROMPT, **fields})


def scene(chooser: str = "cost") -> tuple[Router, list[Replica]]:
    fleet = [replica("warm"), replica("cold"), replica("far", region="us"), replica("drained", draining=True)]
    router = Router(make_policy(chooser, Random(1)), rng=Random(2))
    router.dispatched(request(), fleet[0], 1.0)
    router.first_token(request(), fleet[0], 1.1)
    fleet[1].work.queue(400, 1.0)
    fleet[2].speed.rtt_ms = 80.0
    fleet[0].health.warm_from = -20.0
    fleet[1].load = Load(0.5, running=3, waiting=1, waiting_uncached_tokens=90, kv_use=0.4)
    return router, fleet


def through_json(told: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(told))
    return read


def test_candidates_stand_in_order_of_cost_with_every_term_and_the_excluded_with_their_reasons() -> None:
    router, fleet = scene()
    told = explain(router, request(), fleet, 2.0)
    names = [each["replica"] for each in told["candidates"]]
    costs = [each["cost_ms"] for each in told["candidates"]]
    assert set(names) == {"warm", "cold", "far"}
    assert costs == sorted(costs)
    assert names[0] == told["replica"]
    assert told["excluded"] == [{"replica": "drained", "region": None, "reason": "draining"}]
    warm = next(each for each in told["candidates"] if each["replica"] == "warm")
    assert warm["cached_tokens"] == 275
    assert told["predicted_cached_tokens"] == told["candidates"][0]["cached_tokens"]
    for each in told["candidates"]:
        assert sum(each["terms_ms"].values()) == pytest.approx(each["cost_ms"], abs=0.02)
    assert {"round_trip", "wait", "prefill", "decode", "others"} <= set(warm["terms_ms"])


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_explaining_changes_nothing(policy: str) -> None:
    """Two gateways with the same history go on alike, though one of them was asked in between."""
    (asked, its_fleet), (other, other_fleet) = scene(policy), scene(policy)
    before = [each.work.own for each in its_fleet], asked.view(request(), 2.0).matches
    for prefix in (PROMPT, OTHER):
        for _ in range(5):
            explain(asked, request(prefix=prefix, session="t\x00s"), its_fleet, 2.0, seed=5)
    assert ([each.work.own for each in its_fleet], asked.view(request(), 2.0).matches) == before
    for prefix in (OTHER, PROMPT) * 10:
        there, here = (
            router.decide(request(prefix=prefix), fleet, 2.5)
            for router, fleet in ((asked, its_fleet), (other, other_fleet))
        )
        assert there.replica is not None
        assert here.replica is not None
        assert there.replica.name == here.replica.name


@pytest.mark.parametrize("policy", ["round_robin", "sglang_cache_aware", "smg_least_load", "consistent_hash"])
def test_a_policy_with_state_is_asked_with_that_state(policy: str) -> None:
    router, fleet = scene(policy)
    for each in fleet[:2]:
        each.work.queue(100, 1.5)
    for _ in range(20):
        told = explain(router, request(), fleet, 2.0)
        decision = router.decide(request(), fleet, 2.0)
        assert decision.replica is not None
        # Equals are drawn at random by one of these, and all the others have none here.
        assert told["replica"] == decision.replica.name or policy == "smg_least_load"


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_a_kept_explanation_decides_the_same_again_after_a_way_through_json(policy: str, seed: int) -> None:
    router, fleet = scene(policy)
    asked = request(session="acme\x00thread 7", adapter=None)
    router.state.sessions["acme\x00thread 7"] = fleet[2]
    told = through_json(explain(router, asked, fleet, 2.0, seed=seed))
    again = replay(told, make_policy)
    assert again["replica"] == told["replica"]
    assert again["candidates"] == told["candidates"]
    assert again["predicted_ttft_ms"] == pytest.approx(told["predicted_ttft_ms"])
    assert again["reason"] == told["reason"]
    assert "thread 7" not in json.dumps(told)


def test_a_kept_explanation_can_be_decided_by_another_policy() -> None:
    router, fleet = scene()
    told = explain(router, request(), fleet, 2.0)
    assert replay(told, make_policy, "lmetric")["policy"] == "lmetric"
    assert replay(told, make_policy, "lmetric")["near_ties"] == []


def test_near_ties_are_named_and_chance_decides_between_them() -> None:
    fleet = [replica(name) for name in ("one", "two", "busy")]
    fleet[2].work.queue(9000, 1.0)
    router = Router(Cost(Random(1)))
    told = [explain(router, request(), fleet, 2.0, seed=seed) for seed in range(30)]
    assert {tuple(sorted(each["near_ties"])) for each in told} == {("one", "two")}
    assert {each["replica"] for each in told} == {"one", "two"}
    assert all(replay(through_json(each), make_policy)["replica"] == each["replica"] for each in told)


def test_marks_that_are_put_aside_for_want_of_anybody_else_are_shown() -> None:
    fleet = [replica("one"), replica("two"), replica("drained", draining=True)]
    for each in fleet[:2]:
        each.cooldown.failed(1.9)
    told = explain(Router(Cost(Random(1))), request(), fleet, 2.0)
    assert (told["reason"], told["replica"] is None) == ("all_cooling_down", False)
    assert {each["despite"] for each in told["candidates"]} == {"cooling_down"}
    assert [each["replica"] for each in told["excluded"]] == ["drained"]
    assert replay(through_json(told), make_policy)["reason"] == "all_cooling_down"


def test_those_that_merely_have_enough_to_do_are_candidates_when_all_have() -> None:
    fleet = [replica("one", ceiling=1, in_flight=1), replica("two", ceiling=1, in_flight=1)]
    told = explain(Router(Cost(Random(1))), request(), fleet, 2.0)
    assert (told["reason"], len(told["candidates"]), told["excluded"]) == ("over_capacity", 2, [])
    assert replay(through_json(told), make_policy)["replica"] == told["replica"]


def test_nobody_to_choose_from_is_explained_too() -> None:
    told = explain(Router(Cost(Random(1))), request(), [replica("one", draining=True)], 2.0)
    assert (told["replica"], told["reason"], told["candidates"]) == (None, "none_available", [])
    again = replay(through_json(told), make_policy)
    assert (again["replica"], again["reason"]) == (None, "none_available")


def test_adapters_are_weighed_the_same_again() -> None:
    fleet = [replica(name, adapter_slots=2, adapters=frozenset({"other"})) for name in ("holds", "can", "loads", "not")]
    fleet[0].adapters = frozenset({"a"})
    fleet[0].work.queue(9000, 1.0)
    fleet[1].loadable = fleet[2].loadable = frozenset({"a"})
    fleet[2].loading = frozenset({"a"})
    router = Router(Cost(Random(1)))
    told = through_json(explain(router, request(adapter="a"), fleet, 2.0))
    assert replay(told, make_policy)["candidates"] == told["candidates"]
    assert {each["replica"]: each["reason"] for each in told["excluded"]}["not"] == "adapter"


class Alternating:
    """A user's own policy, with a state."""

    def __init__(self, rng: Random) -> None:
        self.turn = 0

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        self.turn += 1
        view.reason = f"turn {self.turn % 2}"
        return candidates[self.turn % 2]


def test_a_users_own_policy_is_rehearsed_as_well() -> None:
    chooser, (_, fleet) = make_policy("tests.routing.test_explain:Alternating", Random(1)), scene()
    router = Router(chooser)
    for _ in range(5):
        told = explain(router, request(), fleet, 2.0)
        assert explain(router, request(), fleet, 2.0)["reason"] == told["reason"]
        decision = router.decide(request(), fleet, 2.0)
        assert decision.replica is not None
        assert (told["replica"], told["reason"]) == (decision.replica.name, decision.reason)


class Locked:
    """A policy that cannot be copied."""

    name = "locked"
    wants_prefix = True

    def __init__(self) -> None:
        self.lock = Lock()
        self.calls = 0

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        self.calls += 1
        return candidates[0]


def test_a_policy_that_cannot_be_copied_is_not_asked() -> None:
    locked, (_, fleet) = Locked(), scene()
    assert rehearsal(locked, 1) is None
    told = explain(Router(locked), request(), fleet, 2.0)
    assert (told["replica"], told["reason"], locked.calls) == (None, UNDECIDED, 0)
    assert len(told["candidates"]) == 3
    assert replay(through_json(told), make_policy, "cost")["replica"] is not None


class Counting(Locked):
    """One that knows how to be rehearsed."""

    def rehearsal(self) -> Counting:
        twin = Counting()
        twin.calls = 100
        return twin


def test_a_policys_own_way_to_be_rehearsed_is_used() -> None:
    counting, (_, fleet) = Counting(), scene()
    assert explain(Router(counting), request(), fleet, 2.0)["replica"] == "warm"
    assert counting.calls == 0


KEPT = explain(*scene()[:1], request(), scene()[1], 2.0)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"version": 99},
        {"version": 1},
        {"version": 1, "policy": "cost", "state": 3},
        {**KEPT, "seed": None},
        {**KEPT, "session_replica": "nobody"},
        {**KEPT, "candidates": [{"replica": "warm"}]},
        {**KEPT, "candidates": [{}]},
        {**KEPT, "request": {**KEPT["request"], "prefix": {}}},
        {**KEPT, "request": {**KEPT["request"], "expected_output_tokens": "many"}},
        {**KEPT, "state": [{"name": "warm"}]},
        {**KEPT, "state": None},
    ],
)
def test_what_is_no_explanation_is_refused_in_words(broken: Any) -> None:
    with pytest.raises(ValueError, match="no explanation"):
        replay(broken, make_policy)


def test_the_rule_to_stay_where_an_adapter_is_loaded_holds_in_an_explanation_too() -> None:
    holds, could = replica("holds", adapters=frozenset({"a"})), replica("could", adapters=frozenset())
    for each in (holds, could):
        each.loadable, each.adapter_slots = frozenset({"a"}), 4
    holds.in_flight = 9
    router = Router(make_policy("least_outstanding", Random(1)), rng=Random(2), stay_where_loaded=True)
    asked = request(adapter="a")
    assert router.decide(asked, [holds, could], 1.0).replica is holds
    told = explain(router, asked, [holds, could], 1.0)
    assert told["replica"] == "holds"
    assert told["excluded"] == [{"replica": "could", "region": None, "reason": "adapter_elsewhere"}]
