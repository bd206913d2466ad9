"""All of one worker's telemetry, made where an endpoint is configured. The only module that `gateway` imports late.

Each worker sends its own, with an instance id and its number as resource attributes: its counters begin with it and
end with it, so that nothing jumps when one of several is replaced, and whoever reads them adds instances up anyway.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.resources import Resource
from prometheus_client.core import Metric

from gateway.config.telemetry import Telemetry
from gateway.fleet import Fleet
from gateway.record import Exchange
from gateway.telemetry import names
from gateway.telemetry.counts import telemetry_families
from gateway.telemetry.export import FLUSH_WITHIN_S, SpanSink, Trouble, aside, collector, quieten
from gateway.telemetry.genai import GenAiCounts
from gateway.telemetry.places import Places
from gateway.telemetry.points import metrics_data
from gateway.telemetry.spans import SpanBuilder
from gateway.telemetry.tracing import Tracing
from gateway.version import tidegate_version

logger = logging.getLogger(__name__)

Families = Callable[[], Coroutine[Any, Any, list[Metric]]]


def service_of(
    settings: Telemetry, fleet: Callable[[], Fleet], worker: int, environ: Mapping[str, str] = os.environ
) -> Service | None:
    """The worker's telemetry; None where OTEL_SDK_DISABLED turns it off."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        logger.info("telemetry is off: OTEL_SDK_DISABLED is set")
        return None
    return Service(settings, fleet, worker, environ)


class Service:
    """Create it inside the worker's event loop; `aclose` sends what is left."""

    def __init__(
        self, settings: Telemetry, fleet: Callable[[], Fleet], worker: int, environ: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._words = names.names_of(settings.semconv)
        self._resource = resource_of(settings, worker, environ)
        self._began_ns = time.time_ns()
        places = Places(fleet)
        self._sink: SpanSink | None = None
        self.tracing: Tracing | None = None
        """None where no traces are sent."""
        if settings.traces:
            self._sink = SpanSink(settings, SpanBuilder(self._words, self._resource, places))
            self.tracing = Tracing(settings, self._sink)
        self._genai = GenAiCounts(self._words, places) if settings.metrics else None
        self._reports: MetricReports | None = None

    def start(self, families: Families) -> None:
        """Begin to report metrics, if they are wanted; `families` says what `/metrics` would."""
        if self._genai is not None:
            self._reports = MetricReports(
                self._settings, families, self._genai, self._resource, self._began_ns, self._words.schema_url
            )

    def settled(self, exchange: Exchange) -> None:
        """An exchange of somebody who is known is over."""
        if self._genai is not None:
            self._genai.observe(exchange)
        if self.tracing is not None and exchange.traced is not None:
            self.tracing.settled(exchange, exchange.traced)

    async def aclose(self) -> None:
        """Send what is left, and stop; within `FLUSH_WITHIN_S`, or the export's time-out if that is shorter."""
        within_s = min(FLUSH_WITHIN_S, self._settings.timeout_s or FLUSH_WITHIN_S)
        async with asyncio.TaskGroup() as tasks:
            if self._reports is not None:
                tasks.create_task(self._reports.aclose(within_s))
            if self._sink is not None:
                tasks.create_task(self._sink.aclose(within_s))

    @property
    def spans_lost(self) -> int:
        """Those that the collector did not take, and those for which there was no room; sampling loses none."""
        return 0 if self._sink is None else self._sink.lost + self._sink.overflown

    def families(self) -> Iterator[Metric]:
        """What became of what was to be sent."""
        sink, tracing, reports = self._sink, self.tracing, self._reports
        yield from telemetry_families(
            sent=0 if sink is None else sink.sent,
            dropped={
                "export": 0 if sink is None else sink.lost,
                "queue": 0 if sink is None else sink.overflown,
                "rate": 0 if tracing is None else tracing.over_budget,
            },
            reports={"sent": 0, "lost": 0} if reports is None else {"sent": reports.sent, "lost": reports.lost},
        )


class MetricReports:
    """Sends all metrics every so many seconds."""

    def __init__(
        self,
        settings: Telemetry,
        families: Families,
        genai: GenAiCounts,
        resource: Resource,
        began_ns: int,
        schema_url: str,
    ) -> None:
        quieten()
        self._exporter = OTLPMetricExporter(**collector(settings, "metrics"))
        self._trouble = Trouble("metrics", settings.endpoint or "")
        self._interval_s = settings.metrics_interval_s
        self._families = families
        self._genai = genai
        self._resource = resource
        self._began_ns = began_ns
        self._schema_url = schema_url
        self.sent = 0
        self.lost = 0
        self._closing = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="telemetry-metrics")

    async def _run(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._interval_s)
            await self._report()  # once more at the end

    async def _report(self) -> None:
        arrived = False
        try:
            families, genai = await self._families(), list(self._genai.snapshot())
            began_ns, now_ns = self._began_ns, time.time_ns()

            def send() -> bool:
                data = metrics_data(families, genai, self._resource, began_ns, now_ns, self._schema_url)
                return self._exporter.export(data) is MetricExportResult.SUCCESS

            arrived = await aside(send, "telemetry-metrics")
        except Exception:  # a defect in one report must not end them all
            if not self.lost:
                logger.exception("metrics cannot be reported")
        if arrived:
            self.sent += 1
        else:
            self.lost += 1
        self._trouble.note(arrived)

    async def aclose(self, within_s: float) -> None:
        """Report once more, within so many seconds."""
        self._closing.set()
        await asyncio.wait([self._task], timeout=within_s)
        self._exporter.shutdown()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def resource_of(settings: Telemetry, worker: int, environ: Mapping[str, str]) -> Resource:
    """Who says it: over OTEL_RESOURCE_ATTRIBUTES, what is configured; over all, which process it is."""
    attributes: dict[str, str | int] = dict(settings.resource)
    if settings.service_name is not None:
        attributes["service.name"] = settings.service_name
    elif not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes.setdefault("service.name", "tidegate")
    attributes["service.version"] = tidegate_version()
    attributes["service.instance.id"] = str(uuid.uuid4())
    attributes[names.WORKER] = worker
    return Resource.create(attributes)
