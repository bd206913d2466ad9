"""The event loop: one heap of what happens next, and what became of every request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import Any, TypeAlias

from loadtests.simulator.engine import Engine, Sequence
from loadtests.simulator.fleet import Fault, Fleet
from loadtests.simulator.gateway import Gateway, report_of
from loadtests.simulator.traffic import Job, Workload
from routing.sharing import HEARTBEAT_S
from routing.types import Chooser, InferenceRequest, Replica

MakeChooser: TypeAlias = Callable[[Random], Chooser]


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds, as its gateway sees them."""

    job: Job
    sent: float
    replica: int = -1
    first: float = -1.0
    end: float = -1.0
    cached: int = 0
    believed: int = 0
    """Tokens that the gateway took to be cached."""
    predicted_ttft_ms: float | None = None
    attempts: int = 0
    failed: bool = False

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.sent) * 1000.0

    @property
    def total_ms(self) -> float:
        return (self.end - self.sent) * 1000.0


@dataclass(slots=True)
class Result:
    outcomes: list[Outcome]
    """In order of the workload's jobs."""
    engines: list[Engine]
    gateways: list[Gateway]
    end: float
    counts: list[int] = field(default_factory=list)
    """Requests dispatched to each replica."""


@dataclass(slots=True)
class _Attempt:
    gateway: Gateway
    request: InferenceRequest
    outcome: Outcome
    number: int
    half_rtt: float
    tried: list[Replica]
    over: bool = False


class Simulation:
    def __init__(
        self, workload: Workload, fleet: Fleet, make: MakeChooser, seed: int, *, jump: bool = True, concurrency: int = 0
    ) -> None:
        """`concurrency`: above 0, the jobs are sent in their order as soon as fewer than so many are under way, at
        whatever times."""
        self._fleet = fleet
        self._jobs = workload.jobs
        self._concurrency = concurrency
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._order = 0
        self._left = len(workload.jobs)
        self._now = 0.0
        self._engines = [Engine(seat.constants, self._first, self._finish, jump=jump) for seat in fleet.seats]
        self._plans = [0] * len(self._engines)
        self._down: set[int] = set()
        self._epochs = [0] * len(self._engines)
        self._before: list[tuple[float, int]] = [(0.0, 0)] * len(self._engines)
        self._gateways: dict[str, list[Gateway]] = {
            origin: [
                Gateway(f"g{origin}{number}", origin, fleet, workload, make(Random(f"{seed} {origin} {number}")), seed)
                for number in range(fleet.gateways)
            ]
            for origin in fleet.origins
        }
        self._all = [gateway for group in self._gateways.values() for gateway in group]
        self._outcomes: dict[int, Outcome] = {}
        self._counts = [0] * len(self._engines)
        self._next = 0
        self._followers: dict[int, list[Job]] = {}
        self._adapters = bool(workload.adapters)

    def run(self) -> Result:
        first = self._jobs[0].at if self._jobs and not self._concurrency else 0.0
        if len(self._all) > 1 and self._fleet.gossip is not None:
            for number, gateway in enumerate(self._all):
                gateway.share(number, partial(self._woken, gateway))
                self._at(first + HEARTBEAT_S * (number + 1) / len(self._all), self._beat, gateway)
        if self._concurrency:
            for _ in range(self._concurrency):
                self._arrive_next(0.0)
        else:
            for job in self._jobs:
                if job.after is not None:
                    self._followers.setdefault(job.after, []).append(job)
            self._schedule_next(first)
        for fault in self._fleet.faults:
            self._at(fault.at, self._fault, fault)
        if self._fleet.report_s:
            for number in range(len(self._engines)):
                phase = self._fleet.report_s * (number + 1) / len(self._engines)
                self._at(first + phase, self._report, number)
        heap = self._heap
        self._now = now = first
        while self._left and heap:
            now, _, act, subject = heappop(heap)
            self._now = now
            act(subject, now)
        outcomes = [self._outcomes[job.index] for job in self._jobs]
        return Result(outcomes, self._engines, self._all, now, self._counts)

    def _at(self, time: float, act: Callable[[Any, float], None], subject: object) -> None:
        self._order += 1
        heappush(self._heap, (time, self._order, act, subject))

    # --- arrivals

    def _schedule_next(self, now: float) -> None:
        jobs = self._jobs
        while self._next < len(jobs):
            job = jobs[self._next]
            self._next += 1
            if job.after is None:
                self._at(max(now, job.at), self._arrive_and_schedule, job)
                return

    def _arrive_and_schedule(self, job: Job, now: float) -> None:
        self._schedule_next(now)
        self._arrive(job, now)

    def _arrive_next(self, now: float) -> None:
        if self._next < len(self._jobs):
            job = self._jobs[self._next]
            self._next += 1
            self._at(now, self._arrive, job)

    def _arrive(self, job: Job, now: float) -> None:
        group = self._gateways[job.origin]
        gateway = group[int(job.gateway * len(group))]
        outcome = self._outcomes[job.index] = Outcome(job, now)
        self._try(gateway, job.request(), outcome, [], now)

    # --- one attempt

    def _try(
        self, gateway: Gateway, request: InferenceRequest, outcome: Outcome, tried: list[Replica], now: float
    ) -> None:
        decision = gateway.decide(request, now, tried) if outcome.attempts < self._fleet.attempts else None
        if decision is None or decision.replica is None:
            self._end(outcome, now, failed=True)
            return
        number = gateway.numbers[decision.replica]
        outcome.attempts += 1
        outcome.replica = number
        outcome.believed = decision.cached_tokens
        outcome.predicted_ttft_ms = decision.predicted_ttft_ms
        self._counts[number] += 1
        gateway.dispatched(request, number, decision, now)
        half = self._fleet.rtt(gateway.origin, self._fleet.seats[number].region) / 2000.0
        attempt = _Attempt(gateway, request, outcome, number, half, tried)
        self._at(now + half, self._submit, attempt)

    def _submit(self, attempt: _Attempt, now: float) -> None:
        number = attempt.number
        if number in self._down:
            self._at(now + attempt.half_rtt, self._lost, attempt)
            return
        engine = self._engines[number]
        self._plan(number, engine.submit(Sequence(attempt.outcome.job, attempt), now))
        if self._adapters:
            self._show_adapters(number, attempt.outcome.job.adapter)

    def _first(self, sequence: Sequence, now: float) -> None:
        attempt: _Attempt = sequence.tag
        self._at(now + attempt.half_rtt, self._seen_first, attempt)

    def _seen_first(self, attempt: _Attempt, now: float) -> None:
        if not attempt.over:
            attempt.outcome.first = now
            attempt.gateway.first_token(attempt.request, attempt.number, now)

    def _finish(self, sequence: Sequence, now: float) -> None:
        attempt: _Attempt = sequence.tag
        self._at(now + attempt.half_rtt, self._seen_finish, (attempt, sequence.cached))

    def _seen_finish(self, subject: tuple[_Attempt, int], now: float) -> None:
        attempt, cached = subject
        attempt.over = True
        outcome = attempt.outcome
        outcome.cached = cached
        attempt.gateway.finished(attempt.request, attempt.number, now, cached, outcome.job.output_tokens)
        self._end(outcome, now, failed=False)

    def _lost(self, attempt: _Attempt, now: float) -> None:
        attempt.over = True
        attempt.gateway.failed(attempt.request, attempt.number, now)
        if attempt.outcome.first >= 0.0:  # it cannot be tried again: a part of the answer has been passed on
            self._end(attempt.outcome, now, failed=True)
            return
        tried = [*attempt.tried, attempt.gateway.replicas[attempt.number]]
        self._try(attempt.gateway, attempt.request, attempt.outcome, tried, now)

    def _end(self, outcome: Outcome, now: float, *, failed: bool) -> None:
        outcome.failed = failed
        outcome.end = now
        self._left -= 1
        if self._concurrency:
            self._arrive_next(now)
        for job in self._followers.pop(outcome.job.index, ()):
            self._at(max(job.at, now + job.pause_s), self._arrive, job)

    # --- engines

    def _plan(self, number: int, time: float | None) -> None:
        if time is not None:
            self._plans[number] += 1
            self._at(time, self._wake, (number, self._plans[number]))

    def _wake(self, subject: tuple[int, int], now: float) -> None:
        number, plan = subject
        if plan == self._plans[number]:
            self._plan(number, self._engines[number].wake(now))

    def _report(self, number: int, now: float) -> None:
        if number not in self._down:
            engine = self._engines[number]
            load = report_of(engine, now, self._before[number])
            self._before[number] = (engine.prefill_busy_ms, engine.prefilled_tokens)
            for gateway in self._all:
                gateway.reported(number, load, str(self._epochs[number]))
            if self._adapters:
                self._show_adapters(number, None)
        self._at(now + self._fleet.report_s, self._report, number)

    def _show_adapters(self, number: int, wanted: str | None) -> None:
        """Gateways load adapters themselves, so they know of each at once."""
        names = frozenset(self._engines[number].loaded)
        loading = frozenset() if wanted is None or wanted in names else frozenset((wanted,))
        for gateway in self._all:
            replica = gateway.replicas[number]
            if names != replica.adapters:
                replica.shelf.begin(names, replica.adapters, self._now)
            replica.adapters = names
            replica.loading = loading

    def _fault(self, fault: Fault, now: float) -> None:
        number = fault.replica
        engine = self._engines[number]
        if fault.kind == "crash":
            self._down.add(number)
            self._plans[number] += 1
            for sequence in engine.crash():
                attempt: _Attempt = sequence.tag
                self._at(now + attempt.half_rtt, self._lost, attempt)
            self._at(now + fault.lasts_s, self._restart, number)
        elif fault.kind == "flush":
            engine.cache.flush()
            self._epochs[number] += 1
        elif fault.kind == "slow":
            engine.slowness = fault.factor
            self._plan(number, engine.interrupt(now))
            self._at(now + fault.lasts_s, self._recover, number)
        else:
            raise ValueError(f"no fault is called {fault.kind!r}")

    def _restart(self, number: int, now: float) -> None:
        self._down.discard(number)
        self._epochs[number] += 1

    def _recover(self, number: int, now: float) -> None:
        self._engines[number].slowness = 1.0
        self._plan(number, self._engines[number].interrupt(now))

    # --- gossip

    def _woken(self, gateway: Gateway, at_once: bool) -> None:
        gossip = self._fleet.gossip
        if gossip is not None:
            self._at(self._now + (0.0 if at_once else gossip.coalesce_ms / 1000.0), self._flush, gateway)

    def _flush(self, gateway: Gateway, now: float) -> None:
        if gateway.peerage is not None:
            self._tell(gateway, gateway.peerage.pack(), now)

    def _beat(self, gateway: Gateway, now: float) -> None:
        if gateway.peerage is not None:
            gateway.peerage.expire(now)
            self._tell(gateway, gateway.peerage.pack(heartbeat=True), now)
        self._at(now + HEARTBEAT_S, self._beat, gateway)

    def _tell(self, gateway: Gateway, messages: list[bytes], now: float) -> None:
        gossip = self._fleet.gossip
        if messages and gossip is not None:
            self._at(now + gossip.delay_ms / 1000.0, self._heard, (gateway, messages))

    def _heard(self, subject: tuple[Gateway, list[bytes]], now: float) -> None:
        sender, messages = subject
        for gateway in self._all:
            if gateway is not sender and gateway.peerage is not None:
                for message in messages:
                    gateway.peerage.absorb(message, now)
