"""Minutes of traffic in milliseconds: where requests go while a replica fails, comes back, and warms up."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush
from random import Random

import pytest

from routing.health import Change, Evidence, Health, HealthState, Rules
from routing.observing import observe
from routing.policies.balanced import LeastOutstanding
from routing.router import Router
from routing.types import InferenceRequest, Replica, Reservation

REQUEST = InferenceRequest("req_1", "m", stream=True, prompt_bytes=1)


class Simulation:
    """A pool under Poisson traffic with exponential service times of one second, seen by one worker."""

    def __init__(self, pool: list[Replica], per_s: float, seed: int = 1) -> None:
        self.pool = pool
        self.now = 0.0
        self.broken: set[Replica] = set()
        self.sent: list[tuple[float, Replica]] = []
        self.changes: list[tuple[float, Change]] = []
        self._per_s = per_s
        self._rng = Random(seed)
        # Another seed than the arrivals': equal ones would draw the same numbers, and the choices follow the gaps.
        self._policy = Router(LeastOutstanding(Random(seed + 1000)))
        self._under_way: list[tuple[float, int, Replica, Reservation]] = []

    def run(self, until: float) -> None:
        while self.now < until:
            arrival = self.now + self._rng.expovariate(self._per_s)
            self._end_those_before(arrival)
            self.now = arrival
            for each in self.pool:
                if each.health.state(arrival) is HealthState.HALF_OPEN:
                    each.health.begin_trial(arrival)
            replica = self._policy.decide(REQUEST, self.pool, arrival).replica
            assert replica is not None
            self.sent.append((arrival, replica))
            reservation = replica.reserve(REQUEST)
            reservation.__enter__()
            # One that fails does so at once: the idlest by far, and the trap of every least-outstanding policy.
            service_s = 0.001 if replica in self.broken else self._rng.expovariate(1.0)
            heappush(self._under_way, (arrival + service_s, len(self.sent), replica, reservation))

    def _end_those_before(self, time: float) -> None:
        while self._under_way and self._under_way[0][0] <= time:
            at, _, replica, reservation = heappop(self._under_way)
            reservation.__exit__()
            evidence = Evidence.FAILED if replica in self.broken else Evidence.ANSWERED
            change = observe(replica, self.pool, evidence, at)
            if change is not None:
                self.changes.append((at, change))

    def share_of(self, replica: Replica, since: float, until: float) -> float:
        counts = Counter(each is replica for at, each in self.sent if since <= at < until)
        return counts[True] / counts.total()


def pool_of_four(rules: Rules | None = None) -> list[Replica]:
    return [Replica(f"r{each}", "p", "http://x", "openai", health=Health(rules, Random(each))) for each in range(4)]


def test_a_replica_that_fails_for_two_minutes_costs_little_and_comes_back_slowly() -> None:
    pool = pool_of_four()
    simulation = Simulation(pool, per_s=40.0)
    simulation.run(30.0)
    assert simulation.share_of(pool[0], 5.0, 30.0) == pytest.approx(0.25, abs=0.03)

    simulation.broken = {pool[0]}
    simulation.run(150.0)
    failed = sum(each is pool[0] for at, each in simulation.sent if at >= 30.0)
    # Five to be sure, and one for each trial after 10, 20, 30 and 40 s; the rest were under way.
    assert failed <= 12
    assert simulation.share_of(pool[0], 35.0, 150.0) < 0.002
    assert [change for _, change in simulation.changes] == [Change.EJECTED] * (len(simulation.changes))
    assert len(simulation.changes) in (4, 5)

    simulation.broken = set()
    simulation.run(350.0)
    back, change = simulation.changes[-1]
    assert change is Change.RECOVERED
    assert back - 150.0 <= 60.0
    shares = [simulation.share_of(pool[0], back + start, back + start + 15.0) for start in (0, 15, 30, 45, 60)]
    # In the middle of each quarter the share is 0.21, 0.44, 0.66, 0.89 and then 1, of that many plus three.
    for seen, share in zip(shares, (0.2125, 0.4375, 0.6625, 0.8875, 1.0), strict=True):
        assert seen == pytest.approx(share / (3.0 + share), abs=0.04)


def test_two_of_four_may_fail_and_the_other_two_are_used_even_when_they_fail_as_well() -> None:
    pool = pool_of_four()
    simulation = Simulation(pool, per_s=40.0)
    simulation.broken = set(pool)
    simulation.run(30.0)
    counts = Counter(change for _, change in simulation.changes)
    assert counts[Change.SPARED] == 2
    assert sum(each.health.out for each in pool) == 2
    simulation.broken = set()
    simulation.run(300.0)
    assert {each.health.state(simulation.now) for each in pool} == {HealthState.HEALTHY}
    for each in pool:
        assert simulation.share_of(each, 200.0, 300.0) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("at_once", [0.1, 1.0, 3.0, 8.0, 20.0, 60.0])
def test_a_reduced_share_gets_about_its_due_at_any_load(share: float, at_once: float) -> None:
    """Slow start held still. With (in flight + 1) / (weight x share) it would get nothing below twenty at once."""
    pool = pool_of_four(Rules(slow_start_floor=share, slow_start_s=1e12))
    pool[0].health.warm_from = 0.0
    simulation = Simulation(pool, at_once)
    requests = 8000
    simulation.run(requests / at_once)
    due = share / (3.0 + share)
    assert 0.75 * due < simulation.share_of(pool[0], 0.0, simulation.now) < 2.0 * due
    assert simulation.share_of(pool[0], 0.0, simulation.now) < share
