"""A second policy beside the one in force: it sees what there was to see, and changes nothing."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.keys import seed_of, text_prefix
from routing.policies import POLICY_NAMES, make_policy
from routing.router import PoolState, Router
from routing.shadow import Beside
from routing.types import InferenceRequest, Replica

SEED = seed_of("m")


def request(number: int, text: str = "a" * 8000, **fields: object) -> InferenceRequest:
    tokens = len(text) // 4
    return InferenceRequest(
        str(number),
        "m",
        stream=True,
        prompt_bytes=len(text),
        prompt_tokens=tokens,
        prefix=text_prefix([text.encode()], SEED, tokens),
        **fields,  # type: ignore[arg-type]
    )


def pool(count: int = 2) -> list[Replica]:
    return [Replica(f"r{number}", "pool", f"http://r{number}", "sglang") for number in range(count)]


def snapshot(state: PoolState, replicas: list[Replica]) -> object:
    return (
        [(each.in_flight, each.in_flight_bytes, each.work.own, each.work.queued_tokens) for each in replicas],
        state.index.stats(),
        dict(state.sessions),
        state.calibration.pool,
    )


def test_the_same_policy_agrees_with_itself_about_the_request_that_was_just_sent() -> None:
    """With its own dispatch in view, it would find the other replica idle, or its own prompt cached."""
    state, replicas = PoolState(), pool()
    router = Router(make_policy("cost", Random(1)), state, Random(1))
    beside = Beside(make_policy("least_outstanding", Random(1)), state, Random(1))
    same = Beside(make_policy("cost", Random(1)), state, Random(1))
    first = request(0)
    decision = router.decide(first, replicas, 1.0)
    chosen = decision.replica
    assert chosen is not None
    with chosen.reserve(first):
        router.dispatched(first, chosen, 1.0, decision)
        found = same.compare(first, replicas, chosen, 1.0, None)
        assert (found.cached_tokens, found.real_cached_tokens) == (0, 0)
        assert found.real_ttft_ms == pytest.approx(decision.predicted_ttft_ms)
        # Another request, while the first one is under way there: who counts requests goes to the other one.
        second = request(1)
        with chosen.reserve(second):
            router.dispatched(second, chosen, 1.1)
            other = beside.compare(second, replicas, chosen, 1.1, None)
    assert other.chosen is not chosen
    assert other.cached_tokens == 0
    assert other.real_cached_tokens is not None
    assert other.real_cached_tokens > 1500


@given(st.sampled_from(POLICY_NAMES), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_shadow_changes_nothing(policy: str, texts: list[int], seed: int) -> None:
    state, replicas = PoolState(), pool(3)
    router = Router(make_policy("cost", Random(seed)), state, Random(seed))
    beside = Beside(make_policy(policy, Random(seed)), state, Random(seed))
    for number, text in enumerate(texts):
        asked = request(number, f"{text}" * 4000, session=f"s{text}")
        decision = router.decide(asked, replicas, float(number))
        chosen = decision.replica
        assert chosen is not None
        before_session = state.sessions.get(f"s{text}")
        with chosen.reserve(asked):
            router.dispatched(asked, chosen, float(number), decision)
            before = snapshot(state, replicas)
            found = beside.compare(asked, replicas, chosen, float(number), before_session)
            assert snapshot(state, replicas) == before
            assert found.chosen in replicas
            assert found.same == (found.chosen is chosen)
        router.finished(asked, chosen, number + 0.5, prompt_tokens=asked.prompt_tokens, output_tokens=3)


def test_a_shadow_that_wants_to_know_what_is_cached_finds_it_beside_a_policy_that_does_not() -> None:
    state, replicas = PoolState(), pool()
    router = Router(make_policy("round_robin", Random(1)), state, Random(1))
    beside = Beside(make_policy("cost", Random(1)), state, Random(1))
    router.index_for_others(beside.wants_prefix)
    assert (router.wants_prefix, router.chooser.wants_prefix) == (True, False)
    went: list[Replica] = []
    compared = []
    for number in range(2):
        asked = request(number)
        decision = router.decide(asked, replicas, float(number))
        assert decision.replica is not None
        assert decision.cached_tokens == 0  # it does not look
        went.append(decision.replica)
        with decision.replica.reserve(asked):
            router.dispatched(asked, decision.replica, float(number), decision)
            compared.append(beside.compare(asked, replicas, decision.replica, float(number), None))
        router.finished(asked, decision.replica, number + 0.01, prompt_tokens=asked.prompt_tokens, output_tokens=3)
    assert went[0] is not went[1]
    found = compared[1]
    assert found.chosen is went[0]
    assert found.cached_tokens is not None
    assert found.cached_tokens > 1500
    assert found.real_cached_tokens == 0
