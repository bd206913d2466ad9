"""Turns the families of `/metrics` into OpenTelemetry's points.

Names stay as they are documented: a counter keeps its `_total`, as OpenTelemetry's rules for Prometheus want it
(https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/). All sums are cumulative since the
worker began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample

from gateway.telemetry import names
from gateway.telemetry.genai import Snapshot
from gateway.version import tidegate_version

_CUMULATIVE = AggregationTemporality.CUMULATIVE
_UNITS = (("_seconds", "s"), ("_bytes", "By"), ("_ratio", "1"), ("_usd", "{USD}"), ("_tokens", "{token}"))


def metrics_data(
    families: Iterable[Family], genai: Iterable[Snapshot], resource: Resource, began_ns: int, now_ns: int, schema: str
) -> MetricsData:
    """Everything of one worker as it is sent. Times are nanoseconds since 1970; `began_ns`: since when it counts."""
    found = [*_converted(families, began_ns, now_ns), *_histograms(genai, began_ns, now_ns)]
    scope = InstrumentationScope(names.SCOPE, tidegate_version(), schema)
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, found, schema)], schema)])


def _converted(families: Iterable[Family], began_ns: int, now_ns: int) -> Iterator[Metric]:
    for family in families:
        if not family.samples:
            continue
        if family.type == "histogram":
            yield _histogram(family, began_ns, now_ns)
            continue
        points = [NumberDataPoint(each.labels, began_ns, now_ns, each.value) for each in family.samples]
        if family.type == "counter":
            total = [each for each in family.samples if each.name.endswith("_total")]
            points = [NumberDataPoint(each.labels, began_ns, now_ns, each.value) for each in total]
            name, data = f"{family.name}_total", Sum(points, _CUMULATIVE, True)
            yield Metric(name, family.documentation, _unit(family.name), data)
        else:
            yield Metric(family.name, family.documentation, _unit(family.name), Gauge(points))


def _histogram(family: Family, began_ns: int, now_ns: int) -> Metric:
    """Prometheus counts up to each bound, OpenTelemetry between two."""
    series: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sorted(sample.labels.items()) if name != "le")
        series.setdefault(labels, []).append(sample)
    points = []
    for labels, samples in series.items():
        buckets = sorted((float(each.labels["le"]), each.value) for each in samples if each.name.endswith("_bucket"))
        total = next((each.value for each in samples if each.name.endswith("_sum")), 0.0)
        counts = [int(count) for _, count in buckets]
        between = [after - before for before, after in zip([0, *counts], counts, strict=False)]
        bounds = [bound for bound, _ in buckets[:-1]]
        points.append(_point(dict(labels), bounds, between, total, began_ns, now_ns))
    return Metric(family.name, family.documentation, _unit(family.name), Histogram(points, _CUMULATIVE))


def _histograms(found: Iterable[Snapshot], began_ns: int, now_ns: int) -> Iterator[Metric]:
    for name, unit, text, series in found:
        points = [
            _point(dict(labels), list(bounds), counts, total, began_ns, now_ns)
            for labels, bounds, counts, total in series
        ]
        if points:
            yield Metric(name, text, unit, Histogram(points, _CUMULATIVE))


def _point(
    labels: dict[str, str], bounds: list[float], counts: list[int], total: float, began_ns: int, now_ns: int
) -> HistogramDataPoint:
    # Neither is known; the message's fields for them are optional, and the encoder leaves out what is None.
    least: Any = None
    most: Any = None
    return HistogramDataPoint(labels, began_ns, now_ns, sum(counts), total, counts, bounds, least, most)


def _unit(name: str) -> str:
    """By the name's end, where it says one (UCUM)."""
    return next((unit for ending, unit in _UNITS if name.endswith(ending)), "")
