"""How many requests a second a fleet can do of a workload: the most that it did with always enough of them under way.

Asked of the simulator itself, with a reference that looks at queued prefill, batch, cache and adapters and is told all
speeds. Neither it nor the answer depends on any policy that is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from loadtests.simulator.fleet import Fleet
from loadtests.simulator.simulation import Simulation
from loadtests.simulator.traffic import Source
from routing.types import InferenceRequest, Replica, View

CONCURRENCY = (16, 64, 256)
"""Requests under way per replica: fewer are better where the cache is short, more where answers are long."""
ROUNDS = 6
"""So many times as many requests as are under way, and at least `LEAST`."""
LEAST = 2500
COUNTED = (0.3, 0.8)
"""Part of the run, by completions, over which the rate is taken: not its beginning nor its end."""


class Reference:
    """Work there is, times how many it delays (LMetric's form, arXiv 2603.15202), in milliseconds."""

    name = "reference"
    wants_prefix = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        return min(candidates, key=lambda replica: (self._cost(request, replica, view), self._rng.random()))

    @staticmethod
    def _cost(request: InferenceRequest, replica: Replica, view: View) -> float:
        speed, work = replica.speed, replica.work
        uncached = max(1, request.prompt_tokens - view.matches.get(replica, 0))
        cost = (work.queued_tokens + uncached) * speed.prefill_ms + speed.step_ms
        if request.adapter is not None and replica.adapters is not None and request.adapter not in replica.adapters:
            cost += speed.adapter_ms
        return cost * (work.running + work.queued + 1)


def capacity_of(source: Source, fleet: Fleet, seed: int = 1) -> float:
    """Requests per second. Raises `ValueError` where the fleet does not answer most of them at all."""
    told = replace(fleet, told_speeds=True, gateways=1, faults=())
    # How conversations interleave depends on the rate, so the second time it is asked at about the right one.
    guess = max(_rate(source, told, each, 1.0, seed) for each in CONCURRENCY)
    return max(_rate(source, told, each, guess, seed) for each in CONCURRENCY)


def _rate(source: Source, fleet: Fleet, concurrency: int, per_s: float, seed: int) -> float:
    under_way = concurrency * len(fleet.seats)
    workload = source(max(LEAST, ROUNDS * under_way), per_s, Random(f"capacity {seed}"))
    size = len(workload.jobs)  # less where a trace is at its end
    result = Simulation(workload, fleet, Reference, seed, concurrency=min(under_way, 1 + size // 4)).run()
    ends = sorted(outcome.end for outcome in result.outcomes if not outcome.failed)
    if 2 * len(ends) < size:
        raise ValueError(f"the fleet answers {len(ends)} of {size} requests only")
    first, last = (int(share * (len(ends) - 1)) for share in COUNTED)
    return (last - first) / max(ends[last] - ends[first], 1e-9)
