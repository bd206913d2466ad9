"""The formulas of other projects, each by an example worked by hand."""

from __future__ import annotations

from random import Random

import pytest

from routing.load import Load
from routing.policies.engines import (
    SmgLeastLoad,
    aibrix,
    dynamo,
    kv_use,
    least_prefill,
    llmd,
    lmetric,
    ttft,
    vllm_load_aware,
)
from routing.types import Replica
from tests.routing.policies.examples import NOW, busy, replicas, request, view


def test_lmetric_multiplies_work_by_batch() -> None:
    warm, idle = busy("warm", queued=1, queued_tokens=300, running=3), busy("idle")
    seen = view({warm: 900})
    # (300 + 100) x 5 and (0 + 1,000) x 1
    assert lmetric(request(tokens=1000), [warm, idle], seen) == [2000, 1000]
    assert lmetric(request(tokens=1000), [idle, warm], view({idle: 500})) == [500, 6500]


def test_lmetric_goes_by_batch_when_all_is_cached_everywhere() -> None:
    one, other = busy("one", running=3), busy("other", running=2)
    assert lmetric(request(tokens=1000), [one, other], view({one: 1000, other: 2000})) == [4, 3]


def test_least_prefill_adds_what_waits_and_what_is_new() -> None:
    one, other = busy("one", queued=1, queued_tokens=300, running=50), busy("other")
    assert least_prefill(request(tokens=1000), [one, other], view({one: 900})) == [400, 1000]


def test_dynamo_adds_blocks_to_prefill_and_blocks_held() -> None:
    one, other = busy("one", 2, 320, 1, 1600), busy("other")
    # (320 + 1,600) / 16 - 1,500 // 16 = 120 - 93, and 1,920 / 16 = 120 held; 100 - 0 and none held
    assert dynamo(request(tokens=1600), [one, other], view({one: 1500})) == [27 + 120, 100]


def test_dynamos_prefill_is_never_negative() -> None:
    one = busy("one", running=1, running_tokens=160)
    assert dynamo(request(tokens=16), [one], view({one: 1600})) == [10]


def test_llmd_weighs_prefix_queue_and_cache_three_to_two_to_two() -> None:
    fleet = [busy("a", queued=4), busy("b", queued=1), busy("c")]
    fleet[0].load = Load(NOW, kv_use=0.5)
    fleet[1].load = Load(NOW, kv_use=0.25)
    fleet[2].work.running_tokens = 50_000  # of 500,000 where nobody says
    scores = llmd(request(tokens=1000), fleet, view({fleet[0]: 800, fleet[1]: 100}))
    assert scores == pytest.approx(
        [-(3 * 0.8 + 2 * 0.0 + 2 * 0.5), -(3 * 0.1 + 2 * 0.75 + 2 * 0.75), -(3 * 0.0 + 2 * 1.0 + 2 * 0.9)]
    )


def test_llmds_queues_score_one_when_they_are_equal() -> None:
    fleet = [busy("a", queued=2), busy("b", queued=2)]
    assert llmd(request(tokens=10), fleet, view()) == [-4.0, -4.0]


def test_kv_use_is_estimated_where_no_engine_says_it() -> None:
    one = busy("a", running_tokens=2_000_000)
    assert kv_use(one) == 1.0
    one.load = Load(NOW)
    assert kv_use(one) == 1.0
    one.load = Load(NOW, kv_use=0.1)
    assert kv_use(one) == 0.1


def best(scores: list[float], fleet: list[Replica]) -> list[str]:
    return [each.name for each, score in zip(fleet, scores, strict=True) if score == min(scores)]


def test_aibrix_takes_the_longest_match_within_one_deviation_of_the_mean() -> None:
    fleet = [busy("a", running=9), busy("b", running=6), busy("c", running=3), busy("d", running=2)]
    # Mean 5, deviation sqrt(30 / 3) = 3.16: nobody above 8.16.
    seen = view({fleet[0]: 900, fleet[1]: 500, fleet[2]: 499})
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["b"]
    fleet[0].work.running = 8  # mean 4.75, deviation 2.75
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["b"]
    fleet[0].work.running = 7  # mean 4.5, deviation 2.38: 6.88
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["b"]
    fleet[0].work.running = 6  # mean 4.25, deviation 2.06: 6.31
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["a"]


def test_aibrix_takes_the_samples_deviation() -> None:
    fleet = [busy("a", running=8), busy("b", running=7), busy("c", running=2), busy("d", running=1)]
    # Mean 4.5, sample deviation sqrt(37 / 3) = 3.51; the population's would be 3.04, and a left out.
    assert best(aibrix(request(tokens=1000), fleet, view({fleet[0]: 500})), fleet) == ["a"]


def test_aibrix_counts_whole_percents_and_breaks_ties_by_requests() -> None:
    fleet = [busy("a", running=2), busy("b", running=1), busy("c", running=3)]
    seen = view({fleet[0]: 509, fleet[1]: 501, fleet[2]: 500})
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["b"]


def test_aibrix_goes_by_requests_when_nobody_matches_or_all_that_do_are_overloaded() -> None:
    fleet = [busy("a", running=5), busy("b", running=1), busy("c", running=2)]
    assert best(aibrix(request(tokens=1000), fleet, view()), fleet) == ["b"]
    assert best(aibrix(request(tokens=1000), fleet, view({fleet[0]: 1000})), fleet) == ["b"]  # 5 > 2.67 + 2.08


def test_aibrix_asks_the_idlest_only_when_far_out_of_balance() -> None:
    fleet = [busy("a", running=1), busy("b", running=9), *(busy(f"idle{index}", running=1) for index in range(4))]
    seen = view({fleet[0]: 100, fleet[1]: 900})
    # 9 > 2 x (14 / 6 + 1) = 6.7, and 9 - 1 = 8: out of balance; b is also beyond the deviation, 5.6.
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["a"]
    fleet[0].work.running = 2
    assert len(best(aibrix(request(tokens=1000), fleet, seen), fleet)) == 4  # a is none of the idlest
    fleet[1].work.running = 8  # 8 - 1 is less than 8
    assert best(aibrix(request(tokens=1000), fleet, seen), fleet) == ["a"]


def test_vllm_load_aware_docks_a_whole_match_for_twice_the_mean_load() -> None:
    fleet = [busy("a", running=8), busy("b", running=4), busy("c")]
    scores = vllm_load_aware(request(tokens=1000), fleet, view({fleet[0]: 900}))
    assert scores == pytest.approx([-0.9 + 1.0, 0.0, -1.0])
    idle = replicas(2)
    idle[0].in_flight = 1  # the mean is a half, taken as one
    assert vllm_load_aware(request(tokens=1000), idle, view()) == pytest.approx([0.5, -0.5])


def test_ttft_is_round_trip_and_queue_and_own_prefill_at_the_replicas_speed() -> None:
    near, far = busy("near", queued=1, queued_tokens=2000), busy("far")
    near.speed.rtt_ms, near.speed.prefill_ms = 1.0, 0.05
    far.speed.rtt_ms, far.speed.prefill_ms, far.speed.curve = 80.0, 0.1, 1e-4
    seen = view({near: 500, far: 200})
    # 1 + 0.05 x (2,000 + 500); 80 + 0.1 x 800 x (1 + 1e-4 x (200 + 400))
    assert ttft(request(tokens=1000), [near, far], seen) == pytest.approx([126.0, 164.8])
    assert seen.predicted_ttft_ms == pytest.approx(126.0)


def reported(name: str, waiting: int, use: float, at: float = NOW) -> Replica:
    one = busy(name)
    one.load = Load(at, waiting_uncached_tokens=waiting, kv_use=use)
    return one


def test_smg_least_load_adds_seconds_to_drain_and_a_barrier_before_a_full_cache() -> None:
    full, long = reported("full", 0, 0.9), reported("long", 2600, 0.0)
    policy = SmgLeastLoad(Random(1))
    # 0.15 x 0.9 / 0.1 = 1.35 s against 2,600 / 2,000 = 1.3 s
    assert policy(request(tokens=50), [full, long], view()) is long
    # 50 tokens more on it, 0.025 s: 1.325; and once more: 1.35 and a bit
    assert policy(request(tokens=60), [full, long], view()) is long
    assert policy(request(tokens=50), [full, long], view()) is full


def test_smg_least_load_counts_what_it_sent_until_the_next_report() -> None:
    one, other = reported("one", 0, 0.0), reported("other", 100, 0.0)
    policy = SmgLeastLoad(Random(1))
    assert policy(request(tokens=1000), [one, other], view()) is one
    assert policy(request(tokens=10), [one, other], view()) is other
    assert policy(request(tokens=10), [one, other], view()) is other
    one.load = Load(NOW + 1.0, waiting_uncached_tokens=0, kv_use=0.0)
    assert policy(request(tokens=1000), [one, other], view(now=NOW + 1.0)) is one


def test_smg_least_load_takes_1024_tokens_where_nobody_counted() -> None:
    one, other = reported("one", 0, 0.0), reported("other", 1023, 0.0)
    policy = SmgLeastLoad(Random(1))
    assert [policy(request(), [one, other], view()) for _ in range(2)] == [one, other]


def test_smg_least_load_estimates_those_without_a_fresh_report() -> None:
    dark, stale, told = busy("dark", running=2), reported("stale", 99_999, 0.0, NOW - 31.0), reported("told", 1900, 0.0)
    stale.work.running = 1
    # 2 x 1,024 / 2,000 = 1.02 s, 0.51 s, 0.95 s
    assert SmgLeastLoad(Random(1))(request(tokens=1), [dark, stale, told], view()) is stale
    assert SmgLeastLoad(Random(1))(request(tokens=1), [dark, told], view()) is told


def test_smg_least_load_without_any_report_takes_the_shortest_queue() -> None:
    fleet = [busy("a", running=2), busy("b", running=1), reported("c", 0, 0.0, NOW - 100.0)]
    fleet[2].work.running = 5
    assert SmgLeastLoad(Random(1))(request(tokens=1), fleet, view()) is fleet[1]
