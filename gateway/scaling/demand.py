"""What one worker sees a pool asked for, and how it does: counted as requests end, and told every two seconds.

Requests are counted when they come, not when they end: during a burst those that wait are the news. To do so without
work on the way of a request, the worker looks through the requests under way when it tells its demand, and counts each
that it has not counted before; those that came and ended in between are counted at their end. So each counts once.

Counts only grow, from the start of the worker. Whoever reads them takes differences, so that a notice which is lost or
read twice changes nothing.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING

from gateway.record import Exchange, Outcome
from gateway.scaling.notes import BOUNDS_MS, PoolDemand, ReplicaRow
from gateway.store.places import Band
from routing.explain import rehearsed
from routing.router import Router
from routing.types import InferenceRequest, Replica

if TYPE_CHECKING:
    from gateway.fleet import Pool
    from gateway.runtime import Runtime

WINDOW_S = 30.0
"""How long a wait or a first token counts among those that percentiles are taken from."""
SAMPLES = 2048
SIZES = 65
"""Of the last requests, whose median is the request that a first token is predicted for."""
FORGET = 0.05
"""Weight of one more request in what a byte of a request is in tokens, and in how long answers are."""
STANDARD = Band.STANDARD
"""The priority class whose wait is told ."""
MAX_ROWS = 600
"""Replicas told of one by one: a fact holds 64 KiB."""

_NOBODYS = frozenset({Outcome.REJECTED})
"""Refused for what the caller has done, a limit of its own included: more replicas would change nothing."""


@dataclass(slots=True)
class _Book:
    """One pool's counts."""

    life: str
    since: float
    arrivals: int = 0
    arrival_tokens: float = 0.0
    served: int = 0
    served_tokens: float = 0.0
    spilled: int = 0
    spill_usd: float = 0.0
    model: str = ""
    """That was asked for last."""
    tokens_per_byte: float = 0.0
    output_tokens: float = 0.0
    sizes: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=SIZES))
    waits: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    ttfts: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def came(self, exchange: Exchange) -> None:
        self.arrivals += 1
        self.model = exchange.fallback_from or exchange.model
        self.arrival_tokens += exchange.request_bytes * self.tokens_per_byte + self.output_tokens

    def learn(self, size_bytes: int, prompt: int, completion: int) -> None:
        self.sizes.append((size_bytes, prompt))
        if not self.tokens_per_byte:
            self.tokens_per_byte, self.output_tokens = prompt / max(1, size_bytes), float(completion)
            return
        self.tokens_per_byte += FORGET * (prompt / max(1, size_bytes) - self.tokens_per_byte)
        self.output_tokens += FORGET * (completion - self.output_tokens)


class DemandBook:
    """One worker's, for the pools that have `scaling`. Synchronous; `Runtime.settle` calls `settled`."""

    def __init__(self, runtime: Runtime, now: float) -> None:
        """`now`: monotonic seconds, as everywhere here."""
        self._runtime = runtime
        self._books: dict[str, _Book] = {}
        self._homes: dict[str, _Book | None] = {}
        self._counted: set[str] = set()
        """Requests under way that are counted already, by id."""
        self.refresh(now)

    @property
    def pools(self) -> list[str]:
        """Whose demand is counted."""
        return list(self._books)

    def refresh(self, now: float) -> None:
        """After a reload: other pools may have a scaling, and models other pools."""
        self._homes = {}
        wanted = [name for name, pool in self._runtime.fleet.pools.items() if pool.settings.scaling is not None]
        self._books = {name: self._books.get(name) or _Book(secrets.token_hex(6), now) for name in wanted}

    # -- counting

    def settled(self, exchange: Exchange) -> None:
        """A request is over."""
        book = self._home(exchange)
        if exchange.request_id in self._counted:
            self._counted.discard(exchange.request_id)
        elif book is not None and exchange.outcome not in _NOBODYS:
            book.came(exchange)
        if book is None:
            return
        now = exchange.finished_at or exchange.started_at
        if exchange.spill:
            book.spilled += 1
            book.spill_usd += exchange.cost_usd or 0.0
        if exchange.spill or exchange.fallback_from:
            return
        if exchange.dispatched_at is not None:
            book.waits.append((now, _bucket(exchange.queue_s * 1000.0)))
        if exchange.ttft_s is not None:
            book.ttfts.append((exchange.first_content_at or now, _bucket(exchange.ttft_s * 1000.0)))
        if exchange.outcome is Outcome.COMPLETED:
            book.served += 1
        used = exchange.usage
        if used is not None:
            book.served_tokens += used.prompt_tokens + used.completion_tokens
            if not exchange.usage_estimated and used.prompt_tokens:
                book.learn(exchange.request_bytes, used.prompt_tokens, used.completion_tokens)

    def count_arrivals(self) -> None:
        """Count the requests under way that are not yet."""
        counted = self._counted
        for exchange, _ in self._runtime.under_way():
            if exchange.model and exchange.request_id not in counted:
                book = self._home(exchange)
                if book is not None:
                    counted.add(exchange.request_id)
                    book.came(exchange)

    def _home(self, exchange: Exchange) -> _Book | None:
        """Of the pool of the model that was asked for, wherever the request was sent; None: it has no scaling."""
        name = exchange.fallback_from or exchange.model
        try:
            return self._homes[name]
        except KeyError:
            route = self._runtime.fleet.route(name) if name else None
            if len(self._homes) > 10_000:  # models are few, adapters perhaps many
                self._homes.clear()
            found = self._homes[name] = None if route is None else self._books.get(route.pool.name)
            return found

    # -- telling

    def told(self, now: float) -> dict[str, PoolDemand]:
        """Everything, by pool. `count_arrivals` is part of it."""
        self.count_arrivals()
        lines: dict[str, list[float]] = {}
        if self._runtime.gate.waiting:
            for visit in self._runtime.gate.in_line():
                lines.setdefault(visit.pool, []).append(now - visit.entered_at)
        pools = self._runtime.fleet.pools
        return {
            name: self._pool(pools[name], book, lines.get(name, []), now)
            for name, book in self._books.items()
            if name in pools
        }

    def _pool(self, pool: Pool, book: _Book, line: list[float], now: float) -> PoolDemand:
        waits = _recent(book.waits, now)
        waits.update(_bucket(seconds * 1000.0) for seconds in line)
        return PoolDemand(
            life=book.life,
            age_s=now - book.since,
            arrivals=book.arrivals,
            arrival_tokens=round(book.arrival_tokens, 1),
            served=book.served,
            served_tokens=book.served_tokens,
            spilled=book.spilled,
            spill_usd=book.spill_usd,
            waiting=len(line),
            waits=dict(waits),
            ttfts=dict(_recent(book.ttfts, now)),
            predicted_ttft_ms=self._predicted_ms(pool, book, now),
            replicas=_rows(pool, now),
        )

    def _predicted_ms(self, pool: Pool, book: _Book, now: float) -> float | None:
        """Until the first token of a request of median size, waiting included, if it came now; None: not known."""
        route = self._runtime.fleet.route(book.model) if book.model else None
        if route is None or route.pool is not pool:
            return None
        gate = self._runtime.gate
        queues = gate.rooms.room(pool, now) is not None
        wait_ms = 1000.0 * gate.told.expected_s(pool.name, STANDARD, now) if queues else 0.0
        found: float | None = None
        if book.sizes and isinstance(route.router, Router):
            request = InferenceRequest(
                "",
                route.model,
                True,
                int(median(size for size, _ in book.sizes)),
                prompt_tokens=int(median(tokens for _, tokens in book.sizes)),
            )
            found = rehearsed(route.router, 1).decide(request, pool.replicas, now).predicted_ttft_ms
        if found is None:
            found = 1000.0 * gate.metrics.ttft_s(route.model) or None
        if found is None or not isfinite(found):
            return wait_ms or None
        return round(wait_ms + found, 3)


def _rows(pool: Pool, now: float) -> list[ReplicaRow]:
    stats = pool.routing.index.stats().targets
    found: list[ReplicaRow] = []
    for replica in pool.replicas[:MAX_ROWS]:
        slot = pool.routing.slots.get(replica)
        beliefs = None if slot is None else stats.get(slot)
        found.append(_row(replica, 0 if beliefs is None else beliefs.tokens, now))
    return found


def _row(replica: Replica, warm_tokens: int, now: float) -> ReplicaRow:
    return ReplicaRow(
        replica.name,
        replica.identity,
        replica.in_flight,
        replica.unavailable_reason(now) or "",
        replica.draining,
        None if replica.load is None else replica.load.kv_use,
        replica.meter.capacity.requests,
        warm_tokens,
    )


def _bucket(milliseconds: float) -> int:
    return min(bisect_left(BOUNDS_MS, milliseconds), len(BOUNDS_MS) - 1)


def _recent(samples: deque[tuple[float, int]], now: float) -> Counter[int]:
    while samples and samples[0][0] < now - WINDOW_S:
        samples.popleft()
    return Counter(bucket for _, bucket in samples)
