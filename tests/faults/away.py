"""A load that goes on while Redis is away, as the gateway's does, and what is read from it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.store.limits import Rate, Scope, Unit
from loadtests import hammer_runs as runs
from loadtests.hammer_bounds import allowed, percentile
from loadtests.hammer_jobs import ADMITTED, LOCAL, LOCAL_REFUSED, REFUSED, UNAVAILABLE, Call, LimitJob, LimitResult
from loadtests.hammer_runs import Shape, Target

PROCESSES, TASKS = 4, 8
BURST, PER_MINUTE = 200, 6000
SHARED = (ADMITTED, REFUSED)
AWAY = (UNAVAILABLE, LOCAL, LOCAL_REFUSED)
BACK_WITHIN_S = 2.0
BUSY_S = 1.0
"""What a machine with two busy cores may add to any wait."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What a run with an outage showed. Times are monotonic µs."""

    results: list[LimitResult]
    took_us: int
    """By a clock that the outage does not touch."""
    key: str

    def calls(self, *outcomes: int, since_us: int = 0, until_us: int = 2**62) -> list[Call]:
        """Calls that began between the two."""
        found = [call for result in self.results for call in result.calls if since_us <= call.at_us <= until_us]
        return [call for call in found if not outcomes or call.outcome in outcomes]

    @property
    def shared(self) -> int:
        """Admitted by Redis."""
        return len(runs.events(self.results))

    @property
    def local(self) -> int:
        return sum(result.local for result in self.results)

    def back_after_s(self, back_us: int) -> float:
        """From Redis' return until the last process had an answer of it; infinite if one never had."""
        firsts = []
        for result in self.results:
            answered = [call.at_us + call.took_us for call in result.calls if call.outcome in SHARED]
            firsts.append(min((at_us for at_us in answered if at_us >= back_us), default=2**62))
        return float("inf") if max(firsts) == 2**62 else (max(firsts) - back_us) / 1e6

    def away_us(self) -> int:
        """From the first call that found no Redis to the last one, over all processes."""
        away = self.calls(*AWAY)
        return away[-1].at_us - away[0].at_us if (away := sorted(away, key=lambda call: call.at_us)) else 0

    def errors(self) -> list[str]:
        return [error for result in self.results for error in result.errors]

    def took_ms(self, percent: float, **between: int) -> float:
        return percentile([call.took_us / 1000 for call in self.calls(**between)], percent)


def local_bound(outage_us: int) -> int:
    """What the processes may admit by themselves in so long an outage: one burst and the rate, all shares together.

    Each outage that a process sees begins with a full share, and each share is rounded up to a whole request.
    """
    return allowed(BURST, PER_MINUTE, outage_us) + PROCESSES


def run_outage(target: Target, seconds: float, meanwhile: Callable[[], None], now_us: Callable[[], int]) -> Outage:
    """Four processes ask for one key while `meanwhile` breaks things; each goes on with its quarter of the limit."""
    key = runs.fresh_key()
    scope = Scope(key, rates=(Rate(Unit.REQUESTS, PER_MINUTE, BURST, BURST),), concurrent=64)
    share = Scope(
        key,
        rates=(Rate(Unit.REQUESTS, PER_MINUTE // PROCESSES, BURST // PROCESSES, BURST // PROCESSES),),
        concurrent=64 // PROCESSES,
    )
    job = LimitJob(target.reach, (scope,), local=(share,), hold_ms=(1.0, 5.0), pause_ms=5.0, lease_us=3_000_000)
    begin_us = now_us()
    results, _ = runs.race(target, job, Shape(PROCESSES, TASKS, seconds), meanwhile)
    return Outage(results, now_us() - begin_us, key)


def unanswered(results: Sequence[LimitResult]) -> int:
    """Processes that answered nothing at all."""
    return sum(not result.calls for result in results)
