"""The replicas as one worker sees them, as briefly as a map needs it: `/admin/fleet` says fifty times as much."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.fleet import Pool
    from gateway.runtime import Runtime
    from routing.index import IndexStats
    from routing.types import Replica


class ReplicaGlance(msgspec.Struct, array_like=True, gc=False):
    """One replica at one moment. None everywhere: not known, or no limit."""

    name: str
    region: str | None
    engine: str
    hosted: bool
    weight: float
    ceiling: int | None
    """Requests that this worker gives it at once."""
    in_flight: int
    queued: int
    """Requests whose first token has not come yet, all gateways' together."""
    draining: bool
    available: bool
    reason: str
    """Why it gets no new work; empty: it does."""
    health: str
    """Of its health (`routing.evidence.HealthState`)."""
    share: float
    """Of its usual part of the work, while it comes back; 1: all of it."""
    kv_use: float | None
    """Share of its KV cache that is taken, as the engine says."""
    warm_tokens: int | None
    """Prompt tokens that it is believed to hold."""
    warm_budget: int | None
    """The most of them that are believed."""
    prefill_ms: float
    """Learned, per uncached prompt token."""
    step_ms: float
    """Learned, per token of an answer."""
    adapters: list[str]
    """LoRA adapters in its memory."""
    loading: list[str]
    cordoned: bool = False


class PoolGlance(msgspec.Struct, array_like=True, gc=False):
    name: str
    engine: str
    replicas: list[ReplicaGlance]


class Glance(msgspec.Struct, gc=False):
    """One worker's pools."""

    worker: int
    pools: list[PoolGlance]


def glance(runtime: Runtime, index: int) -> Glance:
    """What there is at this moment; some five microseconds for each replica."""
    now = time.monotonic()
    return Glance(index, [_pool(pool, now) for pool in runtime.fleet.pools.values()])


def _pool(pool: Pool, now: float) -> PoolGlance:
    stats = pool.routing.index.stats()
    return PoolGlance(pool.name, pool.settings.engine, [_replica(pool, each, stats, now) for each in pool.replicas])


def _replica(pool: Pool, replica: Replica, stats: IndexStats, now: float) -> ReplicaGlance:
    slot = pool.routing.slots.get(replica)
    beliefs = None if slot is None else stats.targets.get(slot)
    speed, reason = replica.speed, replica.unavailable_reason(now)
    return ReplicaGlance(
        name=replica.name,
        region=replica.region,
        engine=replica.engine,
        hosted=replica.hosted,
        weight=replica.weight,
        ceiling=replica.ceiling,
        in_flight=replica.in_flight,
        queued=replica.work.queued,
        draining=replica.draining,
        available=reason is None,
        reason=reason or "",
        health=replica.health.state(now).value,
        share=round(replica.health.share(now), 3),
        kv_use=None if replica.load is None else replica.load.kv_use,
        warm_tokens=None if beliefs is None else beliefs.tokens,
        warm_budget=None if beliefs is None else beliefs.budget_tokens,
        prefill_ms=speed.prefill_ms,
        step_ms=speed.step_ms,
        adapters=[each.name for each in pool.upstreams[replica].adapters if each.resident],
        loading=sorted(replica.loading),
        cordoned=replica.cordoned,
    )
