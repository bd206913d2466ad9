"""A collector for tests: a real HTTP server on loopback that reads OTLP (protobuf) as OpenTelemetry's own types."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_S = 15.0


class Collector:
    """What it was sent. The server's threads append; tests read."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        """What it answers; an error keeps nothing of what was sent."""
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.gate = threading.Event()
        """Answers wait for it."""
        self.gate.set()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in list(self.traces)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def of(self, request_id: str) -> list[Span]:
        """A request's span, and those of its attempts in their order."""
        own = [each for each in self.spans if attributes(each).get("tidegate.request.id") == request_id]
        below = [each for span in own for each in self.spans if each.parent_span_id == span.span_id]
        return [*own, *sorted(below, key=lambda each: int(attributes(each)["tidegate.attempt.number"]))]

    def metric(self, name: str) -> Metric | None:
        """The last report of this metric."""
        for request in reversed(list(self.metrics)):
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    found: Metric
                    for found in scope.metrics:
                        if found.name == name:
                            return found
        return None

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - other threads make it true
                await asyncio.sleep(0.01)

    async def request(self, request_id: str) -> list[Span]:
        """`of`, once it is there: a request's spans are sent together."""
        await self.until(lambda: self.of(request_id))
        return self.of(request_id)


def attributes(holder: Any) -> dict[str, Any]:
    """Of a span, an event, a resource or a point."""
    return {each.key: value_of(each.value) for each in _pairs(holder)}


def _pairs(holder: Any) -> Iterator[KeyValue]:
    yield from holder.attributes


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


def events(span: Span) -> list[str]:
    return [each.name for each in span.events]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.gate.wait(PATIENCE_S)
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if collector.status == 200:
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.bodies.append(body)
                if self.path.endswith("/v1/traces"):
                    collector.traces.append(ExportTraceServiceRequest.FromString(body))
                elif self.path.endswith("/v1/metrics"):
                    collector.metrics.append(ExportMetricsServiceRequest.FromString(body))
            self.send_response(collector.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
