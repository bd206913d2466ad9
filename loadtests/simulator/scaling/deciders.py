"""Who says how many replicas there should be: the one of this gateway, and what others do, by their documentation.

Each is told the same every ten seconds. Those of others are given what an operator would have to find out first: how
many requests a replica really holds. The one of this gateway is told what engines say, and finds out itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, sqrt
from typing import Protocol

from loadtests.simulator.engine import Constants
from loadtests.simulator.scaling.pool import Pool, Starts, Work, carried, percentile, slots_of
from routing.scaling import Demand, Learned, Rules, Scaler

PERIOD_S = 10
USE = 0.7
KEPT_EVERY_S = 60
"""As a gateway does; a kill loses as much."""


class Decider(Protocol):
    def __call__(self, pool: Pool, now: int) -> int:
        """How many there should be, those that start included."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a decider is made from."""

    engine: Constants
    work: Work
    starts: Starts
    rate: Callable[[float], float]
    """As it will be, by seconds from the beginning, its wandering included; only what knows the future may look."""
    hours: float
    rules: Rules


class Tidegate:
    """The production code."""

    def __init__(self, setting: Setting) -> None:
        self.scaler = Scaler(setting.rules)
        self._setting = setting
        self.kept: tuple[int, Learned] | None = None
        """What a file would have, and since when."""

    def __call__(self, pool: Pool, now: int) -> int:
        work, period = self._setting.work, pool.told()
        for took in period.learned:
            self.scaler.learned_start(took)
        tokens = work.prompt_tokens + work.output_tokens
        seconds = max(period.seconds, 1)
        demand = Demand(
            at_s=float(now),
            arrivals_per_s=period.came / seconds,
            arrival_tokens_per_s=period.came * tokens / seconds,
            in_flight=pool.running,
            waiting=pool.waiting,
            queue_wait_p90_s=percentile(period.waits, 0.9),
            ttft_p90_ms=percentile(period.firsts, 0.9),
            predicted_ttft_ms=pool.predicted_ms() if pool.ready else None,
            kv_use=pool.kv_use,
            replicas_ready=pool.ready,
            replicas_starting=pool.starting,
            capacity_requests=float(self._setting.engine.max_running),
            tokens_per_s=period.served * tokens / seconds,
            served_per_s=period.served / seconds,
            spilled_per_s=period.rented / seconds,
            spill_usd_per_hour=3600.0 * pool.prices.rented_usd * period.rented / seconds,
        )
        count = self.scaler.decide(demand, float(now)).count
        if not now % KEPT_EVERY_S:
            self.kept = now, self.scaler.learned(float(now))
        return count


def again(decider: Decider, setting: Setting, now: int, *, remembers: bool) -> Tidegate:
    """The same after a restart of the gateway, with what it has learned or without. Start times are kept in any case,
    as they were before anything else was."""
    if not isinstance(decider, Tidegate) or decider.kept is None:
        raise ValueError("only tidegate is started again, and not within its first minute")
    made = Tidegate(setting)
    at, learned = decider.kept
    if remembers:
        made.scaler.restore(learned, float(now - at), float(now))
    else:
        for took in learned.starts:
            made.scaler.learned_start(took)
    return made


class Fixed:
    """Always as many."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, pool: Pool, now: int) -> int:
        pool.told()
        return self.count


class Kubernetes:
    """A HorizontalPodAutoscaler with its defaults, on requests that run and wait, 70 % of what a replica holds.

    ceil(total / target); none within a tenth; at most twice as many or four more in 15 s; down to the most that was
    wanted in 300 s. https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
    """

    every_s = 15

    def __init__(self, setting: Setting) -> None:
        self._rules = setting.rules
        self._target = self.target(setting)
        self._wanted: deque[tuple[int, int]] = deque()
        self._count: int | None = None
        self._next = 0

    def target(self, setting: Setting) -> float:
        return USE * slots_of(setting.engine, setting.work)

    def metric(self, pool: Pool) -> float:
        return float(pool.running + pool.waiting)

    def __call__(self, pool: Pool, now: int) -> int:
        pool.told()
        count = self._count if self._count is not None else pool.ready + pool.starting
        if now >= self._next:
            self._next = now + self.every_s
            want = self.metric(pool) / self._target
            wanted = count if abs(want - count) <= 0.1 * count else ceil(want)
            self._wanted.append((now, wanted))
            while self._wanted[0][0] <= now - 300:
                self._wanted.popleft()
            if wanted > count:
                count = min(wanted, max(2 * count, count + 4))
            else:
                count = min(count, max(each for _, each in self._wanted))
        self._count = min(max(count, self._rules.min), self._rules.ceiling)
        return self._count


class Keda(Kubernetes):
    """KEDA on the length of the queue, five waiting requests a replica, as examples for vLLM do it. What runs is not in
    it. https://keda.sh/docs/latest/concepts/scaling-deployments/"""

    def target(self, setting: Setting) -> float:
        return 5.0

    def metric(self, pool: Pool) -> float:
        return float(pool.waiting)


class Knative:
    """Knative's autoscaler on concurrency, 70 %: mean of 60 s; of 6 s as long as that asks for twice what is ready, and
    for 60 s after; then nothing is taken away. https://knative.dev/docs/serving/autoscaling/kpa-specific/"""

    def __init__(self, setting: Setting) -> None:
        self._rules = setting.rules
        self._target = USE * slots_of(setting.engine, setting.work)
        self._seen: deque[tuple[int, float]] = deque()
        self._panic_until = -1
        self._most = 0

    def __call__(self, pool: Pool, now: int) -> int:
        pool.told()
        self._seen.append((now, float(pool.running + pool.waiting)))
        while self._seen[0][0] <= now - 60:
            self._seen.popleft()
        stable = sum(value for _, value in self._seen) / len(self._seen)
        ready = max(pool.ready, 1)
        lowest = ready // 2
        want = max(ceil(stable / self._target), lowest)
        burst = ceil(self._seen[-1][1] / self._target)
        if burst >= 2 * ready:
            if now > self._panic_until:
                self._most = 0
            self._panic_until = now + 60
        if now <= self._panic_until:
            self._most = max(self._most, want, burst, ready)
            want = self._most
        return min(max(want, self._rules.min), self._rules.ceiling)


class Oracle:
    """Knows the rates that come, and how long starts take: the fewest with which nobody waits, in time."""

    def __init__(self, setting: Setting, step_s: int = 60) -> None:
        ahead = int(setting.starts.share(0.99) + setting.starts.half_s) // step_s + 1
        steps = int(setting.hours * 3600.0) // step_s + 1
        rates = _rates(setting)
        every = step_s // PERIOD_S
        needs = [
            _needed(setting, max(rates[number * every : (number + 1) * every], default=0.0)) for number in range(steps)
        ]
        floor, ceiling = setting.rules.min, setting.rules.ceiling
        self._step_s = step_s
        self._counts = [min(max(floor, *needs[number : number + ahead + 1]), ceiling) for number in range(steps)]

    def __call__(self, pool: Pool, now: int) -> int:
        pool.told()
        return self._counts[min(now // self._step_s, len(self._counts) - 1)]


@lru_cache(maxsize=4096)
def needed(engine: Constants, work: Work, per_s: float) -> int:
    """The fewest replicas that have a place at once for nearly all of so many requests a second.

    Those under way vary by the root of their number; three times that has to fit as well."""
    slots = slots_of(engine, work)
    count = 1
    while True:
        each = carried(engine, work, per_s / count)
        if count * each + 3.0 * sqrt(count * each) <= count * slots:
            return count
        count += 1


def deciders() -> dict[str, Callable[[Setting], Decider]]:
    """By name, in the order of the tables."""

    def peak(setting: Setting) -> Decider:
        return Fixed(_needed(setting, max(_rates(setting))))

    def average(setting: Setting) -> Decider:
        rates = _rates(setting)
        return Fixed(_needed(setting, sum(rates) / len(rates)))

    return {
        "tidegate": Tidegate,
        "static, peak": peak,
        "static, mean": average,
        "HPA": Kubernetes,
        "KEDA": Keda,
        "Knative": Knative,
        "oracle": Oracle,
    }


def _needed(setting: Setting, per_s: float) -> int:
    return needed(setting.engine, setting.work, round(per_s, 1))


def _rates(setting: Setting) -> list[float]:
    """The rate of each period, as it will be."""
    return [setting.rate(float(at)) for at in range(0, int(setting.hours * 3600.0), PERIOD_S)]
