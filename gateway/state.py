"""What one worker shows to operators: its metrics, its usage records, and the state of the fleet as it sees it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec
from prometheus_client.core import Metric

from gateway.accounts.counts import Counted
from gateway.accounts.headroom import Headroom
from gateway.accounts.limit_rows import LimitsAnswer, LimitsQuestion
from gateway.actions import Actions
from gateway.config import Settings
from gateway.explanation import explanation
from gateway.fleet import Fleet, Pool
from gateway.fleet_view.glance import Glance, glance
from gateway.gpu_metrics import gpu_families
from gateway.inspection.local import Requests
from gateway.inspection.query import Query
from gateway.ledger import as_record
from gateway.log_metrics import log_families
from gateway.logs import handler_in_use
from gateway.metrics import health_families, process_families, replica_families
from gateway.retry_view import keys_state, limits_state, retry_families, retry_state
from gateway.rollups.pulse import Pulse
from gateway.rollups.pulser import Pulser
from gateway.route_metrics import route_families
from gateway.runtime import KvSource, Runtime
from gateway.sources import AdapterChange, AdapterResult
from gateway.steering.at_worker import Steered
from gateway.steering.shadow import shadow_families
from gateway.version import tidegate_version
from gateway.warmup.warmer import warm_up_families
from routing.index import IndexStats
from routing.load import Load
from routing.types import Replica

_SHOWN_SETTINGS = {"server", "shutdown", "auth", "store", "usage_log", "stream", "overload"}


class LocalSource:
    """The worker that runs in this process, as a `gateway.sources.Source`."""

    def __init__(self, runtime: Runtime, index: int = 0) -> None:
        self.index = index
        self._runtime = runtime
        self._actions = Actions(runtime)
        self._headroom = Headroom(runtime.gate)
        self._requests = Requests(runtime, index)
        self._steered = Steered(runtime)
        self._pulser = Pulser(runtime, index)

    async def metrics(self) -> list[Metric]:
        return list(_families(self._runtime))

    async def fleet(self) -> dict[str, Any]:
        return fleet_state(self._runtime, self.index, time.monotonic())

    async def notices(self, kind: str) -> Mapping[str, bytes]:
        return self._runtime.notices.of(kind)

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        await self._actions.announce(key, value, ttl_s)

    async def retract(self, key: str) -> None:
        await self._actions.retract(key)

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        return await self._actions.claim(lease, holder, ttl_s)

    async def glance(self) -> Glance:
        return glance(self._runtime, self.index)

    async def pulse(self) -> Pulse:
        return self._pulser.pulse()

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        return [as_record(each) for each in islice(reversed(self._runtime.ledger.recent), limit)]

    async def explain(self, question: bytes) -> dict[str, Any]:
        return {"worker": self.index, **await explanation(self._runtime, question)}

    async def requests(self, query: Query) -> dict[str, Any]:
        return self._requests.page(query)

    async def request(self, request_id: str) -> dict[str, Any] | None:
        return self._requests.one(request_id)

    async def end_request(self, request_id: str) -> bool:
        return self._requests.end(request_id)

    async def policies(self) -> dict[str, Any]:
        return self._steered.policies()

    async def traffic(self, model: str, limit: int) -> list[dict[str, Any]]:
        return await self._steered.traffic(model, limit)

    async def drain(self, pool: str, replica: str, draining: bool) -> None:
        await self._actions.drain(pool, replica, draining)

    async def cordon(self, pool: str, replica: str, cordoned: bool) -> None:
        await self._actions.cordon(pool, replica, cordoned)

    async def change_adapter(self, change: AdapterChange) -> list[AdapterResult]:
        return await self._actions.change_adapter(change)

    async def limits(self, question: LimitsQuestion) -> LimitsAnswer:
        return await self._headroom.answer(question)

    async def costs(self, life: str, turn: int) -> Counted:
        return self._runtime.uses.since(life, turn)


def fleet_state(runtime: Runtime, index: int, now: float) -> dict[str, Any]:
    """One worker: the process, its configuration without secrets, its models and its replicas at this moment."""
    return {
        "worker": index,
        "up": True,
        "version": tidegate_version(),
        "pid": os.getpid(),
        "started_unix_s": round(runtime.metrics.started_unix_s, 3),
        "draining": runtime.draining,
        "in_flight": runtime.in_flight,
        "store_mode": runtime.gate.home.mode,
        "waiting": runtime.gate.waiting,
        "request_bytes_held": runtime.body_budget.used_bytes,
        "overload": runtime.overload.state(),
        "config": config_summary(runtime.settings),
        "models": _models(runtime.settings, runtime.fleet),
        "pools": [_pool_state(pool, runtime, now) for pool in runtime.fleet.pools.values()],
    }


def config_summary(settings: Settings) -> dict[str, Any]:
    """The settings that explain behaviour; nothing that is, or refers to, a secret."""
    shown = settings.model_dump(mode="json", include=_SHOWN_SETTINGS)
    return {**shown, "admin": settings.admin.model_dump(mode="json", include={"host", "port"})}


def _models(settings: Settings, fleet: Fleet) -> dict[str, Any]:
    return {
        name: {
            "aliases": list(model.aliases),
            "backend": fleet.models[name].pool.name,
            "upstream_model": model.upstream_model,
        }
        for name, model in settings.models.items()
        if name in fleet.models
    }


def _pool_state(pool: Pool, runtime: Runtime, now: float) -> dict[str, Any]:
    index = pool.routing.index.stats()
    shown: dict[str, Any] = msgspec.to_builtins(index)
    del shown["targets"]
    return {
        "name": pool.name,
        "engine": pool.settings.engine,
        "adapters": {each.name: each.path for each in pool.settings.adapters},
        "prefix_index": shown,
        "retries": retry_state(pool, now),
        "keys": keys_state(pool, now),
        "replicas": [
            {
                **_replica_state(pool, replica, runtime.kv_listeners.get(replica), now),
                **_routing_state(pool, replica, index),
            }
            for replica in pool.replicas
        ],
    }


def _routing_state(pool: Pool, replica: Replica, index: IndexStats) -> dict[str, Any]:
    """What decisions about a replica are made from: work, all gateways' together, speed, and what it is believed to
    hold; and how well its time to first token is predicted."""
    work, routing = replica.work, pool.routing
    slot = routing.slots.get(replica)
    return {
        "work": {
            "queued": work.queued,
            "queued_tokens": work.queued_tokens,
            "running": work.running,
            "running_tokens": work.running_tokens,
        },
        "speed": msgspec.to_builtins(replica.speed),
        "ttft_error": msgspec.to_builtins(routing.calibration.error(replica)),
        "prefix_index": None if slot is None else msgspec.to_builtins(index.targets[slot]),
    }


def _replica_state(pool: Pool, replica: Replica, kv_source: KvSource | None, now: float) -> dict[str, Any]:
    upstream = pool.upstreams[replica]
    connections = upstream.pool
    return {
        "name": replica.name,
        "url": replica.url,
        "region": replica.region,
        "weight": replica.weight,
        "max_in_flight": replica.max_in_flight,
        "ceiling": replica.ceiling,
        "capacity": msgspec.to_builtins(replica.meter.capacity),
        "in_flight": replica.in_flight,
        "in_flight_bytes": replica.in_flight_bytes,
        "engine": replica.engine,
        "available": replica.available(now),
        "unavailable_reason": replica.unavailable_reason(now),
        "health": replica.health.state(now).value,
        "share": round(replica.health.share(now), 3),
        "draining": replica.draining,
        "cordoned": replica.cordoned,
        "failures": replica.cooldown.failures,
        "limited_s": limits_state(replica, now),
        "epoch": replica.epoch,
        "load": _load_state(replica.load, now),
        "info": None if upstream.info is None else msgspec.to_builtins(upstream.info),
        "adapters": [msgspec.to_builtins(adapter) for adapter in upstream.adapters],
        "adapter_slots": replica.adapter_slots,
        "adapters_loading": sorted(replica.loading),
        "kv_events": None if kv_source is None else msgspec.to_builtins(kv_source.summary()),
        "lacking": upstream.signals.lacking,
        "refused_fields": sorted(upstream.signals.refused_fields),
        "connections": {
            "idle": connections.idle,
            "active": connections.active,
            "waiting": connections.waiting,
        },
    }


def _load_state(load: Load | None, now: float) -> dict[str, Any] | None:
    """The engine's last report, with its age instead of a time that means nothing outside of this process."""
    if load is None:
        return None
    shown: dict[str, Any] = msgspec.to_builtins(load)
    shown["age_s"] = round(now - shown.pop("observed_at"), 3)
    return shown


def _families(runtime: Runtime) -> Iterator[Metric]:
    yield from runtime.metrics.families()
    replicas = [replica for pool in runtime.fleet.pools.values() for replica in pool.replicas]
    yield from replica_families(replicas, time.monotonic())
    yield from route_families(runtime.fleet.pools.values())
    yield from retry_families(runtime.fleet.pools.values(), time.monotonic())
    yield from health_families(runtime.witness)
    yield from runtime.gate.metrics.families(runtime.admission)
    yield from runtime.overflow.families()
    yield from shadow_families(runtime.fleet)
    yield from runtime.fallbacks.families()
    yield from runtime.attempt_metrics.families()
    yield from runtime.overload.families()
    yield from runtime.adapters.families()
    yield from warm_up_families(runtime.warmer.requests)
    yield from gpu_families(runtime.fleet.upstreams())
    yield from runtime.reloads.families()
    if runtime.telemetry is not None:
        yield from runtime.telemetry.families()
    yield from log_families(handler_in_use(), runtime.request_log)
    yield from process_families(
        runtime.in_flight,
        runtime.body_budget.used_bytes,
        len(asyncio.all_tasks(runtime.loop)),
        runtime.ledger.lost,
        runtime.metrics.started_unix_s,
    )
