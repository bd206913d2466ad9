"""What the log has lost, as a metric."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from gateway.logs import LineHandler
from gateway.request_log import RequestLog


def log_families(handler: LineHandler | None, requests: RequestLog | None) -> Iterator[Metric]:
    """Both may be absent: where logging was set up by somebody else, and where requests are not logged."""
    lost = CounterMetricFamily(
        "tidegate_log_lines_lost", "Log lines that were not written, by whose they were.", labels=["log"]
    )
    lost.add_metric(["process"], 0 if handler is None else handler.writer.lost)
    lost.add_metric(["requests"], 0 if requests is None else requests.lost)
    yield lost
