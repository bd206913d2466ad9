"""Makes a worker's pulse."""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from gateway.keys.records import PRIORITY_CLASSES
from gateway.logs import handler_in_use
from gateway.metrics import REFUSED, ModelCounts
from gateway.rollups.outcomes import FAILED
from gateway.rollups.pace import Pace
from gateway.rollups.pulse import (
    MAX_MODELS,
    OTHER_MODELS,
    ModelPulse,
    PoolPulse,
    Pulse,
    RentedCeiling,
    ReplicaPulse,
    SpentBudget,
)
from routing.retry_budget import Ruling
from routing.types import Replica

if TYPE_CHECKING:
    from gateway.fleet import Pool
    from gateway.runtime import Runtime

LOOKED_AT = 512
"""Requests under way that are looked at: a microsecond each."""
SPENT_FOR_S = 300.0
"""A budget is told of for so long after it last refused a request."""

At = tuple[str, str]


class Pulser:
    """One worker's. Everything is synchronous: what it reads does not change in between."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        self._runtime = runtime
        self._index = index
        self._pace = Pace(runtime.ledger)

    def pulse(self) -> Pulse:
        """The worker now."""
        runtime, now = self._runtime, time.monotonic()
        gate, overload, metrics = runtime.gate, runtime.overload, runtime.metrics
        pools = runtime.fleet.pools
        self._pace.catch_up({(replica.pool, replica.name) for pool in pools.values() for replica in pool.replicas})
        lines: Counter[str] = Counter()
        queue: Counter[str] = Counter()
        if gate.waiting:
            for visit in gate.in_line():
                lines[visit.pool] += 1
                queue[PRIORITY_CLASSES[visit.order.band]] += 1
        waiting, unanswered = self._waiting(now), Counter[At]()
        for (pool_name, replica_name, _), count in runtime.witness.evidence.items():
            unanswered[pool_name, replica_name] += count
        outcomes: Counter[str] = Counter()
        for (_, _, outcome), count in metrics.requests.items():
            outcomes[outcome] += count
        sheds: Counter[str] = Counter()
        for (_, cause), count in overload.shed.items():
            sheds[cause.value] += count
        sync = runtime.admission.sync
        return Pulse(
            worker=self._index,
            pid=os.getpid(),
            started_unix_s=metrics.started_unix_s,
            requests=dict(outcomes),
            refused={str(status): count for status, count in metrics.refusals.items()},
            models=self._models(),
            pools=[self._pool(pool, now, lines[pool.name], waiting, unanswered) for pool in pools.values()],
            in_flight=runtime.in_flight,
            draining=runtime.draining,
            queue=dict(queue),
            sheds=dict(sheds),
            overload_level=overload.level,
            overload_cause="" if overload.cause is None else overload.cause.value,
            loop_lag_s=overload.reading.lag_s,
            limits=self._limits(),
            turned_away=self._turned_away(),
            spilled=runtime.overflow.spilled,
            spent=[SpentBudget(*each) for each in gate.metrics.spent.since(time.time() - SPENT_FOR_S)],
            ceilings=[RentedCeiling(*each) for each in runtime.overflow.ceilings()],
            store_mode=gate.home.mode.value,
            store_mode_s=now - gate.home.mode_since,
            keys_age_s=None if sync is None else sync.age_s(),
            keys_wanted=sync is not None,
            spend_failing=gate.spend.failing,
            lost={
                what: number
                for what, number in (
                    ("usage records", runtime.ledger.lost),
                    ("settlements", gate.home.dropped),
                    ("dollars of spend", gate.spend.lost_micros / 1e6),
                    ("spans", 0 if runtime.telemetry is None else runtime.telemetry.spans_lost),
                    ("log lines", _lines_lost(runtime)),
                )
                if number
            },
            reload_refused=not runtime.reloads.succeeded,
        )

    def _limits(self) -> dict[str, int]:
        """By whose limit it is and which; those that are only tried out refuse nobody."""
        return {
            f"{scope} {limit}": count
            for (scope, limit, mode), count in self._runtime.gate.metrics.limited.items()
            if mode == "enforced"
        }

    def _turned_away(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (_, reason), count in self._runtime.gate.metrics.sent_off.items():
            found[reason] += count
        return dict(found)

    def _waiting(self, now: float) -> dict[At, tuple[int, float]]:
        """Streams without content by where they were sent: how many, and how long the oldest has waited, seconds."""
        found: dict[At, tuple[int, float]] = {}
        for relay in islice(self._runtime.relays, LOOKED_AT):
            exchange = relay.exchange
            if not exchange.stream or exchange.first_content_at is not None or not exchange.tries:
                continue
            attempt = exchange.tries[-1]
            if attempt.sent_at is None or attempt.ended_at is not None:
                continue
            at = (attempt.pool, attempt.replica)
            count, oldest_s = found.get(at, (0, 0.0))
            found[at] = (count + 1, max(oldest_s, now - attempt.sent_at))
        return found

    def _pool(
        self, pool: Pool, now: float, in_line: int, waiting: dict[At, tuple[int, float]], unanswered: Counter[At]
    ) -> PoolPulse:
        counts = pool.retries.counts
        return PoolPulse(
            pool.name,
            [self._replica(replica, now, waiting, unanswered) for replica in pool.replicas],
            in_line,
            counts.get(Ruling.REFUSED, 0),
            counts.get(Ruling.ALLOWED, 0) + counts.get(Ruling.MOVED, 0),
        )

    def _replica(
        self, replica: Replica, now: float, waiting: dict[At, tuple[int, float]], unanswered: Counter[At]
    ) -> ReplicaPulse:
        at = (replica.pool, replica.name)
        found = ReplicaPulse(
            replica.name,
            replica.region,
            replica.health.state(now).value,
            replica.unavailable_reason(now) or ("cooling_down" if replica.cooldown.failures else ""),
            replica.in_flight,
            unanswered.get(at, 0),
        )
        sums = self._pace.of.get(at)
        if sums is not None:
            found.streams, found.streams_log_s = int(sums[0]), sums[1]
            found.wholes, found.wholes_log_s = int(sums[2]), sums[3]
        late = waiting.get(at)
        if late is not None:
            found.waiting, found.oldest_s = late
        return found

    def _models(self) -> dict[str, ModelPulse]:
        metrics = self._runtime.metrics
        counts: dict[str, list[int]] = {}
        for (model, _, outcome), count in metrics.requests.items():
            sums = counts.setdefault(model, [0, 0])
            sums[0] += count
            if outcome in FAILED:
                sums[1] += count
        names = list(counts)  # in the order of their first requests, so that none changes its place
        found = {name: _model(metrics.models.get(name), *counts[name]) for name in names[:MAX_MODELS]}
        rest = [_model(metrics.models.get(name), *counts[name]) for name in names[MAX_MODELS:]]
        if rest:
            found[OTHER_MODELS] = added_up([*rest, found.get(OTHER_MODELS, ModelPulse())])
        return found


def _lines_lost(runtime: Runtime) -> int:
    handler, requests = handler_in_use(), runtime.request_log
    return (0 if handler is None else handler.writer.lost) + (0 if requests is None else requests.lost)


def _model(counts: ModelCounts | None, requests: int, failed: int) -> ModelPulse:
    found = ModelPulse(requests, failed)
    if counts is None:
        return found
    for source, use in counts.uses:
        found.prompt_tokens += use.prompt_tokens
        found.told_prompt_tokens += use.told_prompt_tokens
        found.cached_tokens += use.cached_tokens
        found.completion_tokens += use.completion_tokens
        if source == "own":
            found.own_usd = use.cost_usd
        else:
            found.rented_usd = use.cost_usd
    found.ttft_s, found.ttft = counts.ttft.total, list(counts.ttft.counts)
    served = [each.counts for size, each in counts.durations if size != REFUSED]
    found.duration = [sum(each) for each in zip(*served, strict=True)]
    return found


def added_up(models: list[ModelPulse]) -> ModelPulse:
    """All of these as one."""
    found = ModelPulse()
    for each in models:
        found.requests += each.requests
        found.failed += each.failed
        found.prompt_tokens += each.prompt_tokens
        found.told_prompt_tokens += each.told_prompt_tokens
        found.cached_tokens += each.cached_tokens
        found.completion_tokens += each.completion_tokens
        found.own_usd += each.own_usd
        found.rented_usd += each.rented_usd
        found.ttft_s += each.ttft_s
        found.ttft = _sum(found.ttft, each.ttft)
        found.duration = _sum(found.duration, each.duration)
    return found


def _sum(left: list[int], right: list[int]) -> list[int]:
    if not left or not right:
        return left or right
    return [one + other for one, other in zip(left, right, strict=True)]
