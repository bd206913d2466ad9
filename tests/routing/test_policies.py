"""What every policy must never do, and what least-outstanding does."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from routing.credential import Credential, Credentials
from routing.filters import SOFT
from routing.health import Evidence
from routing.observing import observe
from routing.policies.balanced import LeastOutstanding
from routing.router import Router
from routing.types import Decision, InferenceRequest, Replica

NOW = 1000.0
REGIONS = ("eu-west", "us-east")


def replica(name: str = "r", **fields: object) -> Replica:
    return Replica(name, "pool", f"http://{name}", "openai", **fields)  # type: ignore[arg-type]


def request(*regions: str) -> InferenceRequest:
    return InferenceRequest("req_1", "m", stream=False, prompt_bytes=1, regions=regions)


def decide(replicas: list[Replica], *regions: str, tried: tuple[Replica, ...] = (), seed: int = 0) -> Decision:
    return Router(LeastOutstanding(Random(seed))).decide(request(*regions), replicas, NOW, tried)


UNWELL = ("", "", "", "cooling_down", "ejected", "half_open", "not_ready", "unresponsive", "stalled", "rested")


def make_unwell(one: Replica, how: str) -> None:
    """Give it the mark of that name at `NOW`; "rested" had a cool-down that is over."""
    if how in ("cooling_down", "rested"):
        one.cooldown.failed(NOW if how == "cooling_down" else NOW - 10.0)
    elif how in ("ejected", "half_open"):
        at = NOW if how == "ejected" else NOW - 11.0
        for _ in range(5):
            observe(one, [one, replica()], Evidence.FAILED, at)
    elif how == "not_ready":
        one.health.probed(False, NOW)
    elif how == "unresponsive":
        for _ in range(3):
            one.health.probe_failed(False, NOW)
    elif how == "stalled":
        one.health.checked_progress(1, False, NOW - 30.0)
        one.health.checked_progress(1, False, NOW)


def warming(name: str, elapsed_s: float = 0.0, **fields: object) -> Replica:
    """One that came back from an ejection so long before `NOW`."""
    one = replica(name, **fields)
    make_unwell(one, "ejected")
    one.health.hint_recovered(NOW - elapsed_s)
    return one


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Replica], list[Replica], tuple[str, ...]]:
    """Replicas in any state, those already tried, and the regions asked for."""
    replicas = []
    for index in range(draw(st.integers(0, 6))):
        one = replica(
            f"r{index}",
            region=draw(st.sampled_from((None, *REGIONS))),
            weight=draw(st.sampled_from((0.1, 1.0, 2.0, 3.0))),
            max_in_flight=draw(st.sampled_from((None, 1, 2))),
            ceiling=draw(st.sampled_from((None, 1, 3))),
            in_flight=draw(st.integers(0, 3)),
        )
        make_unwell(one, draw(st.sampled_from(UNWELL)))
        one.draining = draw(st.integers(0, 5)) == 0
        replicas.append(one)
    tried = [each for each in replicas if draw(st.booleans())]
    regions = draw(st.sampled_from(((), ("eu-west",), ("us-east", "eu-west"), ("mars",))))
    return replicas, tried, regions


@given(fleets(), st.integers(0, 100))
def test_never_a_tried_full_draining_or_out_of_region_replica(
    fleet: tuple[list[Replica], list[Replica], tuple[str, ...]], seed: int
) -> None:
    replicas, tried, regions = fleet
    chosen = decide(replicas, *regions, tried=tuple(tried), seed=seed).replica
    if chosen is None:
        return
    assert chosen in replicas
    assert chosen not in tried
    assert not chosen.draining
    assert chosen.max_in_flight is None or chosen.in_flight < chosen.max_in_flight
    assert not regions or chosen.region in regions


@given(fleets(), st.integers(0, 100))
def test_someone_is_chosen_whenever_someone_may_be(
    fleet: tuple[list[Replica], list[Replica], tuple[str, ...]], seed: int
) -> None:
    replicas, tried, regions = fleet
    decision = decide(replicas, *regions, tried=tuple(tried), seed=seed)
    allowed = [
        each
        for each in replicas
        if each not in tried
        and not each.draining
        and (not regions or each.region in regions)
        and (each.max_in_flight is None or each.in_flight < each.max_in_flight)
    ]
    assert (decision.replica is not None) == bool(allowed)
    healthy = [each for each in allowed if each.available(NOW)]
    if healthy:
        assert decision.replica in healthy
        assert decision.replica is not None
        load = decision.replica.in_flight / decision.replica.weight
        assert load == min(each.in_flight / each.weight for each in healthy)


@given(fleets(), st.integers(0, 100))
def test_every_replica_is_a_candidate_or_excluded_with_one_reason(
    fleet: tuple[list[Replica], list[Replica], tuple[str, ...]], seed: int
) -> None:
    replicas, tried, regions = fleet
    decision = decide(replicas, *regions, tried=tuple(tried), seed=seed)
    excluded = [each.replica for each in decision.excluded]
    assert len(excluded) == len(set(excluded))
    assert decision.replica not in excluded
    assert {each.reason for each in decision.excluded} <= {"region", "already_tried", "draining", "full"} | SOFT
    if decision.replica is None:
        assert set(excluded) == set(replicas)


def test_the_replica_with_the_fewest_in_flight_is_chosen() -> None:
    replicas = [replica("busy", in_flight=3), replica("idle", in_flight=1), replica("middle", in_flight=2)]
    decision = decide(replicas)
    assert (decision.replica, decision.reason) == (replicas[1], "least_outstanding")


def test_a_heavier_replica_takes_more() -> None:
    replicas = [replica("light", weight=1.0), replica("heavy", weight=3.0)]
    policy = Router(LeastOutstanding(Random(1)))
    for _ in range(400):
        chosen = policy.decide(request(), replicas, NOW).replica
        assert chosen is not None
        chosen.in_flight += 1
    assert replicas[0].in_flight == 100
    assert replicas[1].in_flight == 300


def test_equals_are_drawn_evenly() -> None:
    replicas = [replica(f"r{index}") for index in range(4)] + [replica("busy", in_flight=1)]
    policy = Router(LeastOutstanding(Random(2)))
    counts: Counter[str] = Counter()
    for _ in range(8000):
        chosen = policy.decide(request(), replicas, NOW).replica
        assert chosen is not None
        counts[chosen.name] += 1
    assert set(counts) == {"r0", "r1", "r2", "r3"}
    # Chi-squared with 3 degrees of freedom: 16.3 is passed once in a thousand; the seed makes it repeatable.
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 16.3


def test_the_first_choices_of_a_burst_differ_between_workers() -> None:
    replicas = [replica(f"r{index}") for index in range(4)]
    firsts = {decide(replicas, seed=seed).replica for seed in range(50)}
    assert firsts == set(replicas)


def test_one_that_is_cooling_down_is_passed_over() -> None:
    resting, busy = replica("resting"), replica("busy", in_flight=9)
    resting.cooldown.failed(NOW)
    decision = decide([resting, busy])
    assert decision.replica is busy
    assert [(each.replica, each.reason) for each in decision.excluded] == [(resting, "cooling_down")]


def test_when_all_are_cooling_down_the_cool_downs_are_ignored() -> None:
    replicas = [replica("a", in_flight=1), replica("b"), replica("gone")]
    for each in replicas:
        each.cooldown.failed(NOW)
    decision = decide(replicas, tried=(replicas[2],))
    assert (decision.replica, decision.reason) == (replicas[1], "all_cooling_down")
    assert [each.reason for each in decision.excluded] == ["already_tried"]


def test_when_all_are_unwell_in_different_ways_any_of_them_may_be_chosen() -> None:
    replicas = [replica(how) for how in UNWELL[3:9]]
    for each in replicas:
        make_unwell(each, each.name)
        assert each.unavailable_reason(NOW) == each.name
    decisions = [decide(replicas, seed=seed) for seed in range(100)]
    assert {each.reason for each in decisions} == {"all_unhealthy"}
    assert {each.replica for each in decisions} == set(replicas)
    assert decisions[0].excluded == []


def test_panic_never_uses_a_refused_key_or_a_draining_replica() -> None:
    locked, leaving = replica("locked", credential=Credentials([Credential()])), replica("leaving", draining=True)
    assert locked.credential is not None
    locked.credential.refused(NOW)
    decision = decide([locked, leaving])
    assert (decision.replica, decision.reason) == (None, "none_available")
    assert [each.reason for each in decision.excluded] == ["credential_refused", "draining"]


def test_idle_replicas_are_drawn_by_weight() -> None:
    replicas = [replica("light"), replica("heavy", weight=3.0)]
    policy = Router(LeastOutstanding(Random(3)))
    heavy = sum(policy.decide(request(), replicas, NOW).replica is replicas[1] for _ in range(4000))
    assert 2900 < heavy < 3100


def test_a_warming_replica_gets_a_tenth_of_what_it_would_when_all_are_idle() -> None:
    replicas = [warming("back"), *(replica(f"r{index}") for index in range(3))]
    policy = Router(LeastOutstanding(Random(4)))
    counts = Counter(policy.decide(request(), replicas, NOW).replica for _ in range(40_000))
    assert 900 < counts[replicas[0]] < 1100  # 40,000 / 4 / 10


def test_a_warming_replica_holds_its_share_of_what_is_in_flight() -> None:
    replicas = [warming("back", 20.0), *(replica(f"r{index}") for index in range(3))]
    policy = Router(LeastOutstanding(Random(5)))
    for _ in range(3400):
        chosen = policy.decide(request(), replicas, NOW).replica
        assert chosen is not None
        chosen.in_flight += 1
    assert abs(replicas[0].in_flight - 400) <= 2  # 0.4 of 3.4


def test_when_all_are_warming_alike_nothing_changes() -> None:
    replicas = [warming(f"r{index}") for index in range(4)]
    policy = Router(LeastOutstanding(Random(6)))
    for _ in range(400):
        chosen = policy.decide(request(), replicas, NOW).replica
        assert chosen is not None
        chosen.in_flight += 1
    assert [each.in_flight for each in replicas] == [100] * 4


def test_a_warming_replica_that_is_the_only_one_left_takes_everything() -> None:
    alone, full = warming("alone"), replica("full", max_in_flight=1, in_flight=1)
    assert all(decide([alone, full], seed=seed).replica is alone for seed in range(50))


def test_replicas_at_their_ceiling_are_left_alone_while_another_has_room() -> None:
    busy, free = replica("busy", ceiling=2, in_flight=2), replica("free", in_flight=9)
    decision = decide([busy, free])
    assert (decision.replica, decision.reason) == (free, "least_outstanding")
    assert [(each.replica, each.reason) for each in decision.excluded] == [(busy, "full")]


def test_a_replica_beyond_its_ceiling_is_better_than_a_refusal_and_than_one_under_suspicion() -> None:
    # A request that may only go to one replica, or whose replica was ejected since it left the queue.
    busier, busy = replica("busier", ceiling=2, in_flight=5), replica("busy", ceiling=2, in_flight=3)
    ill, full = replica("ill"), replica("full", max_in_flight=1, in_flight=1)
    ill.cooldown.failed(NOW)
    decision = decide([busier, ill, busy, full])
    assert (decision.replica, decision.reason) == (busy, "over_capacity")
    assert [each.replica for each in decision.excluded] == [busier, ill, full]


def test_panic_never_reaches_outside_the_region() -> None:
    near, far = replica("near", region="eu-west"), replica("far", region="us-east")
    near.cooldown.failed(NOW)
    assert decide([near, far], "eu-west").replica is near
    assert decide([near, far], "eu-west", tried=(near,)).replica is None


def test_a_replica_that_is_full_and_cooling_down_stays_excluded_in_panic() -> None:
    full = replica("full", max_in_flight=1, in_flight=1)
    full.cooldown.failed(NOW)
    assert decide([full]).replica is None


def test_an_unknown_region_of_a_replica_matches_no_region_asked_for() -> None:
    decision = decide([replica("somewhere")], "eu-west")
    assert decision.replica is None
    assert [each.reason for each in decision.excluded] == ["region"]


def test_no_replicas_at_all() -> None:
    assert decide([]) == Decision(None, "none_available", [])
