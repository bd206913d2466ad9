"""One request from its parsed bytes to its settlement: the only place where the whole path can be read.

Both edges call `serve`. What is acquired is acquired by nesting, so the order of release is the indentation: the
upstream connection first, then the replica's place, then what was reserved at the gate, then the record. The caller
cancels the task when the client leaves, in whatever phase that is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial

from backends.dialects.protocol import Untranslatable, Wish
from backends.errors import HeadTimeout, IdleTimeout, UpstreamError
from backends.http1 import Connection
from backends.side import SideChannelError
from backends.upstream import Upstream
from gateway import usage
from gateway.adapters import AdapterAway
from gateway.admission.visit import Visit
from gateway.answers import check_regions, none_left, note_departure, note_whole, refuse, reply_headers, write_whole
from gateway.attempts import MAX_ATTEMPTS, Attempts
from gateway.bounds import bounding
from gateway.errors import (
    Draining,
    GatewayError,
    InternalError,
    InvalidRequest,
    UpstreamTimeout,
)
from gateway.keys.records import PRIORITY_CLASSES
from gateway.order import EMBEDDINGS, Call, Order, read_order
from gateway.reading import read_prompt
from gateway.record import Exchange, Outcome
from gateway.relay import Relay, UpstreamReply
from gateway.reply import Headers, Reply
from gateway.runtime import Runtime
from gateway.spill import SPILLED
from gateway.upstream_errors import error_in_answer
from gateway.verdict import Again, Verdict, of_connection, of_question, of_relay, of_reply, refused_field
from routing.filters import exclusion_reason
from routing.router import PANIC
from routing.types import Decision, Replica

logger = logging.getLogger(__name__)

_EVENT_STREAM: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
POOL_WAIT_S = 1.0
"""How long to wait for a free connection to a replica that has as many as it may."""


async def serve(call: Call, reply: Reply, runtime: Runtime) -> None:
    """Answer one call. Returns when the reply is complete; every way out settles the record exactly once."""
    exchange = runtime.begin(call)
    gate = runtime.gate
    exchange.admission_headers = gate.standing
    relay: Relay | None = None
    visit: Visit | None = None
    try:
        caller = gate.identify(call.headers)
        exchange.tenant = caller.tenant.name
        exchange.key_id = caller.key_id
        order = read_order(call, runtime.fleet, exchange.request_id, caller)
        if order.route.reader.takes_long(order.request) and runtime.overflow.reads(order, caller):
            await asyncio.to_thread(read_prompt, order, exchange)
        order = runtime.overflow.consider(order, exchange, caller, time.monotonic())
        _note(exchange, order)
        check_regions(order)
        counted = await gate.count(caller, order) if gate.counts_long(order) else None
        moved = False
        while True:
            relay = _relay(order, exchange, reply, runtime)
            runtime.open_relay(relay)
            try:
                if visit is not None and moved:
                    visit = await gate.move(visit, order, relay)
                else:
                    visit = gate.visit(caller, order, exchange, counted)
                    if visit is not None:
                        await gate.enter(visit, relay)
                await _answer(call, order, relay, reply, visit, runtime)
                return
            except GatewayError as error:
                if reply.started:
                    raise
                other = runtime.overflow.instead(order, exchange, caller, error, time.monotonic())
                if other is None:
                    raise
                order, moved = other, True
                _note(exchange, order)
            finally:
                runtime.close_relay(relay)
    except GatewayError as error:
        refuse(error, relay, reply, exchange)
    except asyncio.CancelledError:
        note_departure(exchange, relay)
        raise
    except Exception:
        logger.exception("request %s failed inside the gateway", exchange.request_id)
        refuse(InternalError("Something went wrong inside the gateway."), relay, reply, exchange)
    finally:
        if relay is not None and relay.reader is not None:
            usage.from_stream(exchange, relay.reader)
        if visit is not None:
            gate.leave(visit, exchange)
        runtime.settle(exchange)


async def _answer(call: Call, order: Order, relay: Relay, reply: Reply, visit: Visit | None, runtime: Runtime) -> None:
    """Try replicas until one answers; write its answer."""
    exchange = relay.exchange
    pool = order.route.pool
    router = order.route.router
    story = Attempts(pool.replicas, runtime.witness)
    # After admission: who is refused costs nothing here.
    if order.route.reader.takes_long(order.request):
        await asyncio.to_thread(read_prompt, order, exchange)
    else:
        read_prompt(order, exchange)
    try:
        while True:
            now = time.monotonic()
            if now - exchange.started_at >= order.total_s:
                raise UpstreamTimeout(f"The request took longer than {order.total_s:g} s.")
            decision = router.decide(order.request, pool.replicas, now, story.tried)
            replica = decision.replica
            if replica is None or story.counted >= MAX_ATTEMPTS:
                if visit is not None and replica is None and _some_are_full(decision):
                    fits = partial(_fits, order, story)
                    if await runtime.gate.wait_for_replica(visit, relay, fits):
                        continue
                raise story.error or none_left(decision)
            upstream = pool.upstreams[replica]
            with replica.reserve(order.request):
                router.dispatched(order.request, replica, now, decision)
                exchange.attempts += 1
                _note_choice(exchange, replica, decision)
                if exchange.stream:
                    relay.headers = reply_headers(exchange, _EVENT_STREAM)
                whole: UpstreamReply | None = None
                verdict: Verdict | None = None
                try:
                    whole = await _ask(call, order, relay, upstream, runtime)
                    if whole is not None:
                        verdict = _verdict_of(whole, call, upstream)
                        if verdict is None:
                            note_whole(exchange, whole, relay)
                except (UpstreamError, SideChannelError, Untranslatable, GatewayError) as error:
                    verdict = _verdict_on(error, upstream)
                except BaseException:  # the client has left, mostly
                    _tell_of_departure(order, exchange, replica)
                    raise
            if verdict is None:
                _tell_router(order, exchange, relay, upstream)
                if whole is None:
                    reply.finish()
                else:
                    runtime.witness.answered(replica, pool.replicas)
                    write_whole(whole, relay, reply, exchange)
                exchange.outcome = Outcome.COMPLETED
                return
            router.failed(order.request, replica, time.monotonic(), blamed=verdict.evidence is not None)
            if not story.goes_on(upstream, verdict, in_panic=decision.reason in PANIC) or relay.started_content:
                raise verdict.error
    finally:
        story.close()


def _tell_router(order: Order, exchange: Exchange, relay: Relay, upstream: Upstream) -> None:
    """The answer is complete: what it has shown of the engine's cache and speed."""
    route, used = order.route, exchange.usage if relay.reader is None else relay.reader.usage
    now = time.monotonic()
    if used is None:
        route.router.finished(order.request, upstream.replica, now)
        return
    route.router.finished(
        order.request,
        upstream.replica,
        now,
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens,
        output_tokens=used.completion_tokens,
    )
    route.reader.learn(order.request, used.prompt_tokens)
    if order.path != EMBEDDINGS:
        upstream.signals.saw_usage(used.cached_tokens)


def _tell_of_departure(order: Order, exchange: Exchange, replica: Replica) -> None:
    """The client has left. Before any content that says nothing of the replica: patience is no time to first token."""
    now = time.monotonic()
    if exchange.first_content_at is None:
        order.route.router.failed(order.request, replica, now, blamed=False)
    else:
        order.route.router.finished(order.request, replica, now)


def _verdict_on(error: Exception, upstream: Upstream) -> Verdict:
    """Why there is no answer from this replica."""
    if isinstance(error, UpstreamError):
        return of_connection(error, upstream.hosted)
    if isinstance(error, SideChannelError):
        return of_question(error)
    if isinstance(error, AdapterAway):
        return Verdict(error, None, Again.SAFELY)
    if isinstance(error, GatewayError):
        return of_relay(error, upstream)
    assert isinstance(error, Untranslatable)
    # An engine of another kind in the same pool may have the words.
    refused = InvalidRequest(str(error), param=error.param, code="unsupported_parameter")
    return Verdict(refused, None, Again.UNCOUNTED)


def _verdict_of(whole: UpstreamReply, call: Call, upstream: Upstream) -> Verdict | None:
    """What is wrong with a whole answer; None: nothing."""
    if not whole.answers:
        return of_reply(whole, upstream)
    if call.path != EMBEDDINGS:
        whole.tree = usage.parsed(whole.body)
        said = error_in_answer(whole.tree, whole.body)
        if said is not None:
            return of_relay(said, upstream)
    return None


async def _ask(call: Call, order: Order, relay: Relay, upstream: Upstream, runtime: Runtime) -> UpstreamReply | None:
    """Send the request to one replica and relay its answer; tell the engine when it is given up.

    A server that refuses a field which the gateway has added is asked once more without it. It is taken to refuse the
    field for good only when that helped: a client can have any word stand in the message of its own bad request.
    """
    dialect, adapter = upstream.dialect, order.route.adapter
    if adapter is not None and adapter not in (upstream.replica.adapters or ()):
        await _load_adapter(adapter, order, relay.exchange, upstream, runtime)
    if dialect.must_know_adapters and upstream.replica.adapters is None:
        await upstream.learn_adapters()  # once in each life of the engine
    bound = relay.exchange.max_tokens_set
    wish = Wish(
        path=call.path,
        fields=order.body.fields
        if bound is None
        else {**order.body.fields, **bounding(call.path, order.body.fields, bound, "")},
        # An engine may still hold the id of an attempt that was given up, and an abort may still be on its way to it.
        request_id=order.request.id if relay.exchange.attempts == 1 else runtime.new_request_id(),
        stream=order.request.stream,
        model=upstream.model or order.route.upstream_model,
        adapter=adapter,
        urgency=order.urgency,
        priority=None if upstream.info is None else upstream.info.priority,
        adapters=upstream.adapters or upstream.configured_adapters,
        dp_rank=upstream.replica.dp_rank,
    )
    left_out: dict[str, int] = {}
    while True:
        relay.begin(upstream.replica)
        prepared = dialect.prepare(wish)
        values = prepared.values
        if bound is not None:
            for name in bounding(call.path, order.body.fields, bound, dialect.name):
                values[name] = b"%d" % bound
        if left_out or upstream.signals.refused_fields:
            for name in (*upstream.signals.refused_fields, *left_out):
                values.pop(name, None)
        body = order.body.with_values(values) if prepared.body is None else prepared.body
        data = upstream.request(prepared.path, body, order.request.id, order.passed_on)
        connection = upstream.pool.acquire_nowait() or await _connect(upstream, order, relay.exchange)
        try:
            whole = await relay.attempt(
                connection,
                data,
                translation=prepared.translation,
                read_usage=dialect.read_usage,
            )
        except (asyncio.CancelledError, UpstreamTimeout, Draining, HeadTimeout, IdleTimeout):
            if not relay.completed:
                runtime.abort(upstream, wish.request_id)
            raise
        if adapter is not None and dialect.loads_adapters and whole is not None and whole.status == 404:
            raise runtime.adapters.missed(upstream, adapter)
        refused = refused_field(whole, values, order.body.fields)
        if refused is None or whole is None:
            if whole is None or whole.answers:
                for name, status in left_out.items():
                    upstream.signals.refuses_field(name, f"it answered {status}")
            return whole
        left_out[refused] = whole.status


async def _load_adapter(adapter: str, order: Order, exchange: Exchange, upstream: Upstream, runtime: Runtime) -> None:
    """Have the replica load the adapter that the policy sent the request there for, within the request's time."""
    left_s = exchange.started_at + order.total_s - time.monotonic()
    await runtime.adapters.ensure(upstream, adapter, min(left_s, order.route.timing.first_token_s))
    order.route.pool.routing.sent(order.request, upstream.replica, time.monotonic())


async def _connect(upstream: Upstream, order: Order, exchange: Exchange) -> Connection:
    """A new connection, or the next that is free, within what is left of the request's time.

    Running out of that time is no mark against the replica: the client chose it, and may have chosen a millisecond.
    """
    try:
        async with asyncio.timeout(exchange.started_at + order.total_s - time.monotonic()):
            return await upstream.pool.acquire(POOL_WAIT_S, connect_timeout_s=order.route.connect_s)
    except TimeoutError as error:
        raise UpstreamTimeout(f"The request took longer than {order.total_s:g} s.") from error


def _fits(order: Order, story: Attempts) -> bool:
    """Whether some replica could take the request now, or none is left that it could wait for."""
    request, replicas, now = order.request, order.route.pool.replicas, time.monotonic()
    if order.route.router.fits(request, replicas, now, story.tried):
        return True
    return all(exclusion_reason(request, replica, now, story.tried) != "full" for replica in replicas)


def _some_are_full(decision: Decision) -> bool:
    """Whether some replica could take the request if it were not full, so that it only has to wait."""
    return any(each.reason == "full" for each in decision.excluded)


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
        answered=partial(_first_content, order, runtime) if exchange.stream else None,
    )


def _first_content(order: Order, runtime: Runtime, replica: Replica) -> None:
    """Content of the answer has come from this replica."""
    runtime.witness.answered(replica, order.route.pool.replicas)
    order.route.router.first_token(order.request, replica, time.monotonic())


def _note(exchange: Exchange, order: Order) -> None:
    exchange.model = order.route.name
    exchange.stream = order.request.stream
    exchange.pool = order.route.pool.name
    exchange.price = order.route.price
    exchange.priority_class = PRIORITY_CLASSES[order.band]


def _note_choice(exchange: Exchange, replica: Replica, decision: Decision) -> None:
    exchange.replica = replica.name
    exchange.region = replica.region
    exchange.route_reason = SPILLED if exchange.spill else decision.reason
    exchange.predicted_cached_tokens = decision.cached_tokens
    exchange.predicted_ttft_ms = decision.predicted_ttft_ms
