"""Policies that look at load only, and what all policies share: counting what is outstanding, drawing among equals."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from routing.types import InferenceRequest, Replica, View


def outstanding(replica: Replica) -> int:
    """Requests at the replica: this worker's own, or all gateways' where that is known and more."""
    work = replica.work
    known = work.queued + work.running
    return known if known > replica.in_flight else replica.in_flight


def draw_least(candidates: Sequence[Replica], scores: Sequence[float], rng: Random) -> Replica:
    """One of those with the lowest score, equals drawn at random."""
    lowest = min(scores)
    if scores.count(lowest) == 1:
        return candidates[scores.index(lowest)]
    return rng.choice([replica for replica, score in zip(candidates, scores, strict=True) if score == lowest])


def warm(candidates: Sequence[Replica], now: float, rng: Random) -> Sequence[Replica]:
    """The candidates, without those in slow start that are passed over this time: each with probability 1 - its share,
    relative to the largest share. Never none."""
    for replica in candidates:
        if replica.health.warm_from is not None:
            break
    else:
        return candidates
    shares = [replica.health.share(now) for replica in candidates]
    full = max(shares)
    return [
        replica
        for replica, share in zip(candidates, shares, strict=True)
        if share >= full or rng.random() * full < share
    ]


class LeastOutstanding:
    """The replica with the fewest requests outstanding per unit of weight; equals are drawn in proportion to weight.

    Randomness among equals matters more than it looks: with a fixed order an idle fleet would always send the
    first request of a burst to the same replica.

    A replica in slow start has its weight reduced to its share, and with probability 1 - share it is not looked at
    at all. The second is for light traffic: with nothing in flight 0 / weight is 0 for every replica, so a share of
    0.1 would get one in four of four. (Adding one before dividing, as is often done, errs the other way: simulated
    with a share of 0.1, such a replica gets nothing until the others are ten deep.) Like this it gets 0.8 to 1.8 of
    its due at 0.1 to 200 requests at once; `tests/routing/test_simulation.py` has the simulation.
    """

    name = "least_outstanding"
    wants_prefix = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        return self._least(candidates, view.now)

    def _least(self, candidates: Sequence[Replica], now: float) -> Replica:
        best: list[Replica] = []
        lowest = float("inf")
        for replica in candidates:
            if replica.health.warm_from is not None:
                return self._least_by_share(candidates, now)
            load = outstanding(replica) / replica.weight
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
            load = outstanding(replica) * full / (replica.weight * share)
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


class AtRandom:
    """Any replica, in proportion to its weight."""

    name = "random"
    wants_prefix = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        weights = [replica.weight * replica.health.share(view.now) for replica in candidates]
        return self._rng.choices(candidates, weights)[0]


class RoundRobin:
    """Each in turn, a heavier one more often: nginx's smooth weighted round robin (`ngx_http_upstream_round_robin.c`).

    At every turn each replica is credited its weight; the one with the most credit is chosen and pays for all. With
    equal weights that is the plain order. It begins at a random place, so that gateways do not go in step.
    """

    name = "round_robin"
    wants_prefix = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._credit: dict[Replica, float] = {}

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        credit = self._credit
        if len(credit) > 4 * len(candidates) + 256:  # replicas come and go, and nobody says when
            credit = self._credit = {replica: credit[replica] for replica in candidates if replica in credit}
        total = 0.0
        best, most = candidates[0], float("-inf")
        for replica in candidates:
            weight = replica.weight * replica.health.share(view.now)
            total += weight
            before = credit.get(replica)
            # Whoever is new starts below a full turn's credit: the order among new ones is random, and soon fixed.
            now = (self._rng.random() - 1.0) * weight if before is None else before
            credit[replica] = now = now + weight
            if now > most:
                best, most = replica, now
        credit[best] -= total
        return best


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
    2001; `power_of_two` of SGLang's gateway). Load is what is outstanding per unit of weight."""

    name = "power_of_two"
    wants_prefix = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        able = warm(candidates, view.now, self._rng)
        if len(able) == 1:
            return able[0]
        # In random order, so the first may win a tie.
        one, other = self._rng.sample(able, 2)
        return one if outstanding(one) / one.weight <= outstanding(other) / other.weight else other
