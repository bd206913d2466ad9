"""What holds for every policy, whatever it looks at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.keys import text_prefix
from routing.load import Load
from routing.policies import POLICY_NAMES, make_policy
from routing.prefix import Prefix
from routing.router import Router
from routing.types import InferenceRequest, Replica
from routing.work import NOTHING
from tests.routing.policies.examples import BLOCK, NOW, prompt, replica, replicas, request, view, warming

every_policy = pytest.mark.parametrize("name", POLICY_NAMES)
HASHES = ("consistent_hash", "bounded_hash")
NOT_BY_LOAD = ("random", "round_robin", "power_of_two", *HASHES)

counts = st.integers(0, 200)
reports = st.builds(
    Load,
    observed_at=st.sampled_from((NOW, NOW - 20.0, NOW - 500.0)),
    waiting_uncached_tokens=st.none() | counts,
    kv_use=st.none() | st.sampled_from((0.0, 0.5, 1.0)),
)
prefixes = st.none() | st.just(Prefix([], [], 0, [])) | st.text("abc", max_size=6).map(prompt)


@st.composite
def fleets(draw: st.DrawFn) -> list[Replica]:
    fleet = []
    for index in range(draw(st.integers(1, 6))):
        one = warming(f"r{index}") if draw(st.integers(0, 4)) == 0 else replica(f"r{index}")
        one.weight = draw(st.sampled_from((0.1, 1.0, 3.0)))
        one.in_flight = draw(counts)
        one.load = draw(st.none() | reports)
        one.work.queued, one.work.queued_tokens = draw(counts), draw(counts)
        one.work.running, one.work.running_tokens = draw(counts), draw(counts)
        fleet.append(one)
    return fleet


def asked(prefix: Prefix | None, tokens: int, session: str | None, adapter: str | None) -> InferenceRequest:
    return InferenceRequest("q", "m", True, 1, prompt_tokens=tokens, prefix=prefix, session=session, adapter=adapter)


requests = st.builds(asked, prefixes, st.integers(0, 1000), st.sampled_from((None, "s")), st.sampled_from((None, "a")))


@every_policy
@settings(max_examples=40, deadline=None)
@given(
    fleet=fleets(),
    several=st.lists(st.tuples(requests, st.randoms(use_true_random=False)), max_size=8),
    seed=st.integers(0, 9),
)
def test_always_one_of_the_candidates(
    name: str, fleet: list[Replica], several: list[tuple[InferenceRequest, Random]], seed: int
) -> None:
    policy = make_policy(name, Random(seed))
    for step, (one, rng) in enumerate(several):
        candidates = rng.sample(fleet, rng.randint(1, len(fleet)))
        matches = {each: rng.randint(0, 1000) for each in fleet if rng.random() < 0.5}
        # What is matched, and what candidates there are, need not agree with anything that was before.
        assert policy(one, candidates, view(matches, NOW + 40.0 * step)) in candidates


@every_policy
def test_the_hard_rules_are_kept_whatever_the_policy_prefers(name: str) -> None:
    router = Router(make_policy(name, Random(1)))
    near = [replica(f"near{index}", region="eu") for index in range(3)]
    barred = [replica("far", region="us"), replica("full", region="eu", max_in_flight=0)]
    barred.append(replica("leaving", region="eu", draining=True))
    for number in range(50):
        one = InferenceRequest(f"q{number}", "m", True, 1, regions=("eu",), prefix=prompt("abc"), prompt_tokens=300)
        decision = router.decide(one, [*barred, *near], NOW, tried=near[:1])
        assert decision.replica in near[1:]
        assert {each.replica for each in decision.excluded} == {*barred, near[0]}
        assert decision.reason.startswith(name) or name == "cost"


@every_policy
def test_idle_equals_all_get_their_part(name: str) -> None:
    fleet, policy = replicas(4), make_policy(name, Random(5))
    rng = Random(6)
    used = Counter(policy(request("".join(rng.choices("abcdefgh", k=6))), fleet, view()) for _ in range(400))
    assert set(used) == set(fleet)
    assert min(used.values()) >= 40, used


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if not name.startswith("sglang")])
def test_the_first_choice_differs_between_gateways_or_depends_on_the_request(name: str) -> None:
    # SGLang's takes the first of equals that have had as much so far.
    fleet = replicas(4)
    firsts = {make_policy(name, Random(seed))(request(chr(97 + seed % 26) * 3), fleet, view()) for seed in range(60)}
    assert firsts == set(fleet)


@every_policy
def test_the_same_seed_gives_the_same_choices(name: str) -> None:
    def choices() -> list[str]:
        fleet, policy, rng = replicas(5), make_policy(name, Random(3)), Random(4)
        chosen = []
        for _ in range(60):
            one = policy(request("".join(rng.choices("ab", k=4))), fleet, view({fleet[rng.randrange(5)]: 200}))
            one.work.queue(400, NOW)
            chosen.append(one.name)
        return chosen

    assert choices() == choices()


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name not in NOT_BY_LOAD])
@given(loads=st.lists(st.integers(0, 20), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_prompts_that_nobody_holds_go_to_the_least_loaded(name: str, loads: list[int]) -> None:
    fleet = replicas(len(loads))
    for each, load in zip(fleet, loads, strict=True):
        for _ in range(load):
            each.work.queue(500, NOW)
    assert make_policy(name, Random(1))(request("abcde"), fleet, view()).work.queued == min(loads)


def hot_prefix(name: str, fleet: list[Replica], arrivals: int, shared: int = 9) -> Mapping[Replica, int]:
    """How often each is chosen when all prompts share so many tenths, and each runs for 32 arrivals after waiting 2."""
    policy, rng = make_policy(name, Random(8)), Random(9)
    held: dict[Replica, int] = {}
    waiting: list[tuple[Replica, int]] = []
    running: list[Replica] = []
    used = dict.fromkeys(fleet, 0)
    for number in range(arrivals):
        one = request("abcdefghi"[:shared] + "".join(rng.choices("jklmnopqrstuvwxyz", k=10 - shared)))
        chosen = policy(one, fleet, view(held, NOW + number))
        used[chosen] += 1
        new = 10 * BLOCK - held.get(chosen, 0)
        chosen.work.queue(new, NOW)
        held[chosen] = shared * BLOCK
        waiting.append((chosen, new))
        if len(waiting) > 2:
            started, tokens = waiting.pop(0)
            started.work.begin(tokens, 10 * BLOCK, NOW)
            running.append(started)
        if len(running) > 32:
            running.pop(0).work.end(10 * BLOCK)
    return used


SPREADS = ("cost", "dynamo", "lmetric", "vllm_load_aware", "ttft", "least_prefill", "bounded_hash", "smg_least_load")


@pytest.mark.parametrize("name", SPREADS)
def test_one_hot_prefix_spreads(name: str) -> None:
    fleet = replicas(4)
    used = hot_prefix(name, fleet, 400)
    assert max(used.values()) <= 220, used
    assert sum(count >= 20 for count in used.values()) >= 3, used


def test_llmd_spreads_a_prefix_only_while_it_is_less_than_two_thirds_of_the_prompt() -> None:
    # 3 x 0.9 outweighs the 2 for the shortest queue, until the cache is a third fuller than the others'.
    assert max(hot_prefix("llmd", replicas(4), 400).values()) == 400
    assert max(hot_prefix("llmd", replicas(4), 400, shared=6).values()) <= 220


def test_aibrix_spreads_a_hot_prefix_over_half_of_the_fleet() -> None:
    # With two of four at the same load and two idle ones, the busy ones are within one deviation of the mean.
    used = hot_prefix("aibrix", replicas(4), 400)
    assert sorted(used.values())[2:] == [pytest.approx(200, abs=40)] * 2


def test_one_hot_prefix_stays_in_one_place_where_load_does_not_count() -> None:
    fleet = replicas(4)
    assert max(hot_prefix("consistent_hash", fleet, 400).values()) == 400
    # 34 in flight at once are not out of balance by more than 64.
    assert max(hot_prefix("sglang_cache_aware_cli", fleet, 400).values()) == 400


NO_SLOW_START = ("cost", *HASHES, "sglang_cache_aware", "sglang_cache_aware_cli")


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name not in NO_SLOW_START])
def test_a_replica_in_slow_start_gets_about_its_share(name: str) -> None:
    back, others = warming("back"), replicas(3)
    policy = make_policy(name, Random(4))
    used = Counter(policy(request("abc"), [back, *others], view()) for _ in range(4000))
    assert 40 <= used[back] <= 180, used  # 4,000 / 4 / 10 = 100; of 31 turns one where turns are weighted: 129


@every_policy
def test_conversations_are_served_and_nothing_is_left_on_the_books(name: str) -> None:
    fleet = replicas(3)
    router, rng = Router(make_policy(name, Random(2)), rng=Random(3)), Random(4)
    chats: list[list[bytes]] = [[b"system" * 100] for _ in range(5)]
    under_way: list[tuple[InferenceRequest, Replica]] = []
    for number in range(120):
        now, chat = NOW + number, rng.choice(chats)
        chat.append(b"%d " % number * 40)
        size = sum(map(len, chat))
        one = InferenceRequest(
            f"q{number}", "m", True, size, prefix=text_prefix(chat, 7, size // 4), prompt_tokens=size // 4
        )
        chosen = router.decide(one, fleet, now).replica
        assert chosen is not None
        router.dispatched(one, chosen, now)
        under_way.append((one, chosen))
        if len(under_way) > 6:
            done, where = under_way.pop(0)
            if number % 5:
                router.first_token(done, where, now)
                router.finished(done, where, now, prompt_tokens=done.prompt_tokens, output_tokens=20)
            else:
                router.failed(done, where, now)
    for done, where in under_way:
        router.failed(done, where, NOW + 200.0)
    assert [each.work.own for each in fleet] == [NOTHING] * 3
