"""64 LoRA adapters by Zipf's law on eight replicas with eight slots each: who loads how often."""

from __future__ import annotations

from random import Random

import pytest

from loadtests.simulator import generators
from loadtests.simulator.metrics import figures
from loadtests.simulator.scenarios import scenarios
from loadtests.simulator.simulation import Simulation
from routing.policies import make_policy

REQUESTS = 1500


def run(policy: str, seed: int, per_s: float) -> dict[str, float]:
    workload = generators.lora()(REQUESTS, per_s, Random(seed))
    fleet = scenarios()["lora"].build(8)
    found = figures(Simulation(workload, fleet, lambda rng: make_policy(policy, rng), seed).run(), workload, fleet)
    assert found["failed"] == 0
    return found


@pytest.mark.parametrize("per_s", [30.0, 60.0])
def test_adapters_are_loaded_seldom_and_far_less_often_than_by_a_policy_that_does_not_see_them(per_s: float) -> None:
    cost, lmetric = run("cost", 1, per_s), run("lmetric", 1, per_s)
    # Each adapter has to be loaded once at least; a hot one belongs at several replicas.
    assert cost["adapter_loads"] <= 3 * 64
    assert cost["adapter_loads"] < 0.6 * lmetric["adapter_loads"]
    assert cost["ttft_ms"] < lmetric["ttft_ms"]
    assert cost["total_ms"] < lmetric["total_ms"]
