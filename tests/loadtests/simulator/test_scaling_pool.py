"""The coarse model of a pool beside the simulator that holds every request and every step of an engine."""

from __future__ import annotations

from random import Random

import pytest

from loadtests.simulator.fleet import Fault, Fleet, Seat, engine_named
from loadtests.simulator.generators import distinct
from loadtests.simulator.metrics import mean
from loadtests.simulator.scaling.pool import Pool, Prices, Starts, Work, carried, poisson, service_of
from loadtests.simulator.simulation import Outcome, Simulation
from loadtests.simulator.traffic import Workload
from routing.policies import make_policy

ENGINE = engine_named("8b-gpu")


def traffic(requests: int, per_s: float) -> tuple[Workload, Work]:
    workload = distinct(2000, 1500, 0.5)(requests, per_s, Random(3))
    prompt = mean([float(job.prompt_tokens) for job in workload.jobs])
    output = mean([float(job.output_tokens) for job in workload.jobs])
    return workload, Work(prompt_tokens=prompt, output_tokens=output, patience_s=3600)


def detailed(workload: Workload, replicas: int, faults: tuple[Fault, ...] = ()) -> list[Outcome]:
    fleet = Fleet(tuple(Seat(ENGINE) for _ in range(replicas)), faults=faults, told_speeds=True, attempts=replicas)
    return Simulation(workload, fleet, lambda rng: make_policy("least_outstanding", rng), 1).run().outcomes


def coarse(work: Work, rate: float, seconds: int, replicas: int) -> Pool:
    pool = Pool(ENGINE, work, Starts(fails=0.0), Prices(), Random(1), replicas=replicas, spill=False)
    rng = Random(2)
    for _ in range(seconds):
        pool.second(poisson(rate, rng))
    return pool


@pytest.mark.parametrize(("per_s", "nearly"), [(1.5, 0.1), (3.4, 0.1)])
def test_time_in_service_is_that_of_the_detailed_simulator(per_s: float, nearly: float) -> None:
    workload, work = traffic(1500, per_s)
    found = detailed(workload, 2)
    counted = found[500:1300]
    served_s = mean([each.total_ms for each in counted]) / 1000.0
    expected = service_of(ENGINE, work, carried(ENGINE, work, per_s / 2.0))
    assert served_s == pytest.approx(expected, rel=nearly)


def test_a_replica_that_joins_drains_the_queue_as_in_the_detailed_simulator() -> None:
    """One replica for ten minutes is too few; then a second one is there, for another ten."""
    per_s = 3.0
    workload, work = traffic(int(1200 * per_s), per_s)
    found = detailed(workload, 2, (Fault(0.0, 1, "crash", lasts_s=600.0),))
    pool = Pool(
        ENGINE,
        work,
        Starts(median_s=1.0, sigma=0.0, fails=0.0, half_s=0.0),
        Prices(),
        Random(1),
        replicas=1,
        spill=False,
    )
    rng = Random(2)
    late = [0.0, 0.0, 0.0, 0.0]
    for part in range(4):
        begun, within = pool.totals.came, pool.totals.within
        for second in range(300):
            if part == 2 and second == 0:
                pool.order(2)
            pool.second(poisson(per_s, rng))
        late[part] = (pool.totals.within - within) / (pool.totals.came - begun)
    theirs = []
    for part in range(4):
        mine = [each for each in found if 300.0 * part <= each.job.at < 300.0 * (part + 1)]
        theirs.append(sum(each.ttft_ms <= 2000.0 for each in mine) / len(mine))
    assert late[0] == pytest.approx(theirs[0], abs=0.1), "the one fills up after about as long"
    assert late[1] == theirs[1] == 0.0
    # Here all wait in the gateway and go to whichever is free; there they wait in the first one until it has done them.
    assert theirs[2] < late[2] < theirs[2] + 0.4
    assert late[3] > 0.99
    assert theirs[3] > 0.9
