"""What is shown of scaling: to operators as JSON, to KEDA as JSON with a number, to Prometheus as metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.scaling.agents import Report
from gateway.scaling.helm import Helm

WANTED = "tidegate_scaling_wanted_replicas"
"""What others act on: there is none as long as nothing was decided."""


def pool_row(helm: Helm, *, changes: int | None = None) -> dict[str, Any]:
    """One pool, with so many of its last changes (None: all that are kept)."""
    standing, scaling, hold = helm.standing, helm.scaling, helm.hold
    if hold is not None and hold.until_unix_s <= time.time():
        hold = None
    demand = helm.demand
    history = helm.history if changes is None else helm.history[-changes:]
    return {
        "pool": helm.pool,
        "provider": helm.provider.name,
        # Nothing, rather than a number that KEDA would act on, until something is decided.
        "wanted": standing.wanted if helm.decided else None,
        "current": standing.current,
        "ready": 0 if demand is None else demand.replicas_ready,
        "starting": 0 if demand is None else demand.replicas_starting,
        "min": scaling.min,
        "max": scaling.max,
        "ceiling": helm.ceiling,
        "held": None if hold is None else {"count": hold.count, "until_unix_s": hold.until_unix_s, "by": hold.by},
        "acting": helm.acting,
        "reasons": [{"kind": each.kind, "wanted": each.wanted, "text": each.text} for each in standing.reasons],
        "limited_by": standing.limited_by,
        "forecast_per_s": standing.forecast_per_s,
        "lead_time_s": standing.lead_time_s,
        "usd_per_hour": standing.usd_per_hour,
        "problem": helm.problem,
        "leaving": [
            {"replica": name, "since_unix_s": round(each.since_unix_s, 3), "told": each.told}
            for name, each in sorted(standing.leaving.items())
        ],
        "workers": helm.view.workers,
        "demand": None if demand is None else _demand(demand),
        "decided_unix_s": round(standing.at_unix_s, 3),
        "history": [
            {"unix_s": each.unix_s, "wanted": each.wanted, "current": each.current, "why": each.why}
            for each in reversed(history)
        ],
    }


def agent_rows(agents: Mapping[str, Report], heard_unix_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """Who launches, what they have, and when they have last said so (None: to another gateway)."""
    return [
        {
            "agent": name,
            "heard_unix_s": heard_unix_s.get(name),
            "pools": [
                {"pool": pool, "launched": has.launched, "ready": has.ready, "max": has.max, "roll": has.roll}
                for pool, has in sorted(report.pools.items())
            ],
        }
        for name, report in sorted(agents.items())
    ]


def _demand(demand: object) -> dict[str, Any]:
    assert dataclasses.is_dataclass(demand)
    assert not isinstance(demand, type)
    found = dataclasses.asdict(demand)
    del found["at_s"]  # of a clock that means nothing elsewhere
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def families(helms: Iterable[Helm]) -> Iterator[Metric]:
    """Of the process that answers operators, whatever worker is asked."""
    helms = list(helms)
    if not helms:
        return
    gauges = (
        (WANTED, "Replicas that a pool should have.", lambda each: each.standing.wanted),
        (
            "tidegate_scaling_current_replicas",
            "Replicas that a pool has: ready, starting or ill.",
            lambda each: each.standing.current,
        ),
        ("tidegate_scaling_held", "1 while an operator holds the number.", lambda each: float(each.hold is not None)),
        (
            "tidegate_scaling_acting",
            "1 at the gateway that decides; of several it is one.",
            lambda each: float(each.acting),
        ),
        (
            "tidegate_scaling_problem",
            "1 while what is wanted cannot be acted on.",
            lambda each: float(each.problem is not None),
        ),
        (
            "tidegate_scaling_lead_time_seconds",
            "From an order to a replica that is ready, as far as is known.",
            lambda each: each.standing.lead_time_s,
        ),
        (
            "tidegate_scaling_forecast_per_second",
            "Requests a second foreseen.",
            lambda each: each.standing.forecast_per_s,
        ),
        (
            "tidegate_scaling_usd_per_hour",
            "What the wanted replicas cost an hour.",
            lambda each: each.standing.usd_per_hour,
        ),
    )
    for name, text, value in gauges:
        family = GaugeMetricFamily(name, text, labels=["pool"])
        for helm in helms if name != WANTED else filter(lambda each: each.decided, helms):
            family.add_metric([helm.pool], value(helm))
        yield family
    errors = CounterMetricFamily(
        "tidegate_scaling_provider_errors_total", "Orders that a provider did not take.", labels=["pool", "provider"]
    )
    for helm in helms:
        errors.add_metric([helm.pool, helm.provider.name], helm.errors)
    yield errors
