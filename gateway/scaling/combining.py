"""What all workers of all gateways tell of a pool, as one `Demand`. Pure: `now` is any monotonic clock, in seconds.

Rates are differences of what a worker has counted, over its own clock: how often it is read does not matter, and what
it counts is counted once. A worker that has just begun counts from its start; one that is met later, from then on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.rollups.quantiles import quantiles
from gateway.scaling.notes import BOUNDS_MS, PoolDemand, ReplicaRow, read_note
from routing.scaling import Demand

YOUNG_S = 30.0
"""A worker that is met at this age, or before, is counted from its start."""
MONEY_OVER_S = 60.0
"""Seconds over which spent money is averaged: single requests are too few to tell a pace from."""
_COMING = frozenset({"joining", "warming"})
"""Reasons of a replica that is new and gets requests within seconds: nothing is wrong with it."""
MISSED_FOR_S = 30.0
"""A worker that is not heard of any more is missed for so long; it may be back, and its requests still there."""


@dataclass(slots=True)
class _Worker:
    last: PoolDemand
    heard_s: float
    """When it told something new."""
    arrivals_per_s: float = 0.0
    tokens_per_s: float = 0.0
    served_per_s: float = 0.0
    served_tokens_per_s: float = 0.0
    spilled_per_s: float = 0.0
    money: deque[tuple[float, float]] = field(default_factory=deque)
    """Age and dollars."""

    @property
    def usd_per_hour(self) -> float:
        if len(self.money) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self.money[0], self.money[-1]
        return 3600.0 * max(0.0, last - first) / max(1e-9, last_s - first_s)

    def rates(self, before: PoolDemand | None) -> None:
        """Take those since `before`; None: since its start."""
        now = self.last
        span = now.age_s - (0.0 if before is None else before.age_s)
        if span <= 0.0:
            return
        was = before or PoolDemand("", 0.0)
        self.arrivals_per_s = (now.arrivals - was.arrivals) / span
        self.tokens_per_s = (now.arrival_tokens - was.arrival_tokens) / span
        self.served_per_s = (now.served - was.served) / span
        self.served_tokens_per_s = (now.served_tokens - was.served_tokens) / span
        self.spilled_per_s = (now.spilled - was.spilled) / span


@dataclass(slots=True)
class Seen:
    """One replica, as all workers see it."""

    identity: str
    in_flight: int = 0
    warm_tokens: int = 0
    by: int = 0
    """Workers that tell of it."""
    ready: int = 0
    coming: int = 0
    """To how many of them it is new."""
    draining: int = 0
    """How many of them say so."""
    kv_use: float | None = None
    capacity: int | None = None

    def add(self, row: ReplicaRow) -> None:
        self.by += 1
        self.in_flight += row.in_flight
        self.warm_tokens = max(self.warm_tokens, row.warm_tokens)
        self.draining += row.draining
        self.ready += row.reason in ("", "full")
        self.coming += row.reason in _COMING
        self.kv_use = row.kv_use if self.kv_use is None else max(self.kv_use, row.kv_use or 0.0)
        self.capacity = row.capacity if self.capacity is None else self.capacity

    @property
    def empty(self) -> bool:
        """Every worker gives it nothing new, and has nothing there."""
        return self.draining == self.by and not self.in_flight


class PoolView:
    """One pool's demand, read again and again."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._missed: dict[str, float] = {}
        self.replicas: dict[str, Seen] = {}
        """By name, as told last."""

    def read(self, notes: Mapping[str, PoolDemand], now: float) -> None:
        """What holds now, by worker."""
        for name in self._workers.keys() - notes.keys():
            del self._workers[name]
            self._missed[name] = now
        for name in [name for name, at in self._missed.items() if now - at > MISSED_FOR_S or name in notes]:
            del self._missed[name]
        for name, note in notes.items():
            known = self._workers.get(name)
            if known is None or known.last.life != note.life:
                self._workers[name] = known = _Worker(note, now)
                if note.age_s <= YOUNG_S:
                    known.rates(None)
            elif note.age_s > known.last.age_s:
                before, known.last, known.heard_s = known.last, note, now
                known.rates(before)
            else:
                continue
            known.money.append((note.age_s, note.spill_usd))
            while known.money[0][0] < note.age_s - MONEY_OVER_S:
                known.money.popleft()
        self.replicas = {}
        for worker in self._workers.values():
            for row in worker.last.replicas:
                self.replicas.setdefault(row.name, Seen(row.identity)).add(row)

    @property
    def workers(self) -> int:
        """That are heard of."""
        return len(self._workers)

    def demand(self, starting: int, expected: int, now: float) -> Demand | None:
        """All of it; None: nobody tells anything. `starting`: replicas on their way; `expected`: workers there are at
        least."""
        workers = list(self._workers.values())
        if not workers:
            return None
        waits: Counter[int] = Counter()
        ttfts: Counter[int] = Counter()
        for each in workers:
            waits.update(each.last.waits)
            ttfts.update(each.last.ttfts)
        wait_ms, ttft_ms = (quantiles(counts, BOUNDS_MS, (0.9,))[0] for counts in (waits, ttfts))
        # A row of a worker that has not read its settings yet is missing; one that says "draining" may be old.
        there = [each for each in self.replicas.values() if 2 * each.draining < each.by]
        ready = [each for each in there if 2 * each.ready >= each.by]
        coming = sum(2 * each.ready < each.by <= 2 * (each.ready + each.coming) for each in there)
        kv = [each.kv_use for each in ready if each.kv_use is not None]
        capacity = [each.capacity for each in ready if each.capacity is not None]
        predicted = [each.last.predicted_ttft_ms for each in workers if each.last.predicted_ttft_ms is not None]
        return Demand(
            at_s=max(each.heard_s for each in workers),
            arrivals_per_s=sum(each.arrivals_per_s for each in workers),
            arrival_tokens_per_s=_tokens_per_s(workers),
            in_flight=sum(each.in_flight for each in there),
            waiting=sum(each.last.waiting for each in workers),
            queue_wait_p90_s=None if wait_ms is None else wait_ms / 1000.0,
            ttft_p90_ms=ttft_ms,
            predicted_ttft_ms=sum(predicted) / len(predicted) if predicted else None,
            kv_use=min(1.0, sum(kv) / len(kv)) if kv else None,
            replicas_ready=len(ready),
            replicas_starting=starting + coming,
            replicas_unhealthy=len(there) - len(ready) - coming,
            capacity_requests=sum(capacity) / len(capacity) if capacity else None,
            tokens_per_s=sum(each.served_tokens_per_s for each in workers),
            served_per_s=sum(each.served_per_s for each in workers),
            spilled_per_s=sum(each.spilled_per_s for each in workers),
            spill_usd_per_hour=sum(each.usd_per_hour for each in workers),
            complete=not self._missed and len(workers) >= expected,
        )


def _tokens_per_s(workers: Sequence[_Worker]) -> float:
    """Of what comes. Where a worker has just begun and knows nothing of tokens yet, its requests are taken to be as
    long as those of the others."""
    known = [each for each in workers if each.last.arrival_tokens > 0.0]
    tokens, requests = sum(each.tokens_per_s for each in known), sum(each.arrivals_per_s for each in known)
    if requests <= 0.0:
        return tokens
    return tokens * sum(each.arrivals_per_s for each in workers) / requests


def by_pool(notices: Mapping[str, bytes]) -> dict[str, dict[str, PoolDemand]]:
    """The notices `demand/<pool>/<worker>` that can be read, by pool and worker."""
    found: dict[str, dict[str, PoolDemand]] = {}
    for key, value in notices.items():
        _, pool, worker = (*key.split("/", 2), "", "")[:3]
        note = read_note(value, PoolDemand)
        if note is not None and note.plausible:
            found.setdefault(pool, {})[worker] = note
    return found
