"""Counts and histograms of the request path, exposed in Prometheus' text format.

The request path pays for a dictionary look-up and a few additions; names, labels and text are made only when somebody
scrapes. prometheus_client does the exposition through a collector; its own instruments are not used, because an
increment there takes a lock and costs several times as much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from backends.upstream import Upstream
from gateway.histogram import FineHistogram, Histogram, fine_bounds
from gateway.record import Exchange, Outcome
from gateway.tenant_metrics import TenantMetrics
from gateway.watch.witness import Witness
from routing.load import Load
from routing.types import Replica

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TTFT_FINE_S = fine_bounds(TTFT_BUCKETS_S)
DURATION_FINE_S = fine_bounds(DURATION_BUCKETS_S)
"""What is counted in; the dashboard reads percentiles from it, and Prometheus gets the buckets above."""
TPOT_BUCKETS_S = (0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
"""10 ms are 100 tokens a second; people read about six a second, 0.15 s each."""

SHORT_PROMPT_TOKENS = 1000
"""A prompt with fewer is a short one, of which an answer within two seconds is expected at the median."""
SHORT, LONG, UNCOUNTED, REFUSED = "short", "long", "unknown", "refused"
"""Sizes of prompts, as a label; the last two are of requests without a usage report, and of those that no replica was
asked for since they were the client's mistake, or over a limit: they take no time to speak of."""
OWN, RENTED = "own", "rented"

MAX_REASONS = 32
"""Reasons counted by name for each model. Policies that users bring may make up any number."""
OTHER_REASON = "other"
MAX_MODELS = 1000
"""Models counted by name. Adapters count as models, and engines may load any number of them in a gateway's life."""
OTHER_MODEL = "other"
UNKNOWN_MODEL = "unknown"
"""Label of requests that never resolved to a configured model; what a client typed is never a label."""


class _Use:
    """Tokens and dollars of one model at replicas of one source."""

    __slots__ = ("cached_tokens", "completion_tokens", "cost_usd", "prompt_tokens", "told_prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.told_prompt_tokens = 0
        """Of these, the ones of requests whose engine said how many were cached."""
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.cost_usd = 0.0


class ModelCounts:
    """All that is counted for one configured model."""

    __slots__ = ("failovers", "long", "own", "reasons", "refused", "rented", "short", "tpot", "ttft", "uncounted")

    def __init__(self) -> None:
        self.own = _Use()
        self.rented: _Use | None = None
        """None until a rented replica has answered."""
        self.ttft = FineHistogram(TTFT_BUCKETS_S, TTFT_FINE_S)
        self.tpot = Histogram(TPOT_BUCKETS_S)
        self.short = FineHistogram(DURATION_BUCKETS_S, DURATION_FINE_S)
        self.long = FineHistogram(DURATION_BUCKETS_S, DURATION_FINE_S)
        self.uncounted = FineHistogram(DURATION_BUCKETS_S, DURATION_FINE_S)
        self.refused = FineHistogram(DURATION_BUCKETS_S, DURATION_FINE_S)
        """From end to end, by the size of the prompt."""
        self.reasons: dict[str, int] = {}
        """Requests by why their last replica was chosen."""
        self.failovers: dict[str, int] = {}
        """Requests that went to another replica after their first, by whether that one answered."""

    @property
    def durations(self) -> tuple[tuple[str, Histogram], ...]:
        """By the size of the prompt."""
        return ((SHORT, self.short), (LONG, self.long), (UNCOUNTED, self.uncounted), (REFUSED, self.refused))

    @property
    def uses(self) -> tuple[tuple[str, _Use], ...]:
        """By source; a source is there from its first request on."""
        return ((OWN, self.own),) if self.rented is None else ((OWN, self.own), (RENTED, self.rented))


class Metrics:
    """One worker's counts."""

    def __init__(self) -> None:
        self.started_unix_s = time.time()
        self.rented: frozenset[tuple[str, str]] = frozenset()
        """Pool and name of the replicas whose tokens are paid for to somebody (`rented_of`)."""
        self.tenants = TenantMetrics()
        self._requests: dict[tuple[str, str, str], int] = {}
        self._refused: dict[int, int] = {}
        self._attempts: dict[tuple[str, str], int] = {}
        self._cached: dict[tuple[str, str], tuple[int, int, int]] = {}
        """Prompt tokens believed to be in a replica's cache, those that its engine then reported, and all of them."""
        self._models: dict[str, ModelCounts] = {}

    def observe(self, exchange: Exchange) -> None:
        """Count one settled exchange."""
        model, outcome = exchange.model or UNKNOWN_MODEL, exchange.outcome or ""
        counts = self._models.get(model)
        if counts is None and exchange.model:
            if len(self._models) >= MAX_MODELS:
                model = OTHER_MODEL
                counts = self._models.get(model)
            if counts is None:
                counts = self._models[model] = ModelCounts()
        key = (model, exchange.route, outcome)
        self._requests[key] = self._requests.get(key, 0) + 1
        self.tenants.observe(exchange)
        if counts is None or not exchange.model:
            return
        began_at, came_at, used = exchange.started_at, exchange.first_content_at, exchange.usage
        ended_at = exchange.finished_at or began_at
        if came_at is not None:
            counts.ttft.observe(came_at - began_at)
        if used is None:
            refused = outcome == "rejected" and not exchange.attempts
            (counts.refused if refused else counts.uncounted).observe(ended_at - began_at)
        else:
            prompt_tokens, completion_tokens = used.prompt_tokens, used.completion_tokens
            (counts.short if prompt_tokens < SHORT_PROMPT_TOKENS else counts.long).observe(ended_at - began_at)
            if (
                came_at is not None
                and completion_tokens > 1
                and outcome == "completed"
                and not exchange.usage_estimated
            ):
                counts.tpot.observe((ended_at - came_at) / (completion_tokens - 1))
        use = self._at_replica(exchange, counts) if exchange.replica else counts.own
        if used is None:
            return
        use.prompt_tokens += used.prompt_tokens
        if used.cached_tokens is not None:
            use.told_prompt_tokens += used.prompt_tokens
            use.cached_tokens += used.cached_tokens
        use.completion_tokens += used.completion_tokens
        if exchange.cost_usd is not None:
            use.cost_usd += exchange.cost_usd

    def _at_replica(self, exchange: Exchange, counts: ModelCounts) -> _Use:
        """Count what a replica was asked for; where what it has used is to be counted."""
        tried = (exchange.pool, exchange.replica)
        attempts = exchange.attempts
        self._attempts[tried] = self._attempts.get(tried, 0) + attempts
        reasons, reason = counts.reasons, exchange.route_reason
        if reason not in reasons and len(reasons) >= MAX_REASONS:
            reason = OTHER_REASON
        reasons[reason] = reasons.get(reason, 0) + 1
        if attempts > 1:
            _count_failover(exchange, counts.failovers)
        used = exchange.usage
        if used is None:
            return counts.own
        cached = used.cached_tokens
        if cached is not None:
            predicted, reported, prompt = self._cached.get(tried, (0, 0, 0))
            predicted += exchange.predicted_cached_tokens
            self._cached[tried] = (predicted, reported + cached, prompt + used.prompt_tokens)
        if tried not in self.rented:
            return counts.own
        counts.rented = counts.rented or _Use()
        return counts.rented

    @property
    def requests(self) -> Mapping[tuple[str, str, str], int]:
        """Settled exchanges by model, route and outcome."""
        return self._requests

    @property
    def refusals(self) -> Mapping[int, int]:
        """Requests of nobody known that were answered with an error, by its status."""
        return self._refused

    @property
    def models(self) -> Mapping[str, ModelCounts]:
        """What is counted of each model that was ever asked for."""
        return self._models

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error before it became an exchange."""
        self._refused[status] = self._refused.get(status, 0) + 1

    def families(self) -> Iterator[Metric]:
        """What was counted, as metric families."""
        requests = CounterMetricFamily(
            "tidegate_requests", "Requests by how they ended.", labels=["model", "route", "outcome"]
        )
        for labels, count in list(self._requests.items()):
            requests.add_metric(labels, count)
        yield requests
        refused = CounterMetricFamily(
            "tidegate_refused", "Requests refused before anything was read into them.", labels=["status"]
        )
        for status, count in list(self._refused.items()):
            refused.add_metric([str(status)], count)
        yield refused
        attempts = CounterMetricFamily(
            "tidegate_attempts",
            "Attempts of requests, by the replica that was tried last.",
            labels=["pool", "replica"],
        )
        for tried, count in list(self._attempts.items()):
            attempts.add_metric(tried, count)
        yield attempts
        yield from self._route_families()
        yield from self._token_families()
        yield self._histogram("tidegate_ttft_seconds", "Time to first content.", lambda counts: counts.ttft)
        yield self._histogram(
            "tidegate_time_per_output_token_seconds",
            "Time between the tokens of a streamed answer, on its average.",
            lambda counts: counts.tpot,
        )
        yield self._durations()
        yield from self.tenants.families()

    def _route_families(self) -> Iterator[Metric]:
        decisions = CounterMetricFamily(
            "tidegate_route_decisions",
            "Requests by why the replica that was tried last was chosen.",
            labels=["model", "reason"],
        )
        failovers = CounterMetricFamily(
            "tidegate_failovers",
            "Requests that another replica than their first was asked for, by whether one answered.",
            labels=["model", "result"],
        )
        for model, counts in list(self._models.items()):
            for reason, count in list(counts.reasons.items()):
                decisions.add_metric([model, reason], count)
            for result, count in list(counts.failovers.items()):
                failovers.add_metric([model, result], count)
        yield decisions
        yield failovers
        predicted = CounterMetricFamily(
            "tidegate_cached_tokens_predicted",
            "Prompt tokens believed to be cached, of requests whose engine says how many were.",
            labels=["pool", "replica"],
        )
        reported = CounterMetricFamily(
            "tidegate_cached_tokens_reported",
            "Prompt tokens of the same requests that the engine had cached by its own account.",
            labels=["pool", "replica"],
        )
        prompt = CounterMetricFamily(
            "tidegate_cached_tokens_prompt",
            "All prompt tokens of the same requests, of which the reported ones are a share.",
            labels=["pool", "replica"],
        )
        for labels, (believed, said, all_) in list(self._cached.items()):
            predicted.add_metric(labels, believed)
            reported.add_metric(labels, said)
            prompt.add_metric(labels, all_)
        yield predicted
        yield reported
        yield prompt

    def _token_families(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "tidegate_tokens",
            "Tokens as reported by the model servers; cached_prompt is part of prompt.",
            labels=["model", "kind", "source"],
        )
        cost = CounterMetricFamily(
            "tidegate_cost_usd", "Dollars, where prices are configured.", labels=["model", "source"]
        )
        for model, counts in list(self._models.items()):
            for source, use in counts.uses:
                tokens.add_metric([model, "prompt", source], use.prompt_tokens)
                tokens.add_metric([model, "cached_prompt", source], use.cached_tokens)
                tokens.add_metric([model, "completion", source], use.completion_tokens)
                cost.add_metric([model, source], use.cost_usd)
        yield tokens
        yield cost

    def _durations(self) -> Metric:
        family = HistogramMetricFamily(
            "tidegate_request_duration_seconds",
            "From a request's first byte to its settlement, by the size of its prompt.",
            labels=["model", "prompt_size"],
        )
        for model, counts in list(self._models.items()):
            for size, histogram in counts.durations:
                family.add_metric([model, size], histogram.buckets(), histogram.total)
        return family

    def _histogram(self, name: str, text: str, pick: Callable[[ModelCounts], Histogram]) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["model"])
        for model, counts in list(self._models.items()):
            histogram = pick(counts)
            family.add_metric([model], histogram.buckets(), histogram.total)
        return family


def rented_of(upstreams: Iterable[Upstream]) -> frozenset[tuple[str, str]]:
    """Pool and name of the replicas that are rented."""
    return frozenset((each.replica.pool, each.replica.name) for each in upstreams if each.hosted)


def _count_failover(exchange: Exchange, counts: dict[str, int]) -> None:
    """A second attempt may also have been at the same replica: with another key, or on a new connection."""
    if len({(each.pool, each.replica) for each in exchange.tries}) > 1 and not exchange.hedged:
        result = "answered" if exchange.outcome is Outcome.COMPLETED else "failed"
        counts[result] = counts.get(result, 0) + 1


def replica_families(replicas: Sequence[Replica], now: float) -> Iterator[Metric]:
    """The replicas' state at this moment."""
    in_flight = GaugeMetricFamily(
        "tidegate_replica_in_flight", "Requests under way at a replica.", labels=["pool", "replica"]
    )
    available = GaugeMetricFamily(
        "tidegate_replica_available", "1 when the replica may be chosen.", labels=["pool", "replica"]
    )
    state = GaugeMetricFamily(
        "tidegate_replica_health", "1 for the state of health the replica is in.", labels=["pool", "replica", "state"]
    )
    draining = GaugeMetricFamily(
        "tidegate_replica_draining", "1 when an operator has the replica drained.", labels=["pool", "replica"]
    )
    cordoned = GaugeMetricFamily(
        "tidegate_replica_cordoned", "1 when an operator has the replica cordoned.", labels=["pool", "replica"]
    )
    for replica in replicas:
        labels = [replica.pool, replica.name]
        in_flight.add_metric(labels, replica.in_flight)
        available.add_metric(labels, float(replica.available(now)))
        state.add_metric([*labels, replica.health.state(now).value], 1.0)
        draining.add_metric(labels, float(replica.draining))
        cordoned.add_metric(labels, float(replica.cordoned))
    yield in_flight
    yield from _capacity_families(replicas)
    yield available
    yield state
    yield draining
    yield cordoned
    yield from _load_families(replicas)


def _capacity_families(replicas: Sequence[Replica]) -> Iterator[Metric]:
    """What replicas take at once; one of which it is not known is left out."""
    requests = GaugeMetricFamily(
        "tidegate_replica_capacity_requests",
        "Requests a replica runs at once, by the first who says: configuration, engine, load reports, refusals.",
        labels=["pool", "replica"],
    )
    tokens = GaugeMetricFamily(
        "tidegate_replica_capacity_tokens",
        "Tokens that a replica's KV cache has for requests.",
        labels=["pool", "replica"],
    )
    for replica in replicas:
        capacity = replica.meter.capacity
        if capacity.requests is not None:
            requests.add_metric([replica.pool, replica.name], capacity.requests)
        if capacity.tokens is not None:
            tokens.add_metric([replica.pool, replica.name], capacity.tokens)
    yield requests
    yield tokens


def _load_families(replicas: Sequence[Replica]) -> Iterator[Metric]:
    """What engines last said of themselves; a replica that does not say is left out."""
    gauges: tuple[tuple[str, str, Callable[[Load], float | None]], ...] = (
        ("tidegate_engine_running", "Requests the engine runs, by its own account.", lambda load: load.running),
        ("tidegate_engine_waiting", "Requests the engine holds in its queue.", lambda load: load.waiting),
        ("tidegate_engine_kv_use_ratio", "Share of the KV cache in use by running requests.", lambda load: load.kv_use),
        (
            "tidegate_engine_prefill_seconds_per_token",
            "Time per uncached prompt token, from the engine's own counters.",
            lambda load: None if load.prefill_us_per_token is None else load.prefill_us_per_token / 1e6,
        ),
    )
    for name, text, pick in gauges:
        family = GaugeMetricFamily(name, text, labels=["pool", "replica"])
        for replica in replicas:
            value = None if replica.load is None else pick(replica.load)
            if value is not None:
                family.add_metric([replica.pool, replica.name], value)
        yield family


def health_families(witness: Witness) -> Iterator[Metric]:
    """What was seen of the replicas' health."""
    changes = CounterMetricFamily(
        "tidegate_replica_changes",
        "Changes of a replica's health: ejected, spared (should be, but half of its pool is), unreachable, recovered.",
        labels=["pool", "replica", "change"],
    )
    for labels, count in list(witness.changes.items()):
        changes.add_metric(labels, count)
    yield changes
    evidence = CounterMetricFamily(
        "tidegate_attempts_unanswered",
        "Attempts that ended without an answer, by what they showed of the replica.",
        labels=["pool", "replica", "evidence"],
    )
    for labels, count in list(witness.evidence.items()):
        evidence.add_metric(labels, count)
    yield evidence


def process_families(
    in_flight: int, body_bytes: int, tasks: int, usage_records_lost: int, started_unix_s: float
) -> Iterator[Metric]:
    """The worker process itself."""
    yield GaugeMetricFamily("tidegate_in_flight", "Requests under way.", value=in_flight)
    yield GaugeMetricFamily("tidegate_request_bytes_held", "Request bytes held in memory.", value=body_bytes)
    yield GaugeMetricFamily("tidegate_tasks", "Tasks of the event loop, requests under way included.", value=tasks)
    yield CounterMetricFamily(
        "tidegate_usage_records_lost", "Usage records that could not be written.", value=usage_records_lost
    )
    yield GaugeMetricFamily("process_start_time_seconds", "When the process started.", value=started_unix_s)
    yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory.", value=_resident_bytes())
    times = os.times()
    yield CounterMetricFamily("process_cpu_seconds", "CPU time, user and system.", value=times.user + times.system)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
