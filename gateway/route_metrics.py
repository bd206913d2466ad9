"""What routing believes and how right it was, as metrics, made when somebody scrapes: work, learned speeds, predicted
against observed times to first token, and the prefix index.

Counts of decisions are in `gateway.metrics`, beside the other counts of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.fleet import Pool
from routing.learned import RATIOS, TtftError
from routing.types import Replica

_LABELS = ("pool", "replica")

_GAUGES: tuple[tuple[str, str, Callable[[Replica], float]], ...] = (
    (
        "tidegate_replica_queued_requests",
        "Requests sent to a replica, by all gateways, that wait for their first token.",
        lambda replica: replica.work.queued,
    ),
    (
        "tidegate_replica_queued_tokens",
        "Prompt tokens of those that are not believed to be cached: prefill to be done.",
        lambda replica: replica.work.queued_tokens,
    ),
    (
        "tidegate_replica_running_requests",
        "Requests past their first token, of all gateways.",
        lambda replica: replica.work.running,
    ),
    (
        "tidegate_replica_running_tokens",
        "Tokens that those hold in the KV cache, estimated.",
        lambda replica: replica.work.running_tokens,
    ),
    (
        "tidegate_replica_prefill_seconds_per_token",
        "Time per uncached prompt token, as learned from answers.",
        lambda replica: replica.speed.prefill_ms / 1000,
    ),
    (
        "tidegate_replica_step_seconds",
        "Time of an engine's step with an empty batch, as learned.",
        lambda replica: replica.speed.step_ms / 1000,
    ),
    (
        "tidegate_replica_step_seconds_per_request",
        "What each running request adds to a step, as learned.",
        lambda replica: replica.speed.request_ms / 1000,
    ),
    (
        "tidegate_replica_step_seconds_per_token",
        "What each token in the KV cache of a running request adds to a step, as learned.",
        lambda replica: replica.speed.kv_ms / 1000,
    ),
    (
        "tidegate_replica_round_trip_seconds",
        "Round trip to a replica and what else is paid once per request, as learned.",
        lambda replica: replica.speed.rtt_ms / 1000,
    ),
    (
        "tidegate_replica_failure_ratio",
        "Chance that a request fails there, as learned.",
        lambda replica: replica.speed.failure,
    ),
)


def route_families(pools: Collection[Pool]) -> Iterator[Metric]:
    """The state of routing at this moment."""
    for name, text, pick in _GAUGES:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        for pool in pools:
            for replica in pool.replicas:
                family.add_metric([pool.name, replica.name], pick(replica))
        yield family
    yield from _prediction_families(
        [
            ([pool.name, replica.name], error)
            for pool in pools
            for replica in pool.replicas
            if (error := pool.routing.calibration.error(replica)) is not None
        ]
    )
    yield from _index_families(pools)


def _prediction_families(errors: Sequence[tuple[list[str], TtftError]]) -> Iterator[Metric]:
    """Predicted against observed; a replica of which nothing was predicted yet is left out."""
    error_ratio = GaugeMetricFamily(
        "tidegate_ttft_prediction_error_ratio",
        "Mean of |predicted - observed| / observed time to first token, over the last fifty requests or so.",
        labels=_LABELS,
    )
    bias = GaugeMetricFamily(
        "tidegate_ttft_prediction_bias_ratio",
        "The same with its sign: above 0 where too much time is predicted.",
        labels=_LABELS,
    )
    predicted = CounterMetricFamily(
        "tidegate_ttft_predicted_seconds", "Predicted times to first token, added up.", labels=_LABELS
    )
    observed = CounterMetricFamily(
        "tidegate_ttft_observed_seconds", "Observed ones of the same requests, from dispatch, added up.", labels=_LABELS
    )
    ratio = HistogramMetricFamily(
        "tidegate_ttft_prediction_ratio", "Requests by predicted / observed time to first token.", labels=_LABELS
    )
    bounds = [*map(str, RATIOS), "+Inf"]
    for labels, error in errors:
        error_ratio.add_metric(labels, error.mean_absolute)
        bias.add_metric(labels, error.bias)
        predicted.add_metric(labels, error.predicted_ms / 1000)
        observed.add_metric(labels, error.observed_ms / 1000)
        ratio.add_metric(labels, list(zip(bounds, accumulate(error.ratios), strict=True)), None)
    yield from (error_ratio, bias, predicted, observed, ratio)


def _index_families(pools: Collection[Pool]) -> Iterator[Metric]:
    """What the prefix indexes hold and have given up."""
    keys = GaugeMetricFamily(
        "tidegate_prefix_index_keys",
        "Prefix keys believed to be cached; one that several replicas hold counts for each.",
        labels=["pool"],
    )
    most = GaugeMetricFamily("tidegate_prefix_index_max_keys", "Keys that an index holds at most.", labels=["pool"])
    evicted = CounterMetricFamily(
        "tidegate_prefix_index_evicted_keys", "Prefix keys given up, by cause.", labels=["pool", "cause"]
    )
    tokens = GaugeMetricFamily(
        "tidegate_replica_prefix_tokens", "Prompt tokens believed to be in a replica's cache.", labels=_LABELS
    )
    budget = GaugeMetricFamily(
        "tidegate_replica_prefix_budget_tokens",
        "How many may be believed to be there: its capacity, corrected by what engines report.",
        labels=_LABELS,
    )
    for pool in pools:
        stats, slots = pool.routing.index.stats(), pool.routing.slots
        keys.add_metric([pool.name], stats.pairs)
        most.add_metric([pool.name], stats.max_keys)
        causes = (
            ("budget", stats.evicted_budget),
            ("cap", stats.evicted_cap),
            ("engine", stats.evicted_engine),
            ("failed", stats.dropped),
        )
        for cause, count in causes:
            evicted.add_metric([pool.name, cause], count)
        for replica in pool.replicas:
            target = None if replica not in slots else stats.targets.get(slots[replica])
            if target is not None:
                tokens.add_metric([pool.name, replica.name], target.tokens)
                budget.add_metric([pool.name, replica.name], target.budget_tokens)
    yield from (keys, most, evicted, tokens, budget)
