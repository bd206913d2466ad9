"""One request from its parsed bytes to its settlement: the only place where the whole path can be read.

Both edges call `serve`. What is acquired is acquired by nesting, so the order of release is the indentation: the
upstream connection first, then the replica's place, then the record is settled. The caller cancels the task when the
client leaves, in whatever phase that is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    ProtocolViolation,
    UpstreamError,
)
from backends.http1 import Connection
from backends.upstream import Upstream
from gateway import usage
from gateway.errors import (
    Draining,
    GatewayError,
    InternalError,
    NoReplicaAvailable,
    StreamInterrupted,
    UpstreamFailed,
    UpstreamTimeout,
)
from gateway.order import Call, Order, read_order
from gateway.record import Exchange, Outcome
from gateway.relay import Relay, UpstreamReply
from gateway.reply import Headers, Reply
from gateway.runtime import Runtime
from gateway.upstream_errors import from_connection, from_status
from routing.types import Decision, Replica

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a request is sent or a connection waited for in vain. Replicas that refuse at once do not count."""
_STANDING: Headers = [(b"x-tidegate-queue-ms", b"0"), (b"x-tidegate-store", b"memory")]
"""True of every reply for now: nothing queues here yet, and there is one kind of store."""
POOL_WAIT_S = 1.0
"""How long to wait for a free connection to a replica that has as many as it may."""


async def serve(call: Call, reply: Reply, runtime: Runtime) -> None:
    """Answer one call. Returns when the reply is complete; every way out settles the record exactly once."""
    exchange = runtime.begin(call)
    relay: Relay | None = None
    try:
        order = read_order(call, runtime.fleet, exchange.request_id)
        _note(exchange, order)
        relay = _relay(order, exchange, reply, runtime)
        with runtime.relaying(relay):
            await _answer(call, order, relay, reply, exchange, runtime)
    except GatewayError as error:
        _refuse(error, relay, reply, exchange)
    except asyncio.CancelledError:
        _note_departure(exchange, relay)
        raise
    except Exception:
        logger.exception("request %s failed inside the gateway", exchange.request_id)
        _refuse(InternalError("Something went wrong inside the gateway."), relay, reply, exchange)
    finally:
        if relay is not None and relay.reader is not None:
            usage.from_stream(exchange, relay.reader)
        runtime.settle(exchange)


async def _answer(call: Call, order: Order, relay: Relay, reply: Reply, exchange: Exchange, runtime: Runtime) -> None:
    """Try replicas until one answers; write its answer."""
    tried: list[Replica] = []
    last: UpstreamError | None = None
    refused = 0
    while True:
        now = time.monotonic()
        if now - exchange.started_at >= order.total_s:
            raise UpstreamTimeout(f"The request took longer than {order.total_s:g} s.")
        decision = runtime.policy.decide(order.request, order.route.pool.replicas, now, tried)
        replica = decision.replica
        if replica is None or exchange.attempts - refused >= MAX_ATTEMPTS:
            raise _none_left(decision, last)
        with replica.reserve(order.request):
            exchange.attempts += 1
            _note_choice(exchange, replica, decision)
            if exchange.stream:
                relay.headers = _headers(exchange, [(b"content-type", b"text/event-stream; charset=utf-8")])
            try:
                whole = await _attempt(call, order, relay, replica, runtime)
            except UpstreamError as error:
                last = error
                _judge(error, replica, tried)
                refused += isinstance(error, ConnectFailed) and not isinstance(error, ConnectTimeout)
                continue
            replica.cooldown.succeeded()
        if whole is None:
            reply.finish()
        else:
            _write_whole(whole, reply, exchange)
        exchange.outcome = Outcome.COMPLETED
        return


async def _attempt(call: Call, order: Order, relay: Relay, replica: Replica, runtime: Runtime) -> UpstreamReply | None:
    """Send the request to one replica and relay its answer; tell the engine when it is given up."""
    upstream = order.route.pool.upstreams[replica]
    values = upstream.dialect.body_values(call.path, order.body.fields, order.request.id)
    data = upstream.request(call.path, order.body_for(call.path, values), order.request.id, order.passed_on)
    connection = upstream.pool.acquire_nowait() or await _connect(upstream, order, relay.exchange)
    try:
        return await relay.attempt(connection, data)
    except (asyncio.CancelledError, UpstreamTimeout, Draining, HeadTimeout, IdleTimeout):
        if not relay.completed:
            runtime.abort(upstream, order.request.id)
        raise


async def _connect(upstream: Upstream, order: Order, exchange: Exchange) -> Connection:
    """A new connection, or the next that is free, within what is left of the request's time.

    Running out of that time is no mark against the replica: the client chose it, and may have chosen a millisecond.
    """
    try:
        async with asyncio.timeout(exchange.started_at + order.total_s - time.monotonic()):
            return await upstream.pool.acquire(POOL_WAIT_S, connect_timeout_s=order.route.connect_s)
    except TimeoutError as error:
        raise UpstreamTimeout(f"The request took longer than {order.total_s:g} s.") from error


def _judge(error: UpstreamError, replica: Replica, tried: list[Replica]) -> None:
    """Decide what a broken connection means: return to have another attempt made, or raise what the client gets.

    Refused connections are tried elsewhere at once, since nothing was sent. A kept-alive connection that died without
    a byte of answer gets another attempt, on any replica: that is the keep-alive race, not a failure. Anything else
    may have been worked on, and is not repeated. Slowness is no mark against a replica: it may be a long prefill.
    """
    if isinstance(error, Disconnected) and error.retry_safe:
        return
    if isinstance(error, ConnectFailed):
        _mark(replica, error)
        tried.append(replica)
        return
    if isinstance(error, Disconnected | ProtocolViolation):
        _mark(replica, error)
    raise from_connection(error)


def _mark(replica: Replica, error: UpstreamError) -> None:
    """Leave the replica alone for a moment. Logged once for each such pause, however many requests run into it."""
    now = time.monotonic()
    if not replica.cooldown.active(now):
        logger.warning("replica %s fails: %s", replica.name, error)
    replica.cooldown.failed(now)


def _none_left(decision: Decision, last: UpstreamError | None) -> GatewayError:
    """The error for a request that no replica can take, with the reasons counted."""
    if last is not None:
        return from_connection(last)
    reasons = [each.reason for each in decision.excluded]
    counted = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    if reasons and set(reasons) == {"region"}:
        refused = NoReplicaAvailable("No replica of this model is in the region asked for.", param="x-tidegate-region")
        refused.status = 403
        refused.code = "data_residency_mismatch"
        refused.type = "request_forbidden"
        return refused
    return NoReplicaAvailable(f"No replica can take the request now ({counted}).", retry_after_s=1.0)


def _relay(order: Order, exchange: Exchange, reply: Reply, runtime: Runtime) -> Relay:
    timing = order.route.timing
    if order.total_s != timing.total_s:
        timing = replace(timing, total_s=order.total_s)
    return Relay(
        exchange,
        reply,
        timing,
        runtime.ticker,
        runtime.loop,
        expected_choices=order.expected_choices,
        hide_usage=order.hide_usage,
        max_event_bytes=runtime.settings.stream.max_event_bytes,
        max_response_bytes=order.route.pool.settings.max_response_bytes,
    )


def _note(exchange: Exchange, order: Order) -> None:
    exchange.model = order.route.name
    exchange.stream = order.request.stream
    exchange.pool = order.route.pool.name
    exchange.price = order.route.price


def _note_choice(exchange: Exchange, replica: Replica, decision: Decision) -> None:
    exchange.replica = replica.name
    exchange.region = replica.region
    exchange.route_reason = decision.reason


def _headers(exchange: Exchange, content: Headers) -> Headers:
    """The reply's headers: what the content is, and how it came about."""
    headers = [
        *content,
        (b"x-request-id", exchange.request_id.encode()),
        (b"x-tidegate-replica", exchange.replica.encode()),
        (b"x-tidegate-attempts", b"%d" % exchange.attempts),
        (b"x-tidegate-route-reason", exchange.route_reason.encode()),
        *_STANDING,
    ]
    if exchange.region is not None:
        headers.append((b"x-tidegate-region", exchange.region.encode()))
    if exchange.stream:
        headers += ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
    return headers


def _write_whole(whole: UpstreamReply, reply: Reply, exchange: Exchange) -> None:
    """Pass on a reply that was collected whole, or raise the error it stands for."""
    if not whole.answers:
        raise from_status(whole.status, whole.headers, whole.body, time.time())
    if reply.started:
        # The hold ran out and the client is reading a stream; a plain body cannot follow.
        raise StreamInterrupted("The model server answered a streaming request without a stream.")
    if exchange.stream and not whole.body:
        raise UpstreamFailed("The model server answered a streaming request with nothing.", code="upstream_truncated")
    _note_whole(exchange, whole)
    content_type = dict(whole.headers).get(b"content-type", b"application/json")
    reply.send(whole.status, _headers(exchange, [(b"content-type", content_type)]), whole.body)


def _note_whole(exchange: Exchange, whole: UpstreamReply) -> None:
    exchange.status = whole.status
    exchange.response_bytes = len(whole.body)
    exchange.usage = usage.from_whole(whole.body)


def _note_departure(exchange: Exchange, relay: Relay | None) -> None:
    """The client has gone. Completion wins: an answer that had come whole by then counts, and so do its tokens."""
    exchange.outcome = Outcome.CLIENT_LEFT
    if relay is None or not relay.completed:
        return
    if relay.whole is None:
        exchange.outcome = Outcome.COMPLETED
    elif relay.whole.answers:
        exchange.outcome = Outcome.COMPLETED
        _note_whole(exchange, relay.whole)


def _refuse(error: GatewayError, relay: Relay | None, reply: Reply, exchange: Exchange) -> None:
    """Tell the client: with a status where none was sent yet, else with an error event at the end of the stream."""
    exchange.outcome = error.outcome
    exchange.error_code = error.code
    if error.outcome in (Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_INTERRUPTED):
        begun = relay is not None and relay.started_content
        exchange.outcome = Outcome.UPSTREAM_INTERRUPTED if begun else Outcome.UPSTREAM_ERROR
    if relay is not None and reply.started:
        relay.end_with_error(error)
        return
    exchange.status = error.status
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", exchange.request_id.encode()),
        *error.headers(),
    ]
    if exchange.replica:
        headers.append((b"x-tidegate-replica", exchange.replica.encode()))
        headers.append((b"x-tidegate-attempts", b"%d" % exchange.attempts))
    reply.send(error.status, headers, error.body())
