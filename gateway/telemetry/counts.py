"""What `/metrics` says of telemetry itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric


def telemetry_families(*, sent: int, dropped: Mapping[str, int], reports: Mapping[str, int]) -> Iterator[Metric]:
    """`dropped`: spans by reason. `reports`: of metrics, by result."""
    yield CounterMetricFamily("tidegate_spans_sent", "Spans that the collector has taken.", value=sent)
    lost = CounterMetricFamily(
        "tidegate_spans_dropped",
        "Spans that did not arrive: refused or not reached (export), too many waiting (queue) or in a second (rate).",
        labels=["reason"],
    )
    for reason, count in dropped.items():
        lost.add_metric([reason], count)
    yield lost
    told = CounterMetricFamily(
        "tidegate_telemetry_reports", "Reports of metrics to the collector, by whether it took them.", labels=["result"]
    )
    for result, count in reports.items():
        told.add_metric([result], count)
    yield told
