"""What one worker shows to operators: its metrics, its usage records, and the state of the fleet as it sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from prometheus_client.core import Metric

from gateway.config import Settings
from gateway.fleet import Fleet, Pool
from gateway.ledger import as_record
from gateway.metrics import process_families, replica_families
from gateway.runtime import Runtime
from gateway.version import tidegate_version
from routing.types import Replica

_SHOWN_SETTINGS = {"server", "shutdown", "auth", "store", "usage_log", "stream"}


class LocalSource:
    """The worker that runs in this process, as a `gateway.sources.Source`."""

    def __init__(self, runtime: Runtime, index: int = 0) -> None:
        self.index = index
        self._runtime = runtime

    async def metrics(self) -> list[Metric]:
        return list(_families(self._runtime))

    async def fleet(self) -> dict[str, Any]:
        return fleet_state(self._runtime, self.index, time.monotonic())

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        return [as_record(each) for each in islice(reversed(self._runtime.ledger.recent), limit)]


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
        "request_bytes_held": runtime.body_budget.used_bytes,
        "config": config_summary(runtime.settings),
        "models": _models(runtime.settings, runtime.fleet),
        "pools": [_pool_state(pool, now) for pool in runtime.fleet.pools.values()],
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


def _pool_state(pool: Pool, now: float) -> dict[str, Any]:
    return {
        "name": pool.name,
        "engine": pool.settings.engine,
        "replicas": [_replica_state(pool, replica, now) for replica in pool.replicas],
    }


def _replica_state(pool: Pool, replica: Replica, now: float) -> dict[str, Any]:
    connections = pool.upstreams[replica].pool
    return {
        "name": replica.name,
        "url": replica.url,
        "region": replica.region,
        "weight": replica.weight,
        "max_in_flight": replica.max_in_flight,
        "in_flight": replica.in_flight,
        "in_flight_bytes": replica.in_flight_bytes,
        "available": replica.available(now),
        "unavailable_reason": replica.unavailable_reason(now),
        "failures": replica.cooldown.failures,
        "connections": {
            "idle": connections.idle,
            "active": connections.active,
            "waiting": connections.waiting,
        },
    }


def _families(runtime: Runtime) -> Iterator[Metric]:
    yield from runtime.metrics.families()
    replicas = [replica for pool in runtime.fleet.pools.values() for replica in pool.replicas]
    yield from replica_families(replicas, time.monotonic())
    yield from process_families(
        runtime.in_flight, runtime.body_budget.used_bytes, runtime.ledger.lost, runtime.metrics.started_unix_s
    )
