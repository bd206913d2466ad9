"""The spans of one settled exchange: one of the kind SERVER for the request, one CLIENT below it for each attempt.

They are made whole, as the SDK's own `ReadableSpan`, from the exchange's record: their times are those that the record
has, turned from the monotonic clock to the wall's by the one moment that the record knows in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway.record import LEFT, OUTRUN, Attempt, Exchange, Outcome
from gateway.telemetry import names
from gateway.telemetry.context import TraceContext
from gateway.telemetry.names import Names
from gateway.telemetry.places import Places
from gateway.version import tidegate_version

Value = str | bool | int | float
_RECORDED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)
_NO_FAULT = frozenset({"", LEFT, OUTRUN})
"""How an attempt may end without being an error."""
_FINE = frozenset({Outcome.COMPLETED, Outcome.CLIENT_LEFT, None})


class SpanBuilder:
    """Makes spans of records."""

    def __init__(self, words: Names, resource: Resource, places: Places) -> None:
        self._names = words
        self._resource = resource
        self._places = places
        self._scope = InstrumentationScope(names.SCOPE, tidegate_version(), words.schema_url)

    def text_bytes(self, span: ReadableSpan) -> int:
        """About how much memory the texts take that this span carries."""
        said = span.attributes or {}
        return sum(len(str(said.get(name, ""))) for name in (self._names.input_messages, self._names.output_messages))

    def spans(self, exchange: Exchange, kept: str) -> list[ReadableSpan]:
        """All of an exchange's, the request's own last. `kept`: why they are sent."""
        traced = exchange.traced
        if traced is None:
            return []
        clock = _Clock(exchange)
        state = TraceState.from_header([traced.state.decode("latin-1")]) if traced.state else None
        own = SpanContext(traced.trace_id, traced.span_id, False, _RECORDED, state)
        found = [
            self._attempt(exchange, each, number, own, clock, last=number == len(exchange.tries))
            for number, each in enumerate(exchange.tries, 1)
        ]
        found.append(self._request(exchange, traced, kept, own, clock))
        return found

    def _request(
        self, exchange: Exchange, traced: TraceContext, kept: str, own: SpanContext, clock: _Clock
    ) -> ReadableSpan:
        parent = SpanContext(traced.trace_id, traced.parent_id, True, _RECORDED) if traced.parent_id else None
        attributes = self._attributes(exchange)
        attributes[names.KEPT] = kept
        captured = traced.captured
        if captured is not None:
            attributes[self._names.input_messages] = captured.prompt
            if answer := captured.answer():
                attributes[self._names.output_messages] = answer
            attributes[names.TRUNCATED] = captured.truncated
        return ReadableSpan(
            names.span_name(exchange.route),
            context=own,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            events=_request_events(exchange, clock),
            kind=SpanKind.SERVER,
            status=self._status(exchange),
            start_time=clock.ns(exchange.started_at),
            end_time=clock.ns(exchange.finished_at or exchange.started_at),
            instrumentation_scope=self._scope,
        )

    def _attributes(self, exchange: Exchange) -> dict[str, Value]:
        words, used = self._names, exchange.usage
        found: dict[str, Value | None] = {
            words.http_method: "POST",
            words.http_route: exchange.route,
            words.url_path: exchange.route,
            words.url_scheme: "http",
            words.http_status: exchange.status or None,
            words.http_request_bytes: exchange.request_bytes,
            words.http_response_bytes: exchange.response_bytes,
            words.operation: names.OPERATIONS.get(exchange.route),
            words.request_model: exchange.model or None,
            words.stream: exchange.stream,
            words.first_chunk_s: exchange.ttft_s,
            words.error_type: _error_type(exchange),
            names.REQUEST_ID: exchange.request_id,
            names.TENANT: exchange.tenant,
            names.KEY_ID: exchange.key_id or None,
            names.PRIORITY_CLASS: exchange.priority_class or None,
            names.OUTCOME: exchange.outcome,
            names.POOL: exchange.pool or None,
            names.REPLICA: exchange.replica or None,
            names.REGION: exchange.region,
            names.ROUTE_REASON: exchange.route_reason or None,
            names.ATTEMPTS: exchange.attempts,
            names.PREDICTED_CACHED: exchange.predicted_cached_tokens if exchange.replica else None,
            names.PREDICTED_TTFT_MS: exchange.predicted_ttft_ms,
            names.QUEUE_MS: None if exchange.queued_at is None else exchange.queue_s * 1000,
            names.QUEUE_POSITION: exchange.queue_position or None,
            names.SPILL: exchange.spill or None,
            names.FALLBACK_FROM: exchange.fallback_from or None,
            names.HEDGED: exchange.hedged,
            names.CONTINUATIONS: exchange.continuations,
            names.POSSIBLE_DUPLICATE: exchange.possible_duplicate or None,
            names.CONTENT_EVENTS: exchange.content_events or None,
            names.COST_USD: exchange.cost_usd,
        }
        if used is not None:
            found[words.input_tokens] = used.prompt_tokens
            found[words.output_tokens] = used.completion_tokens
            found[words.cache_read] = used.cached_tokens
            found[names.USAGE_ESTIMATED] = exchange.usage_estimated or None
        return _said(found)

    def _attempt(
        self, exchange: Exchange, tried: Attempt, number: int, request: SpanContext, clock: _Clock, *, last: bool
    ) -> ReadableSpan:
        words, place, used = self._names, self._places.of(tried.pool, tried.replica), exchange.usage
        operation = names.OPERATIONS.get(exchange.route, "")
        failed = tried.code not in _NO_FAULT
        found: dict[str, Value | None] = {
            words.operation: operation,
            words.provider: place.provider or None,
            words.request_model: exchange.model or None,
            words.stream: exchange.stream,
            words.max_tokens: exchange.max_tokens_set,
            words.server_address: place.host or None,
            words.server_port: place.port,
            words.error_type: tried.code if failed else None,
            words.first_chunk_s: _between(tried.sent_at, tried.first_content_at),
            names.POOL: tried.pool,
            names.REPLICA: tried.replica,
            names.ROUTE_REASON: tried.reason,
            names.ATTEMPT: number,
            names.ATTEMPT_CODE: tried.code or None,
        }
        if used is not None and not tried.code and (last or exchange.hedged):
            found[words.input_tokens] = used.prompt_tokens
            found[words.output_tokens] = used.completion_tokens
            found[words.cache_read] = used.cached_tokens
        return ReadableSpan(
            names.attempt_name(operation, exchange.model),
            context=SpanContext(request.trace_id, tried.span_id, False, _RECORDED, request.trace_state),
            parent=request,
            resource=self._resource,
            attributes=_said(found),
            events=_attempt_events(tried, clock),
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR, tried.code) if failed else _UNSET,
            start_time=clock.ns(tried.begun_at),
            end_time=clock.ns(tried.ended_at or exchange.finished_at or tried.begun_at),
            instrumentation_scope=self._scope,
        )

    def _status(self, exchange: Exchange) -> Status:
        """An error where the server's side is to blame: of a client's own mistakes the conventions say nothing."""
        if exchange.status >= 500 or exchange.outcome in (Outcome.UPSTREAM_INTERRUPTED, Outcome.INTERNAL):
            return Status(StatusCode.ERROR, exchange.error_code)
        if exchange.status == 200 and exchange.outcome not in _FINE:  # it was said in the stream
            return Status(StatusCode.ERROR, exchange.error_code)
        return _UNSET


class _Clock:
    """Turns the record's monotonic seconds into nanoseconds since 1970."""

    __slots__ = ("_began_at", "_began_ns")

    def __init__(self, exchange: Exchange) -> None:
        self._began_at = exchange.started_at
        self._began_ns = int(exchange.started_unix_s * 1e9)

    def ns(self, at: float) -> int:
        return self._began_ns + int((at - self._began_at) * 1e9)


def _request_events(exchange: Exchange, clock: _Clock) -> list[Event]:
    found: list[tuple[str, float | None, Mapping[str, Value] | None]] = [
        (names.EVENT_READ, exchange.read_at or None, None)
    ]
    if exchange.queued_at is not None:
        found.append((names.EVENT_QUEUED, exchange.queued_at, {names.QUEUE_POSITION: exchange.queue_position}))
        waited = {names.QUEUE_MS: exchange.queue_s * 1000}
        found.append((names.EVENT_ADMITTED, exchange.queued_at + exchange.queue_s, waited))
    found.append((names.EVENT_FIRST_CONTENT, exchange.first_content_at, None))
    found.append((names.EVENT_END, exchange.finished_at, {names.OUTCOME: exchange.outcome or ""}))
    return _events(found, clock)


def _attempt_events(tried: Attempt, clock: _Clock) -> list[Event]:
    ended = {names.ATTEMPT_CODE: tried.code} if tried.code else None
    return _events(
        [
            (names.EVENT_DECIDED, tried.begun_at, {names.ROUTE_REASON: tried.reason}),
            (names.EVENT_CONNECTED, tried.connected_at, None),
            (names.EVENT_SENT, tried.sent_at, None),
            (names.EVENT_FIRST_CONTENT, tried.first_content_at, None),
            (names.EVENT_END, tried.ended_at, ended),
        ],
        clock,
    )


def _events(found: Sequence[tuple[str, float | None, Mapping[str, Value] | None]], clock: _Clock) -> list[Event]:
    """Those that have happened, in their order."""
    happened = [Event(name, more, clock.ns(at)) for name, at, more in found if at is not None]
    return sorted(happened, key=lambda event: event.timestamp)


def _error_type(exchange: Exchange) -> str | None:
    if exchange.outcome in _FINE:
        return None
    return exchange.error_code or exchange.outcome


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def _said(attributes: Mapping[str, Value | None]) -> dict[str, Value]:
    """Those that have a value. An enum's is its text: the encoder asks for the very type."""
    return {
        name: str(value) if isinstance(value, Outcome) else value
        for name, value in attributes.items()
        if value is not None
    }
