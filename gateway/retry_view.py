"""What is shown of a pool's retries, its keys and its rate limits: to `/metrics`, and to operators in `/admin/fleet`.

A key is known by its place in the configuration, from 0; nothing here holds one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.fleet import Pool
from routing.types import Replica


def retry_families(pools: Collection[Pool], now: float) -> Iterator[Metric]:
    """How it was decided on further attempts, and what may still be sent. `now`: monotonic seconds."""
    retries = CounterMetricFamily(
        "tidegate_retries",
        "Failed attempts of which another might follow, by whether one may: allowed, moved without charge, refused.",
        labels=["pool", "result"],
    )
    left = GaugeMetricFamily("tidegate_retry_budget", "Retries that a pool may be sent now.", labels=["pool"])
    for pool in pools:
        for ruling, count in pool.retries.counts.items():
            retries.add_metric([pool.name, ruling.value], count)
        left.add_metric([pool.name], pool.retries.budget.left(now))
    yield retries
    yield left


def retry_state(pool: Pool, now: float) -> dict[str, Any]:
    """One pool's part of `/admin/fleet`."""
    budget = pool.retries.budget
    return {
        "left": round(budget.left(now), 2),
        "share": budget.share,
        "per_s": budget.per_s,
        **{ruling.value: count for ruling, count in pool.retries.counts.items()},
    }


def keys_state(pool: Pool, now: float) -> list[dict[str, Any]]:
    """Each of a pool's keys by its position: `usable`, `limited` for some models, or `refused`; and how long still."""
    keys = () if pool.credentials is None else pool.credentials.keys
    shown: list[dict[str, Any]] = []
    for key in keys:
        limited = {model: round(end - now, 3) for model, end in key.limits.running(now).items()}
        refused_s = max(0.0, key.until - now)
        state = "refused" if refused_s else "limited" if limited else "usable"
        shown.append(
            {
                "position": key.position,
                "state": state,
                "proven": key.proven,
                "refused_s": round(refused_s, 3),
                "limited_s": limited,
            }
        )
    return shown


def limits_state(replica: Replica, now: float) -> dict[str, float]:
    """Models that a replica asked not to be asked for, and for how many seconds still."""
    return {model: round(end - now, 3) for model, end in replica.limits.running(now).items()}
