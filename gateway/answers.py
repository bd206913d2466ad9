"""What a reply says of how it came about, and how answers and refusals are written."""

from __future__ import annotations

from collections.abc import Sequence

from gateway import usage
from gateway.errors import GatewayError, NoReplicaAvailable, StreamInterrupted, UpstreamFailed
from gateway.leg import UpstreamReply
from gateway.order import Order
from gateway.record import Exchange, Outcome
from gateway.relay import Relay
from gateway.reply import Headers, Reply
from gateway.sse import ReadUsage
from routing.filters import RATE_LIMITED
from routing.types import Decision, Replica

_BEFORE_CONTENT = frozenset({Outcome.REJECTED, Outcome.UPSTREAM_REJECTED, Outcome.UPSTREAM_ERROR, Outcome.UNAVAILABLE})
"""What ends in these is not charged. An answer that the client has some of ends in none of them: it was interrupted."""


def reply_headers(exchange: Exchange, content: Headers) -> Headers:
    """The reply's headers: what the content is, and how it came about."""
    headers = [*content, (b"x-request-id", exchange.request_id.encode()), *exchange.admission_headers]
    if exchange.traced is not None:
        headers += exchange.traced.reply_headers()
    _add_route(headers, exchange)
    if exchange.stream:
        headers += ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
    return headers


def _add_route(headers: Headers, exchange: Exchange) -> None:
    """Who was tried last, and why that one."""
    headers += (
        (b"x-tidegate-replica", exchange.replica.encode()),
        (b"x-tidegate-attempts", b"%d" % exchange.attempts),
        (b"x-tidegate-route-reason", exchange.route_reason.encode()),
        (b"x-tidegate-predicted-cached-tokens", b"%d" % exchange.predicted_cached_tokens),
    )
    if exchange.region is not None:
        headers.append((b"x-tidegate-region", exchange.region.encode()))
    if exchange.possible_duplicate:
        headers.append((b"x-tidegate-possible-duplicate-charge", b"true"))
    if exchange.fallback_from and exchange.fallback_from != exchange.model:
        headers.append((b"x-tidegate-model", exchange.model.encode()))


def write_whole(whole: UpstreamReply, relay: Relay, reply: Reply, exchange: Exchange) -> None:
    """Pass on an answer that was collected whole."""
    if reply.started:
        # The hold ran out and the client is reading a stream; a plain body cannot follow.
        raise StreamInterrupted("The model server answered a streaming request without a stream.")
    content_type = b"application/json"
    for name, value in whole.headers:
        if name == b"content-type":
            content_type = value
    reply.send(whole.status, reply_headers(exchange, [(b"content-type", content_type)]), whole.body)


def note_whole(exchange: Exchange, whole: UpstreamReply, read_usage: ReadUsage) -> None:
    """Take over what an answer that was collected whole says of itself."""
    exchange.status = whole.status
    exchange.response_bytes = len(whole.body)
    exchange.usage = usage.from_whole(whole.body, read_usage, whole.tree)


def note_departure(exchange: Exchange, relay: Relay | None) -> None:
    """The client has gone. Completion wins: an answer that had come whole by then counts, and so do its tokens."""
    exchange.outcome = Outcome.CLIENT_LEFT
    leg = None if relay is None else relay.leg
    if leg is None or not leg.completed:
        return
    if leg.whole is None:
        exchange.outcome = Outcome.COMPLETED
    elif leg.whole.answers:
        exchange.outcome = Outcome.COMPLETED
        note_whole(exchange, leg.whole, leg.read_usage)


def refuse(error: GatewayError, relay: Relay | None, reply: Reply, exchange: Exchange) -> None:
    """Tell the client: with a status where none was sent yet, else with an error event at the end of the stream."""
    exchange.outcome = error.outcome
    exchange.error_code = error.code
    if relay is not None and relay.started_content:
        if error.outcome in _BEFORE_CONTENT:
            exchange.outcome = Outcome.UPSTREAM_INTERRUPTED
    elif error.outcome is Outcome.UPSTREAM_INTERRUPTED:
        exchange.outcome = Outcome.UPSTREAM_ERROR
    if relay is not None and reply.started:
        relay.end_with_error(error)
        return
    exchange.status = error.status
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", exchange.request_id.encode()),
        *error.headers(),
        *exchange.admission_headers,
    ]
    if exchange.traced is not None:
        headers += exchange.traced.reply_headers()
    if exchange.replica:
        _add_route(headers, exchange)
    reply.send(error.status, headers, error.body())


def none_left(decision: Decision, model: str = "", now: float = 0.0, spread: float = 1.0) -> GatewayError:
    """The error for a request that no replica can take, with the reasons counted.

    With the routing request's `model` and the time, in monotonic seconds, it says when the first rate limit ends, if
    that is what keeps the request out; times `spread`, 1 or more.
    """
    reasons = [each.reason for each in decision.excluded]
    if reasons and set(reasons) == {"credential_refused"}:
        return UpstreamFailed("The model servers refuse the gateway's own credential.", code="upstream_auth_failed")
    counted = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    if reasons and set(reasons) == {"region"}:
        return _out_of_region()
    if RATE_LIMITED in reasons and "full" not in reasons:
        limited = [each.replica for each in decision.excluded if each.reason == RATE_LIMITED]
        return _rate_limited(counted, limited, model, now, spread)
    if not reasons:
        return NoReplicaAvailable("The model has no replica yet, or none any more.", retry_after_s=1.0)
    return NoReplicaAvailable(f"No replica can take the request now ({counted}).", retry_after_s=1.0)


def _rate_limited(
    counted: str, replicas: Sequence[Replica], model: str, now: float, spread: float
) -> NoReplicaAvailable:
    """All that could serve it have asked to be left alone for a while."""
    ends = [end for end in (each.limited_until(model, now) for each in replicas) if end]
    wait_s = spread * (min(ends) - now) if ends else 1.0
    error = NoReplicaAvailable(f"No replica can take the request now ({counted}).", retry_after_s=wait_s)
    if all(each.credential is not None and each.credential.limited_until(model, now) for each in replicas):
        error.status, error.type, error.code = 429, "requests", "rate_limit_exceeded"
    return error


def check_regions(order: Order) -> None:
    """Refuse what no replica may serve, before it waits for a place that could be of no use to it."""
    regions, replicas = order.request.regions, order.route.pool.replicas
    if regions and replicas and all(replica.region not in regions for replica in replicas):
        raise _out_of_region()


def _out_of_region() -> GatewayError:
    refused = NoReplicaAvailable("No replica of this model is in the region asked for.", param="x-tidegate-region")
    refused.status = 403
    refused.code = "data_residency_mismatch"
    refused.type = "request_forbidden"
    return refused
