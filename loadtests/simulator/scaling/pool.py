"""A pool of equal replicas, second by second: what runs, what waits, what starts, what it costs.

    iteration(b) = step_ms + b (request_ms + kv_ms context) + b prompt prefill_ms / output
    time in service(b) = output iteration(b)

for b requests in a replica: its decode steps, and the prompts of those that take the places of the ones that end, as
continuous batching mixes them. Ends are a Poisson process of running / time in service: lengths are exponential. First
tokens take what is waited for a place, one's own prompt, and those that are prefilled at the same time (an M/G/1 queue
of prompts whose lengths vary as much as exponential ones). Prompts share no prefixes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp, log
from random import Random

from loadtests.simulator.engine import WATERMARK, Constants

SPREAD = (0.182, 0.693, 1.792)
"""An exponential distribution in thirds: the middle of each."""
AGE = 0.8
"""Part of a mean answer that a running request has got: (1 + c^2) / 2 with c^2 = 0.6, as long ones run for longer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What requests are like, and what they are worth. Tokens are means."""

    prompt_tokens: float = 2000.0
    output_tokens: float = 1500.0
    target_ms: float = 2000.0
    patience_s: int = 60
    """Who waits for longer leaves."""


@dataclass(frozen=True, slots=True)
class Prices:
    replica_usd_per_hour: float = 4.0
    """From its order until it has drained."""
    rented_usd: float = 0.00325
    """A request at a hosted endpoint: 2,000 tokens at 0.50 USD and 1,500 at 1.50 a million."""
    rented_ttft_ms: float = 800.0


@dataclass(frozen=True, slots=True)
class Starts:
    """How replicas come: log-normal times, some for nothing, and half of the share for a while."""

    median_s: float = 240.0
    sigma: float = 0.25
    fails: float = 0.03
    half_s: float = 60.0

    def draw(self, rng: Random) -> float:
        return self.median_s * rng.lognormvariate(0.0, self.sigma)

    def share(self, part: float) -> float:
        """Seconds within which `part` of them have come, for 0.8 and 0.99."""
        return self.median_s * exp(self.sigma * {0.8: 0.8416, 0.99: 2.3263}[part])


@dataclass(slots=True)
class Period:
    """What was seen since it was asked for last."""

    seconds: int = 0
    came: int = 0
    served: int = 0
    rented: int = 0
    firsts: list[tuple[float, float]] = field(default_factory=list)
    """Milliseconds to the first token, of how many."""
    waits: list[tuple[float, float]] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    """What starts took."""


@dataclass(slots=True)
class Totals:
    came: int = 0
    within: float = 0.0
    left: int = 0
    """Requests whose users gave up."""
    rented: int = 0
    replica_s: float = 0.0
    most: int = 0
    changes: int = 0
    longest_wait_s: float = 0.0
    firsts: dict[int, float] = field(default_factory=dict)
    """Requests by time to first token, in steps of 5 %; those who left count as endless."""
    late_minutes: int = 0
    """Minutes in which fewer than nine of ten were within the target."""


class Pool:
    def __init__(
        self, engine: Constants, work: Work, starts: Starts, prices: Prices, rng: Random, *, replicas: int, spill: bool
    ) -> None:
        self.engine, self.work, self.starts, self.prices = engine, work, starts, prices
        self.spill = spill
        self._rng = rng
        self.now = 0
        self.ready = replicas
        self.running = 0
        self.waiting = 0
        self.slots = slots_of(engine, work)
        self._queue: deque[list[int]] = deque()
        """[second, requests]"""
        self._coming: list[tuple[float, float, bool]] = []
        """When, ordered when, whether it works."""
        self._young: deque[float] = deque()
        self._draining: deque[tuple[float, int]] = deque()
        self._rate = 0.0
        self._wanted = replicas
        self.period = Period()
        self.totals = Totals(most=replicas)
        self._minute = [0, 0.0]
        self._spilling = False

    @property
    def starting(self) -> int:
        return len(self._coming)

    @property
    def kv_use(self) -> float:
        if not self.ready:
            return 0.0
        held = self.running / self.ready * context_of(self.work)
        return min(1.0, held / self.engine.kv_tokens)

    def service_s(self) -> float:
        each = min(self.running / self.ready, self.slots) if self.ready else 0.0
        return service_of(self.engine, self.work, each)

    def predicted_ms(self) -> float:
        """What the next request has to expect."""
        if not self.ready:
            return 1e6
        free = self._places() - self.running - self.waiting
        if free > 0:
            return self._prefill_ms()[0]
        return 1000.0 * (1 - free) * self.service_s() / max(self._places(), 1.0) + self._prefill_ms()[0]

    def order(self, count: int) -> None:
        """There are to be so many, those that start included."""
        there = self.ready + len(self._coming)
        if count != self._wanted:
            self.totals.changes += 1
            self._wanted = count
        self.totals.most = max(self.totals.most, count)
        for _ in range(count - there):
            took = self.starts.draw(self._rng)
            self._coming.append((self.now + took, float(self.now), self._rng.random() >= self.starts.fails))
        if count < there:
            going = there - count
            self._coming.sort()
            while going and self._coming:  # those that would come last go first: they serve nobody
                self._coming.pop()
                going -= 1
            if going:
                self.ready -= going
                for _ in range(min(going, len(self._young))):
                    self._young.pop()
                self._draining.append((self.now + self.service_s(), going))

    def second(self, came: int) -> None:
        """One second, in which so many requests come."""
        self.now += 1
        now, rng, totals, period = self.now, self._rng, self.totals, self.period
        self._come()
        totals.came += came
        period.came += came
        period.seconds += 1
        ended = min(self.running, poisson(self.running / self.service_s(), rng)) if self.running else 0
        self.running -= ended
        period.served += ended
        if came and self.spill and self._leaves():
            totals.rented += came
            period.rented += came
            self._first(self.prices.rented_ttft_ms, came, came)
        elif came:
            self._queue.append([now, came])
            self.waiting += came
        self._admit()
        while self._queue and now - self._queue[0][0] >= self.work.patience_s:
            _, left = self._queue.popleft()
            self.waiting -= left
            totals.left += left
            self._first(1e9, left, 0)
            period.waits.append((float(self.work.patience_s), left))
            totals.longest_wait_s = float(self.work.patience_s)
        while self._draining and self._draining[0][0] <= now:
            self._draining.popleft()
        totals.replica_s += self.ready + len(self._coming) + sum(each for _, each in self._draining)
        if not now % 60:
            if self._minute[0] and self._minute[1] < 0.9 * self._minute[0]:
                totals.late_minutes += 1
            self._minute = [0, 0.0]

    def told(self) -> Period:
        """What was seen since the last time."""
        found, self.period = self.period, Period()
        return found

    def _come(self) -> None:
        now = self.now
        if self._coming:
            there = [each for each in self._coming if each[0] <= now]
            if there:
                self._coming = [each for each in self._coming if each[0] > now]
                for _, ordered, works in there:
                    if works:
                        self.ready += 1
                        self._young.append(now + self.starts.half_s)
                        self.period.learned.append(now - ordered)
                    else:
                        took = self.starts.draw(self._rng)
                        self._coming.append((now + took, float(now), self._rng.random() >= self.starts.fails))
        while self._young and self._young[0] <= now:
            self._young.popleft()

    def _places(self) -> float:
        return (self.ready - 0.5 * len(self._young)) * self.slots

    def _leaves(self) -> bool:
        """As `routing.spill`: from 1.2 times the target on, until 0.8 times."""
        predicted, target = self.predicted_ms(), self.work.target_ms
        self._spilling = predicted > (0.8 if self._spilling else 1.2) * target
        return self._spilling

    def _admit(self) -> None:
        free = int(self._places()) - self.running
        admitted = 0
        base, others = self._prefill_ms()
        while free > 0 and self._queue:
            cohort = self._queue[0]
            take = min(free, cohort[1])
            wait_s = float(self.now - cohort[0])
            free -= take
            admitted += take
            self.period.waits.append((wait_s, take))
            self.totals.longest_wait_s = max(self.totals.longest_wait_s, wait_s)
            for part in SPREAD:
                self._first(1000.0 * wait_s + base + others * part, take / len(SPREAD), take / len(SPREAD))
            if take == cohort[1]:
                self._queue.popleft()
            else:
                cohort[1] -= take
        self.running += admitted
        self.waiting -= admitted
        self._rate += 0.1 * (admitted - self._rate)

    def _prefill_ms(self) -> tuple[float, float]:
        """One's own prompt and the step it is in; those that are before it, in the mean."""
        own = self.work.prompt_tokens * self.engine.prefill_ms
        step = self.engine.step_ms
        if not self.ready:
            return own + step, 0.0
        use = min(0.95, self._rate / self.ready * own / 1000.0)
        return own + step, own * use / (1.0 - use)

    def _first(self, ttft_ms: float, of: float, counted: float) -> None:
        within = counted if ttft_ms <= self.work.target_ms else 0.0
        self.totals.within += within
        self._minute[0] += of
        self._minute[1] += within
        self.period.firsts.append((ttft_ms, of))
        step = _step(int(ttft_ms))
        self.totals.firsts[step] = self.totals.firsts.get(step, 0.0) + of


@lru_cache(maxsize=65_536)
def _step(ttft_ms: int) -> int:
    return int(log(max(ttft_ms, 1)) / log(1.05))


def context_of(work: Work) -> float:
    """Tokens that a running request holds in the KV cache, in the mean."""
    return work.prompt_tokens + AGE * work.output_tokens


def slots_of(engine: Constants, work: Work) -> int:
    """Requests that one replica runs at once: by its setting, or by its KV cache."""
    return min(engine.max_running, int((1.0 - WATERMARK) * engine.kv_tokens / context_of(work)))


def service_of(engine: Constants, work: Work, each: float) -> float:
    """Seconds that a request is in a replica with so many of them."""
    step = engine.step_ms + each * (engine.request_ms + engine.kv_ms * context_of(work))
    return work.output_tokens * (step + each * work.prompt_tokens * engine.prefill_ms / work.output_tokens) / 1000.0


def carried(engine: Constants, work: Work, per_s: float) -> float:
    """Requests in one replica that so many a second come to; endless where it cannot serve them."""
    # each = rate * service(each), and service is linear in each.
    fixed = service_of(engine, work, 0.0)
    slope = service_of(engine, work, 1.0) - fixed
    return per_s * fixed / (1.0 - per_s * slope) if per_s * slope < 1.0 else float("inf")


def percentile(counted: list[tuple[float, float]], part: float) -> float | None:
    total = sum(count for _, count in counted)
    if not total:
        return None
    before = 0.0
    for value, count in sorted(counted):
        before += count
        if before >= part * total:
            return value
    return max(counted)[0]


def poisson(mean: float, rng: Random) -> int:
    if mean > 30.0:
        return max(0, round(rng.gauss(mean, mean**0.5)))
    limit, count, product = exp(-mean), 0, rng.random()
    while product > limit:
        count += 1
        product *= rng.random()
    return count
