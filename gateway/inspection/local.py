"""The requests of one worker: those under way, and the last ones that were settled."""

from __future__ import annotations

import time
from typing import Any

from gateway.errors import EndedByOperator
from gateway.inspection.query import Query, cursor, place, place_of
from gateway.inspection.timeline import timeline
from gateway.ledger import as_record
from gateway.record import Exchange
from gateway.relay import Relay
from gateway.runtime import Runtime

QUEUE, READING, DECIDING, CONNECTING, WAITING, STREAMING = (
    "queue",
    "reading",
    "deciding",
    "connecting",
    "waiting_for_first_token",
    "streaming",
)
"""Phases of a request under way."""


class Requests:
    """One worker's requests, for whoever asks. Nothing here is called on the path of a request."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        self._runtime = runtime
        self._index = index

    def page(self, query: Query) -> dict[str, Any]:
        """`live`: those under way that match, the oldest first, at most `query.live_limit` of `live_total`; `settled`:
        the last settled first, at most `query.limit`, each with its `cursor`."""
        now = time.monotonic()
        live, total = self._live(query, now) if query.wants_live else ([], 0)
        return {"live": live, "live_total": total, "settled": [] if query.live else self._settled(query, now)}

    def one(self, request_id: str) -> dict[str, Any] | None:
        """All that is known of one request; None where this worker does not know it (any more)."""
        now = time.monotonic()
        for exchange, relay in self._runtime.under_way():
            if exchange.request_id == request_id and exchange.tenant:
                queued = self._queued().get(request_id)
                return {
                    "live": self._live_row(exchange, relay, queued, now),
                    "record": None,
                    **self._story(exchange, now, queued),
                }
        for exchange in reversed(self._runtime.ledger.recent):
            if exchange.request_id == request_id:
                return {"live": None, "record": self._settled_row(exchange), **self._story(exchange, now, None)}
        return None

    def end(self, request_id: str) -> bool:
        """End a request under way; whether there is one. Its client gets an error, its engine is told."""
        return self._runtime.interrupt(request_id, EndedByOperator("An operator has ended this request."))

    # --

    def _live(self, query: Query, now: float) -> tuple[list[dict[str, Any]], int]:
        queued = self._queued()
        rows: list[dict[str, Any]] = []
        total = 0
        for exchange, relay in self._runtime.under_way():
            if exchange.tenant and query.matches(exchange, now):  # nobody else's is ever on record either
                total += 1
                if len(rows) < query.live_limit:
                    rows.append(self._live_row(exchange, relay, queued.get(exchange.request_id), now))
        return rows, total

    def _queued(self) -> dict[str, float]:
        """Since when each request in line waits."""
        return {visit.exchange.request_id: visit.entered_at for visit in self._runtime.gate.in_line()}

    def _live_row(self, exchange: Exchange, relay: Relay | None, queued: float | None, now: float) -> dict[str, Any]:
        return {
            "id": exchange.request_id,
            "worker": self._index,
            "time_unix_s": round(exchange.started_unix_s, 3),
            "age_ms": round((now - exchange.started_at) * 1000, 1),
            "phase": _phase(exchange, queued),
            "tenant": exchange.tenant,
            "key_id": exchange.key_id,
            "class": exchange.priority_class,
            "route": exchange.route,
            "model": exchange.model,
            "stream": exchange.stream,
            "pool": exchange.pool,
            "replica": exchange.replica,
            "route_reason": exchange.route_reason,
            "attempts": exchange.attempts,
            "content_events": _content_events(exchange, relay),
            "request_bytes": exchange.request_bytes,
            "response_bytes": exchange.response_bytes,
        }

    def _settled(self, query: Query, now: float) -> list[dict[str, Any]]:
        before = None if query.before is None else place_of(query.before)
        found: list[Exchange] = []
        for exchange in reversed(self._runtime.ledger.recent):
            # Those of one instant belong together, in the order of their ids, which is not that of their settling.
            if len(found) >= query.limit and exchange.finished_at != found[-1].finished_at:
                break
            if (before is None or place(exchange) < before) and query.matches(exchange, now):
                found.append(exchange)
        found.sort(key=place, reverse=True)
        return [self._settled_row(each) for each in found[: query.limit]]

    def _settled_row(self, exchange: Exchange) -> dict[str, Any]:
        return {
            **as_record(exchange),
            "worker": self._index,
            "explained": self._runtime.explaining.explains(exchange.request_id),
            "cursor": cursor(exchange),
        }

    def _story(self, exchange: Exchange, now: float, queued: float | None) -> dict[str, Any]:
        return {
            "timeline": timeline(exchange, now, queued),
            "decisions": self._runtime.explaining.of(exchange.request_id),
        }


def _phase(exchange: Exchange, queued: float | None) -> str:
    if queued is not None:
        return QUEUE
    if not exchange.tries:
        return READING if not exchange.model else DECIDING
    under_way = [each for each in exchange.tries if each.ended_at is None]
    if not under_way:
        return DECIDING
    if any(each.first_content_at is not None for each in under_way):
        return STREAMING
    return WAITING if any(each.sent_at is not None for each in under_way) else CONNECTING


def _content_events(exchange: Exchange, relay: Relay | None) -> int:
    """Those of attempts that are over, and of the one under way."""
    reader = None if relay is None or relay.leg is None else relay.leg.reader
    return exchange.content_events + (0 if reader is None else reader.content_events)
