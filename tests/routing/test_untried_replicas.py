"""Replicas that nobody has used yet are not left out for ever because of what they are assumed to be."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from routing.policies.cost import Cost
from routing.router import Router
from routing.types import InferenceRequest, Replica


@pytest.mark.parametrize("factor", [1000.0, 100.0, 0.001])
def test_all_are_tried_however_wrong_the_start_values_are(factor: float) -> None:
    fleet = [Replica(f"r{number}", "pool", f"http://r{number}", "sglang") for number in range(4)]
    for each in fleet:
        each.speed.prefill_ms *= factor
        each.speed.step_ms *= factor
    router, now, chosen = Router(Cost(Random(1)), rng=Random(2)), 0.0, Counter[Replica]()
    for number in range(400):
        now += 0.25
        request = InferenceRequest(str(number), "m", True, 8000, prompt_tokens=2000)
        decision = router.decide(request, fleet, now)
        assert decision.replica is not None
        chosen[decision.replica] += 1
        router.dispatched(request, decision.replica, now, decision)
        router.first_token(request, decision.replica, now + 0.17)
        router.finished(request, decision.replica, now + 0.2, prompt_tokens=2000, cached_tokens=0, output_tokens=4)
    assert all(chosen[each] >= 40 for each in fleet), chosen
