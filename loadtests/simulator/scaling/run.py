"""Runs one decider over one course of arrivals, and says what came of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from loadtests.simulator.fleet import DEFAULT_ENGINE, engine_named
from loadtests.simulator.scaling.arrivals import Noise, courses
from loadtests.simulator.scaling.deciders import PERIOD_S, Setting, again, deciders
from loadtests.simulator.scaling.pool import Pool, Prices, Starts, Totals, Work, poisson
from routing.scaling import Rules

MAX = 64
SAMPLE_S = 120
AWAY_S = 30
"""From a kill of the gateway to its first decision."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is run. Equal but for the decider: equal rates and equal noise."""

    course: str
    decider: str
    seed: int = 1
    spill: bool = False
    floor: int = 1
    hours: float | None = None
    """None: all of the course."""
    begin_h: float = 0.0
    sample: bool = False
    """Keep what it looked like, for a plot."""
    engine: str = DEFAULT_ENGINE
    lead_s: float = 240.0
    rules: tuple[tuple[str, float], ...] = ()
    """Rules that are not the default's."""
    count_from_h: float = 0.0
    """Hours after the beginning from which on it is counted."""
    restart: str = ""
    """Then the gateway is killed and started again: "with" or "without" what it has learned; empty: it is not."""


@dataclass(slots=True)
class Figures:
    """What came of it. Shares are 0 to 1."""

    within: float
    """Requests whose first token came within the target."""
    p90_ms: float
    p99_ms: float
    late_minutes: float
    replica_hours: float
    usd: float
    """With what was rented."""
    rented_share: float
    left_share: float
    changes: float
    most: float
    longest_wait_s: float
    samples: list[tuple[float, float, int, float]] = field(default_factory=list)
    """Hour, requests a second, replicas that are ready, share within the target; means of `SAMPLE_S`."""


def run(what: Run) -> Figures:
    course = courses()[what.course]
    begin, hours = what.begin_h * 3600.0, what.hours or course.hours - what.begin_h
    work, prices, starts = Work(), Prices(), Starts(median_s=what.lead_s)
    engine = engine_named(what.engine)
    rules = Rules(
        **{  # type: ignore[arg-type]
            "max": MAX,
            "min": what.floor,
            "ttft_target_ms": work.target_ms,
            "usd_per_hour": prices.replica_usd_per_hour,
            **dict(what.rules),
        }
    )
    noise = Noise(Random(f"noise {what.course} {what.seed}"))
    factors = [noise.next() for _ in range(int(hours * 3600.0) // PERIOD_S + 2)]

    def rate(at: float) -> float:
        return course.rate(begin + at) * factors[min(int(at) // PERIOD_S, len(factors) - 1)]

    setting = Setting(engine, work, starts, rate, hours, rules)
    decide = deciders()[what.decider](setting)
    pool = Pool(engine, work, starts, prices, Random(f"pool {what.seed}"), replicas=what.floor, spill=what.spill)
    pool.ready = max(what.floor, decide(pool, 0))
    pool.order(pool.ready)
    pool.totals = Totals(most=pool.ready)
    arrivals = Random(f"arrivals {what.course} {what.seed}")
    samples: list[tuple[float, float, int, float]] = []
    came = within = 0.0
    killed = int(what.count_from_h * 3600.0)
    for second in range(1, int(hours * 3600.0) + 1):
        pool.second(poisson(rate(second), arrivals))
        if killed and second == killed:
            pool.totals = Totals(most=pool.ready)
        if what.restart and killed <= second < killed + AWAY_S:
            continue
        if what.restart and second == killed + AWAY_S:
            decide = again(decide, setting, second, remembers=what.restart == "with")
        if not second % PERIOD_S:
            pool.order(decide(pool, second))
        if what.sample and not second % SAMPLE_S:
            new, good = pool.totals.came - came, pool.totals.within - within
            came, within = pool.totals.came, pool.totals.within
            samples.append((second / 3600.0, new / SAMPLE_S, pool.ready, min(1.0, good / new) if new else 1.0))
    return _figures(pool, prices, samples)


def _figures(pool: Pool, prices: Prices, samples: list[tuple[float, float, int, float]]) -> Figures:
    totals = pool.totals
    came = max(totals.came, 1)
    return Figures(
        within=totals.within / came,
        p90_ms=_percentile(totals, 0.9),
        p99_ms=_percentile(totals, 0.99),
        late_minutes=totals.late_minutes,
        replica_hours=totals.replica_s / 3600.0,
        usd=totals.replica_s / 3600.0 * prices.replica_usd_per_hour + totals.rented * prices.rented_usd,
        rented_share=totals.rented / came,
        left_share=totals.left / came,
        changes=totals.changes,
        most=totals.most,
        longest_wait_s=totals.longest_wait_s,
        samples=samples,
    )


def _percentile(totals: Totals, part: float) -> float:
    wanted, before = part * sum(totals.firsts.values()), 0.0
    for step in sorted(totals.firsts):
        before += totals.firsts[step]
        if before >= wanted:
            found = 1.05 ** (step + 1)
            return float("inf") if found > 1e8 else found
    return float("inf")


def run_all(what: Iterable[Run], processes: int = 2) -> Iterator[tuple[Run, Figures]]:
    """Each, in any order."""
    runs = list(what)
    if processes == 1:
        for each in runs:
            yield each, run(each)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_both, runs)


def _both(what: Run) -> tuple[Run, Figures]:
    return what, run(what)
