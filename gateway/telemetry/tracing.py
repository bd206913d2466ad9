"""Which requests are traced, and with which ids: decided at their beginning, and once more at their end.

At the beginning by the share that is configured, or by the caller's own decision where that is trusted. At the end,
what was left out is kept all the same if it was unusual (`unusual`): its engines have not recorded their part then,
since they were told that nobody would.

Nothing here imports OpenTelemetry. Its SDK could make the spans as well (`Tracer.start_span`, with an `IdGenerator`
for ids known beforehand), but then for every request: it cannot sample at the end, and its span costs more than all of
this for a request that is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from random import random
from typing import Protocol

from gateway.config.telemetry import Telemetry
from gateway.record import Exchange, Outcome
from gateway.telemetry.context import TraceContext, new_span_id, new_trace_id, parent_in

logger = logging.getLogger(__name__)

DRAWN = "sampled"
"""Why a span is kept of which that was decided at the beginning."""
_LOW_64 = (1 << 64) - 1
_FAULTS = frozenset(
    {
        Outcome.UPSTREAM_ERROR,
        Outcome.UPSTREAM_INTERRUPTED,
        Outcome.UNAVAILABLE,
        Outcome.TIMEOUT,
        Outcome.DRAINED,
        Outcome.INTERNAL,
    }
)
"""Not the client's own. A storm of requests that limits refuse is for metrics to show."""


class Sink(Protocol):
    """Where the spans of a settled exchange are made and sent."""

    def put(self, exchange: Exchange, kept: str) -> None:
        """`kept`: why it is traced."""


class SpanBudget:
    """A token bucket of spans: so many a second, twice as many at once."""

    __slots__ = ("_at", "_left", "_per_s")

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left = 2.0 * per_s
        self._at = 0.0

    def take(self, spans: int, now: float) -> bool:
        """Whether so many may be sent now. `now`: seconds of any clock that does not go back."""
        left = min(2.0 * self._per_s, self._left + max(0.0, now - self._at) * self._per_s)
        self._at, self._left = max(self._at, now), left
        if left < spans:
            return False
        self._left = left - spans
        return True


class Tracing:
    """One worker's decisions about traces."""

    def __init__(self, settings: Telemetry, sink: Sink) -> None:
        self._sink = sink
        self._ratio = settings.ratio
        self._bound = round(settings.ratio * (1 << 64))
        """Of the lower 64 bits of a trace id, as OpenTelemetry's own sampler compares them."""
        self._trusts_parent = settings.trust_parent
        self._keep_unusual = settings.keep_unusual
        self._slow_s = float("inf") if settings.keep_slower_than_s is None else settings.keep_slower_than_s
        self._own = settings.propagate != "none"
        self._hosted = settings.propagate == "all"
        self._replied = settings.response_header
        self._budget = SpanBudget(settings.max_spans_per_s)
        self._capture_max_bytes = settings.capture_max_bytes
        self.over_budget = 0
        """Spans that were dropped since there were too many in a second."""
        self.defects = 0
        """Requests whose spans could not be made."""

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> TraceContext:
        """The ids of a request with these headers, and whether it is sampled."""
        parent, state = parent_in(headers)
        if parent is None:
            trace_id = new_trace_id()
            parent_id, sampled = 0, trace_id & _LOW_64 < self._bound
        else:
            trace_id, parent_id = parent.trace_id, parent.span_id
            # Drawn, not read off the trace id: that one the client has chosen.
            sampled = parent.sampled if self._trusts_parent else random() < self._ratio
        return TraceContext(
            trace_id,
            new_span_id(),
            parent_id,
            sampled,
            state,
            self._own,
            self._hosted,
            self._replied,
            self._capture_max_bytes,
        )

    def settled(self, exchange: Exchange, traced: TraceContext) -> None:
        """The exchange is over: have its spans sent, if it is one of those that are kept. Never raises."""
        kept = DRAWN if traced.sampled else self._unusual(exchange)
        if kept:
            spans = 1 + len(exchange.tries)
            if self._budget.take(spans, exchange.finished_at or exchange.started_at):
                self._put(exchange, kept)
            else:
                self.over_budget += spans
        traced.captured = None  # the record is kept for a while, and must not keep the texts

    def _put(self, exchange: Exchange, kept: str) -> None:
        try:
            self._sink.put(exchange, kept)
        except Exception:  # telemetry must not fail a request
            self.defects += 1
            if self.defects == 1:
                logger.exception("the spans of a request cannot be made; further ones are only counted")

    def _unusual(self, exchange: Exchange) -> str:
        """Why a request that was left out is kept; empty: it is not."""
        if self._keep_unusual and (why := unusual(exchange)):
            return why
        return "slow" if exchange.duration_s > self._slow_s else ""


def unusual(exchange: Exchange) -> str:
    """`error`, `hedged`, `continued`, `retried`, or nothing."""
    if exchange.outcome in _FAULTS:
        return "error"
    if exchange.attempts <= 1:
        return ""
    if exchange.hedged:
        return "hedged"
    return "continued" if exchange.continuations else "retried"
