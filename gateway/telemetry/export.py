"""Sends spans from a thread of the SDK's, and counts what does not arrive.

A collector that is away costs a bounded queue and a line in the log: the SDK's own lines, one for each export and each
try, are silenced. Losses are counted by where they happen.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from gateway.config.telemetry import Telemetry
from gateway.record import Exchange
from gateway.telemetry.spans import SpanBuilder

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Spans that wait for the thread, those being sent included: some 16 MB."""
MAX_TEXT_BYTES = 16 << 20
"""Captured texts that wait with them; a request beyond that is sent without its own."""
BATCH = 512
FLUSH_WITHIN_S = 5.0
"""How long a worker that stops waits for what is left to be sent."""

T = TypeVar("T")


class Trouble:
    """Says in the log when something cannot be sent, and when it can again: once each."""

    def __init__(self, what: str, endpoint: str) -> None:
        self._what = what
        self._endpoint = endpoint
        self._failing = False

    def note(self, arrived: bool) -> None:
        """What came of one export."""
        if arrived == (not self._failing):
            return
        self._failing = not arrived
        if arrived:
            logger.info("%s are taken by %s again", self._what, self._endpoint)
        else:
            logger.warning("%s cannot be sent to %s; from now on losses are only counted", self._what, self._endpoint)


class _Counting(SpanExporter):
    """The OTLP exporter, with a count of what became of the spans. Called by the SDK's thread alone."""

    def __init__(self, exporter: SpanExporter, builder: SpanBuilder, trouble: Trouble) -> None:
        self._exporter = exporter
        self._builder = builder
        self._trouble = trouble
        self.sent = 0
        self.lost = 0
        self.text_bytes = 0
        """Of captured texts that it is done with."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        arrived = False
        try:
            arrived = self._exporter.export(spans) is SpanExportResult.SUCCESS
        finally:
            if arrived:
                self.sent += len(spans)
            else:
                self.lost += len(spans)
            self.text_bytes += sum(map(self._builder.text_bytes, spans))
            self._trouble.note(arrived)
        return SpanExportResult.SUCCESS if arrived else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self._exporter.shutdown()


class SpanSink:
    """A `gateway.telemetry.tracing.Sink` that sends what it is given."""

    def __init__(self, settings: Telemetry, builder: SpanBuilder) -> None:
        self._builder = builder
        quieten()
        exporter = OTLPSpanExporter(**collector(settings, "traces"))
        self._exporter = _Counting(exporter, builder, Trouble("spans", settings.endpoint or ""))
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=MAX_QUEUED, max_export_batch_size=BATCH)
        self._handed = 0
        self._text_bytes = 0
        self.overflown = 0
        """Spans that were dropped since too many were waiting."""

    @property
    def sent(self) -> int:
        return self._exporter.sent

    @property
    def lost(self) -> int:
        """Spans that the collector did not take."""
        return self._exporter.lost

    @property
    def waiting(self) -> int:
        return self._handed - self._exporter.sent - self._exporter.lost

    def put(self, exchange: Exchange, kept: str) -> None:
        if self.waiting + 1 + len(exchange.tries) > MAX_QUEUED:  # the SDK would drop the oldest, and not count
            self.overflown += 1 + len(exchange.tries)
            return
        traced = exchange.traced
        if traced is not None and self._text_bytes - self._exporter.text_bytes > MAX_TEXT_BYTES:
            traced.captured = None
        spans = self._builder.spans(exchange, kept)
        self._handed += len(spans)
        if traced is not None and traced.captured is not None:
            self._text_bytes += sum(map(self._builder.text_bytes, spans))
        for span in spans:
            self._processor.on_end(span)

    async def aclose(self, within_s: float) -> None:
        """Send what is waiting, within so many seconds; what is not sent by then is lost."""
        ended = aside(self._processor.shutdown, "telemetry-flush")
        done, _ = await asyncio.wait([ended], timeout=within_s)
        if not done:
            self._exporter.shutdown()  # ends the waiting between two tries
        if self.waiting:
            logger.warning("%d spans were not sent before the end", self.waiting)


def collector(settings: Telemetry, signal: str) -> dict[str, Any]:
    """What the SDK's exporter of this signal (`traces`, `metrics`) is made with.

    What is None here the exporter takes from OTEL_EXPORTER_OTLP_*: time-out, headers, certificates, compression.
    """
    headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
    if settings.token is not None:
        headers["authorization"] = f"Bearer {settings.token.get_secret_value()}"
    return {
        "endpoint": f"{settings.endpoint}/v1/{signal}",
        "headers": headers,
        "timeout": settings.timeout_s,
        "session": _session(),
    }


def _session() -> requests.Session:
    """One that goes where it is sent: past proxies and `.netrc` of the environment, and nowhere else."""
    session = requests.Session()
    session.trust_env = False
    session.hooks["response"].append(_refuse_redirect)
    return session


def _refuse_redirect(response: requests.Response, **_: Any) -> None:
    """The exporter takes a redirect, which it does not follow, for success."""
    if 300 <= response.status_code < 400:
        response.close()
        raise requests.TooManyRedirects(f"the collector answered {response.status_code}")


def quieten() -> None:
    """Have the SDK and its HTTP library say nothing of every export that fails: `Trouble` does, once."""
    for name in ("opentelemetry", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def aside(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a thread that nobody waits for when the process ends, unlike those of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if ended.done():
            return
        if error is not None:
            ended.set_exception(error)
        else:
            ended.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=run, name=name, daemon=True).start()
    return ended
