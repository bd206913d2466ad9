"""Policies by name. Each is a callable of a few lines over plain data."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from routing.filters import SOFT, exclusion_reason
from routing.types import Decision, Exclusion, InferenceRequest, Replica

ALL_COOLING_DOWN = "all_cooling_down"
ALL_UNHEALTHY = "all_unhealthy"
OVER_CAPACITY = "over_capacity"
"""Reason of decisions for a replica that has as much as it runs at once; its limit is not reached."""
PANIC = frozenset({ALL_COOLING_DOWN, ALL_UNHEALTHY})
"""Reasons of decisions for want of any replica that looks well."""


class LeastOutstanding:
    """The replica with the fewest requests in flight per unit of weight; equals are drawn in proportion to weight.

    Randomness among equals matters more than it looks: with a fixed order an idle fleet would always send the
    first request of a burst to the same replica.

    A replica in slow start has its weight reduced to its share, and with probability 1 - share it is not looked at
    at all. The second is for light traffic: with nothing in flight 0 / weight is 0 for every replica, so a share of
    0.1 would get one in four of four. (Adding one before dividing, as is often done, errs the other way: simulated
    with a share of 0.1, such a replica gets nothing until the others are ten deep.) Like this it gets 0.8 to 1.8 of
    its due at 0.1 to 200 requests at once; `tests/routing/test_simulation.py` has the simulation.

    When all that look well have as much as they run at once, the one with the least is given more all the same: its
    own queue is a better place than none, and than a replica under suspicion.
    When nothing but suspicion (`routing.filters.SOFT`) speaks against the untried candidates, it is ignored.
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
        if candidates:
            return Decision(self._least(candidates, now), self.name, excluded)
        busy = [each.replica for each in excluded if each.reason == "full" and not each.replica.at_limit]
        if busy:
            least = self._least(busy, now)
            return Decision(least, OVER_CAPACITY, [each for each in excluded if each.replica is not least])
        suspects = [each for each in excluded if each.reason in SOFT]
        if not suspects:
            return Decision(None, "none_available", excluded)
        resting = all(each.reason == "cooling_down" for each in suspects)
        return Decision(
            self._least([each.replica for each in suspects], now),
            ALL_COOLING_DOWN if resting else ALL_UNHEALTHY,
            [each for each in excluded if each.reason not in SOFT],
        )

    def _least(self, candidates: Sequence[Replica], now: float) -> Replica:
        best: list[Replica] = []
        lowest = float("inf")
        for replica in candidates:
            if replica.health.warm_from is not None:
                return self._least_by_share(candidates, now)
            load = replica.in_flight / replica.weight
            if load < lowest:
                lowest = load
                best = [replica]
            elif load == lowest:
                best.append(replica)
        return best[0] if len(best) == 1 else self._draw(best)

    def _least_by_share(self, candidates: Sequence[Replica], now: float) -> Replica:
        """The same with slow start: rare, and twice as dear."""
        shares = [replica.health.share(now) for replica in candidates]
        # Only the relation counts: when all are warming, all are equal.
        full = max(shares)
        best: list[Replica] = []
        lowest = float("inf")
        for replica, share in zip(candidates, shares, strict=True):
            if share < full and self._rng.random() * full >= share:
                continue
            load = replica.in_flight * full / (replica.weight * share)
            if load < lowest:
                lowest = load
                best = [replica]
            elif load == lowest:
                best.append(replica)
        return self._draw(best)

    def _draw(self, equals: Sequence[Replica]) -> Replica:
        total = 0.0
        for replica in equals:
            total += replica.weight
        point = self._rng.random() * total
        for replica in equals:
            point -= replica.weight
            if point < 0.0:
                return replica
        return equals[-1]
