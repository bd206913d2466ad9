"""Counts by tenant: requests, tokens and dollars.

Tenants are named by operators, who may have any number of them: the first hundred that a worker meets count by name,
the rest together. Who needs all of them asks the database (`tidegate tenants`), or the usage records.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from gateway.record import Exchange

MAX_TENANTS = 100
"""Counted by name, so that there are at most some thousand time series of them."""
OTHER_TENANT = "other"


class _TenantCounts:
    __slots__ = ("cached_tokens", "completion_tokens", "cost_usd", "outcomes", "prompt_tokens")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.cost_usd = 0.0


class TenantMetrics:
    """One worker's."""

    __slots__ = ("_tenants",)

    def __init__(self) -> None:
        self._tenants: dict[str, _TenantCounts] = {}

    def observe(self, exchange: Exchange) -> None:
        """Count one settled exchange; one of nobody known is left out."""
        counts = self._tenants.get(exchange.tenant)
        if counts is None:
            if not exchange.tenant:
                return
            counts = self._begin(exchange.tenant)
        outcome = exchange.outcome or ""
        counts.outcomes[outcome] = counts.outcomes.get(outcome, 0) + 1
        used = exchange.usage
        if used is not None:
            counts.prompt_tokens += used.prompt_tokens
            counts.cached_tokens += used.cached_tokens or 0
            counts.completion_tokens += used.completion_tokens
            counts.cost_usd += exchange.cost_usd or 0.0

    def _begin(self, tenant: str) -> _TenantCounts:
        if len(self._tenants) >= MAX_TENANTS:
            tenant = OTHER_TENANT
        return self._tenants.setdefault(tenant, _TenantCounts())

    def families(self) -> Iterator[Metric]:
        """What was counted, as metric families."""
        requests = CounterMetricFamily(
            "tidegate_tenant_requests", "Requests by tenant and how they ended.", labels=["tenant", "outcome"]
        )
        tokens = CounterMetricFamily(
            "tidegate_tenant_tokens",
            "Tokens by tenant, as reported by the model servers; cached_prompt is part of prompt.",
            labels=["tenant", "kind"],
        )
        cost = CounterMetricFamily(
            "tidegate_tenant_cost_usd", "Dollars by tenant, where prices are configured.", labels=["tenant"]
        )
        for tenant, counts in list(self._tenants.items()):
            for outcome, count in list(counts.outcomes.items()):
                requests.add_metric([tenant, outcome], count)
            tokens.add_metric([tenant, "prompt"], counts.prompt_tokens)
            tokens.add_metric([tenant, "cached_prompt"], counts.cached_tokens)
            tokens.add_metric([tenant, "completion"], counts.completion_tokens)
            cost.add_metric([tenant], counts.cost_usd)
        yield requests
        yield tokens
        yield cost
