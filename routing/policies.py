"""Policies by name. Each is a callable of a few lines over plain data."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from routing.filters import exclusion_reason
from routing.types import Decision, Exclusion, InferenceRequest, Replica


class LeastOutstanding:
    """The replica with the fewest requests in flight per unit of weight; equals are drawn at random.

    Randomness among equals matters more than it looks: with a fixed order an idle fleet would always send the
    first request of a burst to the same replica.

    When every untried candidate is cooling down, the cool-downs are ignored (Envoy's panic mode): a connection
    attempt costs less than a refusal that may no longer be true.
    """

    name = "least_outstanding"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def decide(
        self,
        request: InferenceRequest,
        replicas: Sequence[Replica],
        now: float,
        tried: Sequence[Replica] = (),
    ) -> Decision:
        candidates: list[Replica] = []
        excluded: list[Exclusion] = []
        for replica in replicas:
            reason = exclusion_reason(request, replica, now, tried)
            if reason is None:
                candidates.append(replica)
            else:
                excluded.append(Exclusion(replica, reason))
        why = self.name
        if not candidates:
            candidates = [each.replica for each in excluded if each.reason == "cooling_down"]
            if not candidates:
                return Decision(None, "none_available", excluded)
            excluded = [each for each in excluded if each.reason != "cooling_down"]
            why = "all_cooling_down"
        return Decision(self._least(candidates), why, excluded)

    def _least(self, candidates: Sequence[Replica]) -> Replica:
        best: list[Replica] = []
        lowest = float("inf")
        for replica in candidates:
            load = replica.in_flight / replica.weight
            if load < lowest:
                lowest = load
                best = [replica]
            elif load == lowest:
                best.append(replica)
        return best[0] if len(best) == 1 else best[int(self._rng.random() * len(best))]
