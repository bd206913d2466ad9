"""The figures of `/metrics`, and those with names of the conventions, as a collector gets them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, HistogramDataPoint
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.record import Exchange
from gateway.state import LocalSource
from gateway.telemetry import genai, names
from gateway.telemetry.genai import GenAiCounts
from gateway.telemetry.places import Places
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.command import serve_process
from tests.support.http import ask
from tests.support.keyed_command import ask as asked_with
from tests.support.keyed_command import http
from tests.support.otlp import Collector, attributes
from tests.support.serving import serving, settings_for

CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
STREAM = {**CHAT, "stream": True}


Figures = dict[tuple[str, tuple[tuple[str, Any], ...]], float]


def exposed(families: list[Metric]) -> Figures:
    """Values of counters and gauges as `/metrics` has them, by name and labels."""
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for family in families
        if family.type in ("counter", "gauge")
        for each in family.samples
        if not each.name.endswith("_created")
    }


def sent(collector: Collector) -> Figures:
    """The same of the last report."""
    found: Figures = {}
    for resource in collector.metrics[-1].resource_metrics:
        for metric in resource.scope_metrics[0].metrics:
            kind = metric.WhichOneof("data")
            if kind == "sum":
                assert (metric.sum.aggregation_temporality, metric.sum.is_monotonic) == (CUMULATIVE, True)
            if kind in ("sum", "gauge"):
                for point in getattr(metric, kind).data_points:
                    value = getattr(point, point.WhichOneof("value"))
                    found[metric.name, tuple(sorted(attributes(point).items()))] = value
    return found


def histogram(collector: Collector, name: str, **labels: str) -> HistogramDataPoint:
    metric = collector.metric(name)
    assert metric is not None, name
    assert metric.histogram.aggregation_temporality == CUMULATIVE
    point: HistogramDataPoint
    (point,) = [each for each in metric.histogram.data_points if labels.items() <= attributes(each).items()]
    return point


async def test_a_report_has_every_figure_of_the_exposition_and_the_conventions(collector: Collector) -> None:
    telemetry = {"endpoint": collector.url, "metrics": True, "traces": False, "metrics_interval_s": 1.0}
    async with (
        FakeEngine(chunks=3, prompt_tokens=40) as engine,
        serving(settings_for([engine.url], telemetry=telemetry)) as gateway,
    ):
        assert gateway.runtime.telemetry is not None
        assert gateway.runtime.tracing is None
        source = LocalSource(gateway.runtime)
        gateway.runtime.telemetry.start(source.metrics)
        for body in (CHAT, STREAM, {"model": "unknown"}):
            await ask(gateway, body)
        records = await gateway.settled(3)
        seen = len(collector.metrics)
        await collector.until(lambda: len(collector.metrics) > seen + 1)
        expected, found = exposed(await source.metrics()), sent(collector)
    moving = {name for name, _ in expected if name.startswith("process_") or "telemetry" in name}
    moving |= {name for name, _ in expected if name.endswith(("_seconds", "_lag", "_s", "_tasks", "_ratio"))}
    same = {key: value for key, value in expected.items() if key[0] not in moving}
    assert len(same) > 20
    assert {key: value for key, value in found.items() if key in same} == pytest.approx(same)
    assert set(found) == set(expected)
    labels = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.provider.name": "openai"}
    usage = histogram(collector, "gen_ai.client.token.usage", **labels, **{"gen_ai.token.type": "input"})
    assert (usage.count, usage.sum) == (2, 80)
    assert list(usage.explicit_bounds)[:4] == [1, 4, 16, 64]
    assert list(usage.bucket_counts)[:5] == [0, 0, 0, 2, 0]
    assert not usage.HasField("min")
    output = histogram(collector, "gen_ai.client.token.usage", **labels, **{"gen_ai.token.type": "output"})
    assert output.count == 2
    duration = histogram(collector, "gen_ai.server.request.duration", **labels)
    assert duration.count == 2
    assert duration.sum == pytest.approx(sum(each.duration_s for each in records[:2]))
    assert histogram(collector, "gen_ai.server.time_to_first_token", **labels).count == 1


async def test_a_family_keeps_its_name_and_a_histogram_becomes_counts_between_bounds(collector: Collector) -> None:
    telemetry = {"endpoint": collector.url, "metrics": True, "metrics_interval_s": 1.0}

    async def families() -> list[Metric]:
        counter = CounterMetricFamily("x_bytes", "Some.", labels=["a"])
        counter.add_metric(["1"], 5)
        counter.add_metric(["2"], 7)
        gauge = GaugeMetricFamily("y_seconds", "More.", value=1.5)
        buckets = HistogramMetricFamily("z", "Most.", labels=["a"])
        buckets.add_metric(["1"], [("0.1", 1), ("1.0", 4), ("+Inf", 9)], 33.0)
        buckets.add_metric(["2"], [("0.1", 0), ("1.0", 0), ("+Inf", 0)], 0.0)
        return [counter, gauge, buckets, GaugeMetricFamily("none", "Nothing.", labels=["a"])]

    async with FakeEngine() as engine, serving(settings_for([engine.url], telemetry=telemetry)) as gateway:
        assert gateway.runtime.telemetry is not None
        gateway.runtime.telemetry.start(families)
        await collector.until(lambda: collector.metrics)
    counter, gauge = collector.metric("x_bytes_total"), collector.metric("y_seconds")
    assert counter is not None
    assert gauge is not None
    assert {attributes(each)["a"]: each.as_double or each.as_int for each in counter.sum.data_points} == {
        "1": 5,
        "2": 7,
    }
    assert (counter.unit, gauge.unit, gauge.gauge.data_points[0].as_double) == ("By", "s", 1.5)
    point = histogram(collector, "z", a="1")
    assert (list(point.bucket_counts), list(point.explicit_bounds)) == ([1, 3, 5], [0.1, 1.0])
    assert (point.count, point.sum) == (9, 33.0)
    assert point.start_time_unix_nano < point.time_unix_nano <= time.time_ns()
    assert collector.metric("none") is None


async def test_reports_that_are_not_taken_are_counted_and_end_nothing(collector: Collector) -> None:
    telemetry = {"endpoint": collector.url, "metrics": True, "metrics_interval_s": 1.0, "timeout_s": 0.5}
    collector.status = 400
    async with FakeEngine() as engine, serving(settings_for([engine.url], telemetry=telemetry)) as gateway:
        service = gateway.runtime.telemetry
        assert service is not None
        service.start(LocalSource(gateway.runtime).metrics)

        def counted() -> dict[str, float]:
            return {
                each.labels["result"]: each.value
                for family in service.families()
                if family.name == "tidegate_telemetry_reports"
                for each in family.samples
                if "result" in each.labels
            }

        await collector.until(lambda: counted()["lost"] >= 1)
        collector.status = 200
        await collector.until(lambda: counted()["sent"] >= 1)


@pytest.mark.parametrize("workers", [1, 2])
async def test_each_worker_reports_for_itself_and_sends_what_is_left_at_its_end(
    tmp_path: Path, collector: Collector, workers: int
) -> None:
    sections: dict[str, Any] = {
        "telemetry": {"endpoint": collector.url, "ratio": 1.0, "metrics": True, "metrics_interval_s": 600.0}
    }
    environ = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    async with (
        FakeEngine() as engine,
        http() as client,
        serve_process(tmp_path, [engine.url], "--workers", str(workers), environ=environ, **sections) as gateway,
    ):
        url = await gateway.url()
        for _ in range(40):
            assert (await asked_with(client, url, "")).status_code == 200
        gateway.signal(15)
        assert await gateway.ended() == 0
    resources = [attributes(each.resource_metrics[0].resource) for each in collector.metrics]
    assert {each["tidegate.worker"] for each in resources} == set(range(workers))
    assert len({each["service.instance.id"] for each in resources}) == workers
    total = 0
    for request in collector.metrics:
        for metric in request.resource_metrics[0].scope_metrics[0].metrics:
            if metric.name == "tidegate_requests_total":
                total += sum(int(each.as_double or each.as_int) for each in metric.sum.data_points)
    assert total == 40
    assert len(collector.spans) == 80
    assert len({each.trace_id for each in collector.spans}) == 40


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "MAX_SERIES", 3)

    class NoFleet:
        def upstreams(self) -> list[Any]:
            return []

    counts = GenAiCounts(names.names_of("1.41"), Places(NoFleet))  # type: ignore[arg-type]
    for number in range(10):
        exchange = Exchange("r", "/v1/chat/completions", 1.0, 0.0, model=f"m{number}")
        exchange.finished_at = 2.0
        counts.observe(exchange)
    series = {name: found for name, _, _, found in counts.snapshot()}
    assert [len(each) for each in series.values()] == [0, 3, 0]
