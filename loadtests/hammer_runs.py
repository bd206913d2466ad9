"""The hammer's modes: what is asked of the limiter and the queue, and how the outcome is judged.

Each run takes a crew and a way to Redis and gives a `Finding`. Time is Redis' own: read before the first process may
begin and after the last one has ended, so that the interval of a bound is never shorter than the real one.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from gateway.store.limits import Rate, Scope, Unit
from gateway.store.places import Room
from loadtests.hammer_bounds import allowed, most_at_once, overshoot, percentile
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import Admitted, LimitJob, LimitResult, PlaceJob, PlaceResult, Reach, Served, Tenant, Tokens

LEAD_S = 0.3
"""Between telling the processes and the moment at which all begin."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How hard."""

    processes: int = 8
    tasks: int = 32
    """In each process."""
    seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one run showed."""

    name: str
    fault: str
    """What was done."""
    bound: str
    """What had to hold."""
    measured: str
    good: bool
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """A crew and the Redis that it hammers."""

    crew: Crew
    reach: Reach
    clock_us: Callable[[], int]
    """Redis' own time."""


def clock_of(client: redis.Redis) -> Callable[[], int]:
    def clock_us() -> int:
        seconds, micros = client.time()
        return int(seconds) * 1_000_000 + int(micros)

    return clock_us


def fresh_key(kind: str = "key") -> str:
    """A scope that nobody has used. Its tag is its own too."""
    return f"{{hammer-{uuid.uuid4().hex[:8]}}}:{kind}:k"


def race(
    target: Target, job: LimitJob, shape: Shape, meanwhile: Callable[[], None] | None = None
) -> tuple[list[LimitResult], int]:
    """Run the same job in every process at once; the results and the µs by Redis' clock that all of it took."""
    target.crew.gather(shape.processes)
    begin_us = target.clock_us()
    begin_at_s = time.monotonic() + LEAD_S
    jobs = [_with(job, target.reach, shape, begin_at_s) for _ in range(shape.processes)]
    results = target.crew.limits(jobs, meanwhile)
    return results, target.clock_us() - begin_us


def _with(job: LimitJob, reach: Reach, shape: Shape, begin_at_s: float) -> LimitJob:
    fields = {name: getattr(job, name) for name in LimitJob.__struct_fields__}
    changed = {"reach": reach, "tasks": shape.tasks, "seconds": shape.seconds, "begin_at_s": begin_at_s}
    return LimitJob(**{**fields, **changed})


def events(results: Sequence[LimitResult]) -> list[Admitted]:
    return sorted((event for result in results for event in result.admitted), key=lambda event: event.now_us)


def by_process(results: Sequence[LimitResult]) -> list[int]:
    return [len(result.admitted) for result in results]


def asked(results: Sequence[LimitResult]) -> int:
    return sum(len(result.calls) for result in results)


def problems(results: Sequence[LimitResult] | Sequence[PlaceResult]) -> list[str]:
    """What must never happen while nothing is broken on purpose."""
    found = [error for result in results for error in result.errors]
    for result in results:
        if isinstance(result, LimitResult) and (result.unknown or result.unsettled or result.not_found):
            found.append(f"{result.unknown} unknown, {result.unsettled} unsettled, {result.not_found} not found")
        if isinstance(result, PlaceResult) and result.unavailable:
            found.append(f"{result.unavailable} calls found no store")
    return found


def requests(target: Target, shape: Shape, burst: int = 1000, per_minute: int = 6000) -> Finding:
    """Requests per minute: exact in every interval, since nothing is ever given back."""
    scope = Scope(fresh_key(), rates=(Rate(Unit.REQUESTS, per_minute, burst, burst),))
    results, took_us = race(target, LimitJob(target.reach, (scope,)), shape)
    admitted = events(results)
    most = allowed(burst, per_minute, took_us)
    over = overshoot([(event.now_us, 1) for event in admitted], burst, per_minute)
    bad = problems(results)
    return Finding(
        "requests",
        f"{shape.processes} processes x {shape.tasks} tasks, one key: {per_minute} a minute, burst {burst}",
        f"at most {burst} + {per_minute / 60:g}/s x {took_us / 1e6:.2f} s = {most:,}; no interval over",
        f"{len(admitted):,} of {asked(results):,} asked; worst interval {over:+d}",
        # The other half of exact: a limiter that lets nothing through keeps every bound.
        len(admitted) <= most and over <= 0 and len(admitted) >= burst and not bad,
        {"admitted": len(admitted), "allowed": most, "asked": asked(results), "by_process": by_process(results),
         "overshoot": over, "seconds": took_us / 1e6, "problems": bad},
    )  # fmt: skip


def concurrency(target: Target, shape: Shape, limit: int = 64) -> Finding:
    """Requests at once, seen from both ends: what Redis counted, and what really overlapped."""
    scope = Scope(fresh_key(), concurrent=limit)
    job = LimitJob(target.reach, (scope,), hold_ms=(2.0, 20.0), pause_ms=1.0)
    results, took_us = race(target, job, shape)
    admitted = events(results)
    counted = max((event.in_use for event in admitted), default=0)
    seen = most_at_once([(event.from_us, event.to_us) for event in admitted])
    bad = problems(results)
    return Finding(
        "concurrency",
        f"{shape.processes} processes x {shape.tasks} tasks, one key: {limit} at once",
        f"never more than {limit} at once",
        f"{counted} counted by Redis, {seen} really at once, in {len(admitted):,} of {asked(results):,} asked",
        counted == limit and limit // 2 <= seen <= limit and not bad,
        {"counted": counted, "at_once": seen, "limit": limit, "admitted": len(admitted), "asked": asked(results),
         "by_process": by_process(results), "seconds": took_us / 1e6, "problems": bad},
    )  # fmt: skip


def tokens(target: Target, shape: Shape, *, hard: bool, burst: int = 100_000, per_minute: int = 600_000) -> Finding:
    """Tokens per minute with answers of unknown length. Hard: `max_tokens` is reserved. Soft: the 90th percentile."""
    prompt, longest, output = 200, 1000, Tokens(median=150, sigma=1.0, high=1000)
    reserve = longest if hard else 540
    scope = Scope(fresh_key(), rates=(Rate(Unit.TOTAL, per_minute, burst, burst),))
    job = LimitJob(
        target.reach, (scope,), prompt=prompt, reserve=reserve, output=output, hold_ms=(5.0, 60.0), pause_ms=2.0
    )
    results, took_us = race(target, job, shape)
    admitted = events(results)
    used = sum(event.used for event in admitted)
    at_once = most_at_once([(event.from_us, event.to_us) for event in admitted])
    slack = 0 if hard else shape.processes * shape.tasks * (longest - reserve)
    most = allowed(burst, per_minute, took_us)
    worst = overshoot([(event.now_us, event.used) for event in admitted], burst, per_minute)
    bad = problems(results)
    bound = f"used at most {burst:,} + {per_minute / 60:,.0f}/s x {took_us / 1e6:.2f} s = {most:,}"
    return Finding(
        f"tokens, {'hard' if hard else 'soft'}",
        f"{shape.processes} processes x {shape.tasks} tasks, one key: {per_minute:,} tokens a minute, burst {burst:,}; "
        f"{reserve} of at most {longest} output tokens reserved",
        bound if hard else f"{bound}, + {slack:,} for what is in flight (G5)",
        f"{used:,} used = {used / most:.3f} of the allowance, in {len(admitted):,} of {asked(results):,} asked",
        used <= most + slack and used >= burst // 2 and not bad,
        {"used": used, "allowed": most, "slack": slack, "ratio": used / most, "worst_interval": worst,
         "reserved": sum(event.reserved for event in admitted), "at_once": at_once, "admitted": len(admitted),
         "asked": asked(results), "by_process": by_process(results), "seconds": took_us / 1e6, "problems": bad},
    )  # fmt: skip


# -- the queue


def queue_race(
    target: Target,
    shape: Shape,
    room: Room,
    tenants: tuple[Tenant, ...],
    hold_us_per_cost: float,
    *,
    estimate: float = 1.0,
    meanwhile: Callable[[], None] | None = None,
) -> list[PlaceResult]:
    target.crew.gather(shape.processes)
    pool = f"pool-{uuid.uuid4().hex[:8]}"
    begin_at_s = time.monotonic() + LEAD_S
    jobs = [
        PlaceJob(
            target.reach, pool, room, tenants, f"{pool}-gateway-{number}", number,
            hold_us_per_cost, shape.seconds, begin_at_s, estimate,
        )
        for number in range(shape.processes)
    ]  # fmt: skip
    return target.crew.places(jobs, meanwhile)


def shares(target: Target, shape: Shape) -> Finding:
    """Weights 1:2:4 under heavy-tailed costs; the tenant of weight 1 asks with three times as many callers."""
    cost = Tokens(median=150, sigma=1.0, low=20, high=1200)
    tenants = (
        Tenant("one", 1.0, 40, cost),
        Tenant("two", 2.0, 12, cost),
        Tenant("four", 4.0, 12, cost),
    )
    room = Room(requests=16, max_waiting=100_000, max_waiting_per_tenant=100_000)
    results = queue_race(target, shape, room, tenants, hold_us_per_cost=150.0)
    served = _steady(results)
    weights = sum(tenant.weight for tenant in tenants)
    total = sum(one.cost for one in served) or 1
    found = [sum(one.cost for one in served if one.tenant == index) / total for index in range(len(tenants))]
    ideal = [tenant.weight / weights for tenant in tenants]
    # A request across an end of the window counts as a whole or not at all, and may be the longest one. That is nothing
    # among thousands, but a slow machine serves hundreds.
    within = max(0.03, 2 * cost.high / total)
    wanted = "/".join(f"{share:.3f}" for share in ideal)
    off = max(abs(share - want) for share, want in zip(found, ideal, strict=True))
    at_once = most_at_once([(one.granted_us, one.left_us) for result in results for one in result.served])
    bad = problems(results)
    return Finding(
        "shares",
        f"{shape.processes} processes, tenants of weight 1:2:4 with 40, 12 and 12 callers in each, heavy-tailed costs",
        f"shares of served tokens within {100 * within:.0f} % of {wanted}; at most 16 at once",
        f"{'/'.join(f'{share:.3f}' for share in found)} over {len(served):,} requests; {at_once} at once",
        off <= within and at_once <= 16 and len(served) > 100 and not bad,
        {"shares": found, "ideal": ideal, "off": off, "served": len(served), "at_once": at_once,
         **_grants(results), "problems": bad},
    )  # fmt: skip


def mouse(target: Target, shape: Shape) -> Finding:
    """A tenant that asks one thing at a time beside one that always has hundreds waiting."""
    tenants = (
        Tenant("elephant", 1.0, 60, Tokens(median=150, sigma=1.0, low=20, high=1200)),
        Tenant("mouse", 1.0, 1, Tokens(median=50), think_ms=100.0, only_in=0),
    )
    room = Room(requests=8, max_waiting=100_000, max_waiting_per_tenant=100_000)
    hold_us_per_cost = 400.0
    results = queue_race(target, shape, room, tenants, hold_us_per_cost)
    served = _steady(results)
    left = sorted(one.left_us for one in served)
    between_ms = (left[-1] - left[0]) / max(1, len(left) - 1) / 1000 if left else 0.0
    # By how much callers sleep longer than they wanted to: how late their process learns of anything. Nothing on a
    # machine with room; on a busy one it is in every wait, and says nothing of the queue.
    late = [(one.left_us - one.granted_us - one.cost * hold_us_per_cost) / 1000 for one in served]
    late_ms = statistics.median(late) if late else 0.0
    # The answer that it waits and the message that it may go.
    most_ms = 2 * between_ms + 2 * late_ms
    waits = {
        index: [(one.granted_us - one.entered_us) / 1000 for one in served if one.tenant == index]
        for index in range(len(tenants))
    }
    median = statistics.median(waits[1]) if waits[1] else float("inf")
    heavy = statistics.median(waits[0]) if waits[0] else 0.0
    bad = problems(results)
    return Finding(
        "mouse",
        f"{shape.processes} processes, one tenant with 60 callers in each, another with one caller in all",
        f"the light tenant's median wait at most 2 x {between_ms:.1f} ms, the mean time between releases, "
        f"and 2 x {late_ms:.1f} ms, by which its process is late",
        f"{median:.1f} ms (p90 {percentile(waits[1], 90):.1f}) over {len(waits[1])} requests; "
        f"the heavy one's {heavy:.0f} ms",
        median <= most_ms and len(waits[1]) >= 5 and not bad,
        {"median_ms": median, "between_releases_ms": between_ms, "late_ms": late_ms, "heavy_median_ms": heavy,
         "served": len(served), "mouse_requests": len(waits[1]), **_grants(results), "problems": bad},
    )  # fmt: skip


def _steady(results: Sequence[PlaceResult]) -> list[Served]:
    """Served while everybody was asking: without the first requests, which met an empty pool, and the last ones."""
    served = [one for result in results for one in result.served]
    if not served:
        return []
    begin, end = min(one.entered_us for one in served), max(one.entered_us for one in served)
    return [one for one in served if begin + 500_000 <= one.granted_us <= end]


def _grants(results: Sequence[PlaceResult]) -> dict[str, int]:
    return {
        "refused": sum(result.refused for result in results),
        "grants_by_message": sum(result.by_message for result in results),
        "grants_by_renewal": sum(result.by_renewal for result in results),
    }
