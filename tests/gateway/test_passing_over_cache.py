"""Odd prompts do not spoil what is known of the others: of the cache, and of how many tokens a text has."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from backends.dialects.protocol import COMPLETIONS
from gateway.reading import PromptReader
from routing.policies.cost import Cost
from routing.router import Router
from routing.types import InferenceRequest, Replica

TEXT = "What the whole world asks. " * 200


def read(reader: PromptReader, id: str, **fields: Any) -> InferenceRequest:
    request = InferenceRequest(id, "m", False, len(TEXT))
    reader.read(request, COMPLETIONS, {"model": "m", "prompt": TEXT, **fields}, "tenant")
    return request


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}, {"cache_prompt": False}])
def test_a_prompt_that_is_computed_anew_on_request_does_not_shrink_what_is_believed(asked: dict[str, Any]) -> None:
    """Evaluations ask for the prompt's log-probabilities thousands of times over."""
    router, reader = Router(Cost(Random(1))), PromptReader("m", isolate_tenants=False)
    replica = Replica("a", "pool", "http://a", "vllm")
    usual = read(reader, "first")
    router.dispatched(usual, replica, 0.0)
    router.finished(usual, replica, 1.0, prompt_tokens=1350, cached_tokens=0, output_tokens=1)
    for number in range(300):
        odd = read(reader, str(number), **asked)
        assert 0.8 < odd.prompt_tokens / usual.prompt_tokens < 1.25
        router.dispatched(odd, replica, 2.0)
        router.finished(odd, replica, 3.0, prompt_tokens=1350, cached_tokens=0, output_tokens=1)
    (target,) = router.state.index.stats().targets.values()
    assert target.factor == 1.0
    assert router.view(usual, 4.0).matches == {replica: usual.prompt_tokens}


def test_other_requests_have_keys() -> None:
    reader = PromptReader("m", isolate_tenants=False)
    for fields in ({}, {"echo": True}, {"logprobs": 1}, {"prompt_logprobs": None}, {"cache_prompt": True}):
        assert read(reader, "q", **fields).prefix is not None


def test_one_huge_prompt_does_not_set_the_measure_for_all() -> None:
    reader = PromptReader("m", isolate_tenants=False)
    for number in range(100):
        usual = read(reader, str(number))
        reader.learn(usual, len(TEXT) // 4)
    huge = InferenceRequest("huge", "m", False, 4_000_000)
    reader.learn(huge, 3_900_000)
    assert reader.tokens_per_byte == pytest.approx(0.25, rel=0.2)
    for _ in range(200):
        reader.learn(huge, 3_900_000)
    assert reader.tokens_per_byte > 0.9, "when all are like that, they do"
