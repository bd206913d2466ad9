"""Whole runs: nothing is lost, equal seeds give equal runs, and policies rank as has been published."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random

import pytest

from loadtests.simulator import generators
from loadtests.simulator.capacity import Reference, capacity_of
from loadtests.simulator.engine import Constants
from loadtests.simulator.fleet import Fault, Fleet, Seat, engine_named, slower
from loadtests.simulator.metrics import figures
from loadtests.simulator.scenarios import GENERATED
from loadtests.simulator.simulation import MakeChooser, Result, Simulation
from loadtests.simulator.traffic import Workload
from routing.policies import POLICY_NAMES, make_policy
from routing.types import Chooser

GPU = engine_named("8b-gpu")


def policy(name: str) -> MakeChooser:
    return partial(_make, name)


def _make(name: str, rng: Random) -> Chooser:
    return make_policy(name, rng)


def fleet(replicas: int = 4, constants: Constants = GPU) -> Fleet:
    return Fleet(tuple(Seat(constants) for _ in range(replicas)))


def check_books(result: Result, workload: Workload) -> None:
    """Every request ended once, and whatever was counted has been counted back."""
    assert [each.job.index for each in result.outcomes] == [job.index for job in workload.jobs]
    for each in result.outcomes:
        assert each.end >= each.sent >= each.job.at - 1e-9
        assert each.failed or each.sent < each.first <= each.end
        assert each.cached < each.job.prompt_tokens
    for engine in result.engines:
        assert (engine.private, engine.cache.locked, engine.context, engine.running) == (0, 0, 0, 0)
        assert not engine.waiting
        assert engine.cache.tokens <= engine.constants.kv_tokens
    for gateway in result.gateways:
        assert not gateway.router.state.flights
        for replica in gateway.replicas:
            own = replica.work.own
            assert (replica.in_flight, own.queued, own.queued_tokens, own.running, own.running_tokens) == (0,) * 5


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_every_request_of_every_workload_ends_once_and_every_token_is_computed_or_cached(name: str) -> None:
    scenario = GENERATED[name]
    workload = scenario.source(300, 20.0, Random(1))
    result = Simulation(workload, scenario.build(4), policy("least_outstanding"), 1).run()
    check_books(result, workload)
    assert not any(each.failed for each in result.outcomes)
    if not sum(engine.preemptions for engine in result.engines):
        computed = sum(engine.prefilled_tokens for engine in result.engines)
        assert computed == sum(each.job.prompt_tokens - each.cached for each in result.outcomes)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_runs(name: str) -> None:
    workload = generators.chats()(200, 20.0, Random(1))
    result = Simulation(workload, fleet(), policy(name), 1).run()
    check_books(result, workload)
    assert not any(each.failed for each in result.outcomes)


def test_jumps_change_no_outcome() -> None:
    workload = generators.chats()(400, 30.0, Random(2))
    # Decided by turns, so that a rounding error cannot send a request elsewhere.
    runs = [Simulation(workload, fleet(), policy("round_robin"), 1, jump=jump).run() for jump in (True, False)]
    first, second = ([(each.first, each.end, each.cached) for each in run.outcomes] for run in runs)
    for mine, other in zip(first, second, strict=True):
        assert mine == pytest.approx(other)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    def ends(arrivals: int, choices: int) -> list[float]:
        workload = generators.chats()(300, 30.0, Random(arrivals))
        return [each.end for each in Simulation(workload, fleet(), policy("cost"), choices).run().outcomes]

    assert ends(1, 1) == ends(1, 1)
    assert ends(1, 1) != ends(1, 2)
    assert ends(1, 1) != ends(2, 1)


def test_a_conversation_goes_on_when_the_answer_is_complete() -> None:
    workload = generators.chats(pause_s=0.1)(300, 60.0, Random(3))
    result = Simulation(workload, fleet(2), policy("least_outstanding"), 1).run()
    followed = [each for each in result.outcomes if each.job.after is not None]
    assert len(followed) > 100
    for each in followed:
        before = each.job.after
        assert before is not None
        assert each.sent >= result.outcomes[before].end + each.job.pause_s - 1e-9


@pytest.mark.parametrize("kind", ["crash", "slow", "flush"])
def test_faults_lose_no_request_that_can_be_tried_again(kind: str) -> None:
    workload = generators.distinct()(600, 24.0, Random(4))
    broken = replace(fleet(), faults=(Fault(5.0, 1, kind, lasts_s=5.0),))
    result = Simulation(workload, broken, policy("cost"), 1).run()
    check_books(result, workload)
    failed = [each for each in result.outcomes if each.failed]
    if kind == "crash":
        # Those that had begun to answer cannot be moved; nobody else is harmed.
        assert 0 < len(failed) < 100
        assert all(each.first >= 0.0 for each in failed)
        assert any(each.attempts > 1 for each in result.outcomes)
    else:
        assert not failed


def test_a_slow_replica_gets_less_once_it_is_noticed() -> None:
    workload = generators.distinct()(1200, 20.0, Random(5))
    broken = replace(fleet(), faults=(Fault(10.0, 2, "slow", lasts_s=100.0),))
    for name, most in (("cost", 0.16), ("round_robin", 0.26)):
        result = Simulation(workload, broken, policy(name), 1).run()
        late = [each for each in result.outcomes if each.sent > 20.0]
        tokens = sum(each.job.prompt_tokens for each in late)
        share = sum(each.job.prompt_tokens for each in late if each.replica == 2) / tokens
        assert share < most, name


def test_capacity_is_what_is_done_when_more_is_asked_for_and_nobody_waits_long_for_less() -> None:
    source = generators.distinct()
    per_s = capacity_of(source, fleet(2))
    assert per_s == pytest.approx(2 * capacity_of(source, fleet(1)), rel=0.15)
    for load in (0.5, 0.95, 1.3):
        workload = source(3000, load * per_s, Random(1))
        result = Simulation(workload, fleet(2), Reference, 1).run()
        ttft_ms = figures(result, workload, fleet(2))["ttft_ms"]
        assert (ttft_ms > 5000.0) == (load > 1.0), load
        last = workload.jobs[-1].at
        done = sum(0.4 * last < each.end <= last for each in result.outcomes) / (0.6 * last)
        assert done == pytest.approx(min(load, 1.0) * per_s, rel=0.12), load


def test_policies_rank_as_has_been_published() -> None:
    """Customers with long contexts: what looks at caches is far ahead of what does not (arXiv 2603.15202, llm-d)."""
    workload = generators.shared_prefix(60, 6000, 400, 200)(1500, 35.0, Random(6))
    mean = {
        name: figures(Simulation(workload, fleet(), policy(name), 1).run(), workload, fleet())
        for name in ("round_robin", "least_outstanding", "lmetric", "cost")
    }
    assert mean["lmetric"]["ttft_ms"] * 1.5 < mean["least_outstanding"]["ttft_ms"]
    assert mean["cost"]["ttft_ms"] < 1.1 * mean["lmetric"]["ttft_ms"]
    assert mean["lmetric"]["hit_rate"] > mean["round_robin"]["hit_rate"] + 0.1


def test_with_distinct_prompts_looking_at_caches_changes_nothing() -> None:
    workload = generators.distinct()(1200, 18.0, Random(7))
    rows = {
        name: figures(Simulation(workload, fleet(), policy(name), 1).run(), workload, fleet())
        for name in ("least_outstanding", "least_prefill", "lmetric")
    }
    assert all(row["hit_rate"] == 0.0 and row["believed_rate"] == 0.0 for row in rows.values())
    assert rows["lmetric"]["ttft_ms"] < 1.05 * rows["least_outstanding"]["ttft_ms"]


def test_gateways_that_tell_each_other_are_nearly_as_good_as_one_and_those_that_do_not_are_not() -> None:
    workload = generators.shared_prefix(60, 6000, 400, 200)(1500, 30.0, Random(8))
    fleets = {
        "one": fleet(),
        "eight": replace(fleet(), gateways=8),
        "silent": replace(fleet(), gateways=8, gossip=None),
    }
    ttft: dict[str, float] = {}
    for name, each in fleets.items():
        result = Simulation(workload, each, policy("cost"), 1).run()
        check_books(result, workload)
        ttft[name] = figures(result, workload, each)["ttft_ms"]
    assert ttft["eight"] < 1.2 * ttft["one"]
    assert ttft["silent"] > 1.2 * ttft["eight"]


def test_a_faster_replica_gets_more_though_nobody_said_so() -> None:
    workload = generators.distinct()(1500, 12.0, Random(9))
    mixed = Fleet((Seat(GPU), Seat(GPU), Seat(slower(GPU, 3.0)), Seat(slower(GPU, 3.0))))
    result = Simulation(workload, mixed, policy("cost"), 1).run()
    assert sum(result.counts[:2]) > 1.5 * sum(result.counts[2:])


def test_the_way_to_another_region_is_paid_for() -> None:
    scenario = GENERATED["two-regions"]
    workload = scenario.source(500, 20.0, Random(10))
    built = scenario.build(4)
    result = Simulation(workload, built, policy("round_robin"), 1).run()
    for each in result.outcomes:
        far = built.seats[each.replica].region != each.job.origin
        assert (each.ttft_ms > 80.0) or not far
        assert each.ttft_ms > 1.0
    near = Simulation(workload, built, policy("cost"), 1).run()
    stayed = sum(built.seats[each.replica].region == each.job.origin for each in near.outcomes)
    assert stayed > 0.9 * len(near.outcomes)
