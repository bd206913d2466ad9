"""What is counted at the gate, and what is told of it in Prometheus' format."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.admission.refused import RefusalsByHolder
from gateway.histogram import Histogram
from gateway.keys.records import PRIORITY_CLASSES
from gateway.limits.plan import Plan
from gateway.store.limits import Admission as Answer
from gateway.store.places import Band

if TYPE_CHECKING:
    from gateway.admission.gate import Gate
    from gateway.admission.opening import Admission

WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TTFT_WEIGHT = 0.05
_MAX_MODELS = 10_000


class SpentBudgets:
    """Which budgets have refused requests lately. Only refusals come here."""

    MOST = 256
    """Kept, those of the last refusals."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], tuple[str, float, int]] = {}

    def note(self, scope: str, label: str, limit: str) -> None:
        """One request was refused by `limit` of this scope, which clients know as `label`."""
        before = self._last.pop((scope, limit), None)
        if len(self._last) >= self.MOST:
            del self._last[next(iter(self._last))]
        self._last[scope, limit] = (label, time.time(), 1 if before is None else before[2] + 1)

    def since(self, unix_s: float) -> Iterator[tuple[str, str, str, float, int]]:
        """Scope, label, limit, time of the last refusal and their number, of those that refused after `unix_s`."""
        for (scope, limit), (label, last_unix_s, count) in self._last.items():
            if last_unix_s >= unix_s:
                yield scope, label, limit, last_unix_s, count


class AdmissionMetrics:
    """One worker's counts."""

    def __init__(self) -> None:
        self._refusals: Counter[tuple[str, str, str]] = Counter()
        self.by_holder = RefusalsByHolder()
        self._turned_away: Counter[tuple[str, str]] = Counter()
        self._waits: dict[tuple[str, Band], Histogram] = {}
        self._ttft_s: dict[str, float] = {}
        self.spent = SpentBudgets()
        """Budgets that have said no."""
        self.estimated = 0
        """Requests settled without a usage report."""

    @property
    def limited(self) -> Mapping[tuple[str, str, str], int]:
        """Limits that said no, by whose they are, which, and whether they are enforced."""
        return self._refusals

    @property
    def sent_off(self) -> Mapping[tuple[str, str], int]:
        """Requests that the queue turned away, by pool and reason."""
        return self._turned_away

    def refusals(self, plan: Plan, answer: Answer) -> None:
        """Count every limit that said no, those that are only tried out as well."""
        for refusal in answer.refusals:
            kind = plan.labels[refusal.scope].partition(" ")[0]
            limit = {"d": "usd_per_day", "m": "usd_per_month"}.get(refusal.limit[:1], refusal.limit)
            if refusal.limit in ("requests", "input", "output", "total", "concurrent"):
                limit = refusal.limit
            self._refusals[kind, limit, "shadow" if refusal.shadow else "enforced"] += 1
            self.by_holder.note(plan.scopes[refusal.scope].key, refusal)
            if limit.startswith("usd_") and refusal.wait_us < 0 and not refusal.shadow:
                self.spent.note(plan.scopes[refusal.scope].key, plan.labels[refusal.scope], limit)

    def turned_away(self, pool: str, reason: str) -> None:
        self._turned_away[pool, reason] += 1

    def waited(self, pool: str, band: Band, seconds: float) -> None:
        histogram = self._waits.get((pool, band))
        if histogram is None:
            histogram = self._waits[pool, band] = Histogram(WAIT_BUCKETS_S)
        histogram.observe(seconds)

    def answered(self, model: str, ttft_s: float) -> None:
        """Learn how long a model usually takes to begin, once its request has a place."""
        known = self._ttft_s.get(model)
        if known is None:
            if len(self._ttft_s) < _MAX_MODELS:
                self._ttft_s[model] = ttft_s
        else:
            self._ttft_s[model] = known + _TTFT_WEIGHT * (ttft_s - known)

    def ttft_s(self, model: str) -> float:
        """A usual time to first content; 0 while nothing is known."""
        return self._ttft_s.get(model, 0.0)

    def families(self, admission: Admission) -> Iterator[Metric]:
        """What was counted, who is in line now, and how the store and the keys are."""
        gate = admission.gate
        refusals = CounterMetricFamily(
            "tidegate_limit_refusals",
            "Limits that said no, by whose they are; shadow ones were not enforced.",
            labels=["scope", "limit", "mode"],
        )
        for labels, count in list(self._refusals.items()):
            refusals.add_metric(labels, count)
        yield refusals
        turned_away = CounterMetricFamily(
            "tidegate_queue_refusals", "Requests that the queue turned away, by reason.", labels=["pool", "reason"]
        )
        for labels2, count in list(self._turned_away.items()):
            turned_away.add_metric(labels2, count)
        yield turned_away
        waits = HistogramMetricFamily(
            "tidegate_queue_wait_seconds", "Time in line, of requests that had to wait.", labels=["pool", "class"]
        )
        for (pool, band), histogram in list(self._waits.items()):
            waits.add_metric([pool, PRIORITY_CLASSES[band]], histogram.buckets(), histogram.total)
        yield waits
        yield from _line_families(gate)
        yield from _store_families(gate)
        yield from _record_families(admission)
        yield CounterMetricFamily(
            "tidegate_usage_estimated", "Requests settled by an estimate, without a usage report.", value=self.estimated
        )


def _line_families(gate: Gate) -> Iterator[Metric]:
    """Who waits in this worker, and how far the last of each pool is from its turn."""
    waiting = GaugeMetricFamily("tidegate_queue_waiting", "Requests in line.", labels=["pool", "class"])
    position = GaugeMetricFamily(
        "tidegate_queue_position", "Position in which the last request in line was told to stand.", labels=["pool"]
    )
    predicted = GaugeMetricFamily(
        "tidegate_queue_predicted_wait_seconds", "Wait that the last request in line was told.", labels=["pool"]
    )
    counts: Counter[tuple[str, str]] = Counter()
    last: dict[str, tuple[int, float]] = {}
    for visit in gate.in_line():
        counts[visit.pool, PRIORITY_CLASSES[visit.order.band]] += 1
        last[visit.pool] = (visit.exchange.queue_position, visit.exchange.predicted_wait_s)
    for labels, count in counts.items():
        waiting.add_metric(labels, count)
    for pool, (place, wait_s) in last.items():
        position.add_metric([pool], place)
        predicted.add_metric([pool], wait_s)
    yield waiting
    yield position
    yield predicted


def _store_families(gate: Gate) -> Iterator[Metric]:
    home = gate.home
    mode = GaugeMetricFamily(
        "tidegate_store_mode", "1 for what decides about limits and places at the moment.", labels=["mode"]
    )
    mode.add_metric([home.mode.value], 1.0)
    yield mode
    yield GaugeMetricFamily(
        "tidegate_store_mode_seconds", "How long it has been that.", value=time.monotonic() - home.mode_since
    )
    yield GaugeMetricFamily(
        "tidegate_gateways", "Gateway processes that shared the store when it was last heard of.", value=home.gateways
    )
    yield GaugeMetricFamily(
        "tidegate_store_untold", "Settlements that wait for the store to come back.", value=home.untold
    )
    yield CounterMetricFamily(
        "tidegate_store_settlements_lost", "Settlements that the store will never hear of.", value=home.dropped
    )


def _record_families(admission: Admission) -> Iterator[Metric]:
    """Keys and money of record."""
    sync, spend = admission.sync, admission.gate.spend
    known = GaugeMetricFamily("tidegate_keys_known", "API keys in memory.")
    age = GaugeMetricFamily("tidegate_keys_age_seconds", "Since the keys of the database were last read.")
    failures = CounterMetricFamily("tidegate_keys_failures", "Readings of the keys that failed.")
    if sync is not None:
        known.add_metric([], sync.keys_known)
        failures.add_metric([], sync.counts.failures)
        age_s = sync.age_s()
        if age_s is not None:
            age.add_metric([], age_s)
    yield known
    yield age
    yield failures
    yield CounterMetricFamily(
        "tidegate_database_shared",
        "Times that another gateway with a store of its own was found on the same database.",
        value=0 if admission.sole is None else admission.sole.lost,
    )
    yield GaugeMetricFamily(
        "tidegate_spend_waiting_usd", "Spend that is not on record yet.", value=spend.waiting_micros / 1e6
    )
    yield CounterMetricFamily(
        "tidegate_spend_lost_usd", "Spend that will never be on record.", value=spend.lost_micros / 1e6
    )
