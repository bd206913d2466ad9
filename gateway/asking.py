"""Puts one request to one replica, and says what came of it.

An attempt holds its place at the replica for exactly as long as it lasts. What the policy, the health of the replica
and its adapters have to learn from it, they learn here; whether another attempt follows is `gateway.exchange`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from backends.dialects.protocol import Untranslatable, Wish
from backends.errors import HeadTimeout, IdleTimeout, UpstreamError
from backends.http1 import Connection
from backends.side import SideChannelError
from backends.upstream import Upstream
from backends.usage import Usage
from gateway import record, usage
from gateway.adapters import AdapterAway
from gateway.answers import note_whole, reply_headers
from gateway.attempt_metrics import AttemptMetrics
from gateway.body import Body
from gateway.bounds import bounding
from gateway.errors import (
    Draining,
    EndedByOperator,
    GatewayError,
    InternalError,
    InvalidRequest,
    UpstreamFailed,
    UpstreamTimeout,
    let_go,
)
from gateway.leg import Leg, Outrun, UpstreamReply
from gateway.order import EMBEDDINGS, Call, Order
from gateway.record import Attempt, Exchange
from gateway.relay import Relay
from gateway.reply import Headers
from gateway.resumption import Resumption
from gateway.runtime import Runtime
from gateway.spill import SPILLED
from gateway.telemetry.context import new_span_id
from gateway.upstream_errors import error_in_answer
from gateway.verdict import Again, Verdict, of_connection, of_question, of_relay, of_reply, refused_field
from routing.types import Decision, Replica

_EVENT_STREAM: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
POOL_WAIT_S = 1.0
"""How long to wait for a free connection to a replica that has as many as it may."""
_GIVEN_UP = (asyncio.CancelledError, UpstreamTimeout, Draining, EndedByOperator, HeadTimeout, IdleTimeout, Outrun)
"""After these an engine that was asked is told that nobody waits any more."""
OUTRUN = Verdict(UpstreamTimeout("Another replica was quicker."), None, Again.NEVER)
"""Of the slower attempt of a hedged request."""


class Asking:
    """One request, and what is needed to put it to any replica of its pool."""

    __slots__ = ("_call", "_runtime", "may_be_billed", "order", "relay", "resumption")

    def __init__(self, call: Call, order: Order, relay: Relay, runtime: Runtime) -> None:
        self._call = call
        self._runtime = runtime
        self.order = order
        self.relay = relay
        self.may_be_billed = False
        """A rented replica may bill an answer that never came."""
        self.resumption: Resumption | None = None
        """Where an answer that breaks off may be gone on with elsewhere."""

    @property
    def metrics(self) -> AttemptMetrics:
        return self._runtime.attempt_metrics

    @property
    def broken_off(self) -> GatewayError | None:
        """Why the answer broke off that is being gone on with."""
        return None if self.resumption is None else self.resumption.error

    def explains(self, now: float, tried: Sequence[Replica], decision: Decision, beside: Upstream) -> None:
        """Keep why a second replica is asked `beside` another one, where it is kept why that one was."""
        self._runtime.explaining.take(self.order, now, [*tried, beside.replica], decision)

    async def attempt(
        self, leg: Leg, upstream: Upstream, decision: Decision, now: float
    ) -> tuple[UpstreamReply | None, Verdict | None]:
        """Ask this replica: a whole answer, or None for a stream that was relayed to its end; and what is wrong with
        it, or None where nothing is.

        Raises what the client's leaving raises, having released everything.
        """
        order = self.order
        replica, router = upstream.replica, order.route.router
        whole: UpstreamReply | None = None
        verdict: Verdict | None = None
        with replica.reserve(order.request):
            if order.route.shadow is not None and self.relay.exchange.attempts == 1:
                order.route.shadow.sees(order.request, order.route.pool, replica, now)
            router.dispatched(order.request, replica, now, decision)
            try:
                whole = await self._ask(leg, upstream)
                if whole is not None:
                    verdict = self._verdict_of(whole, upstream)
                    if verdict is None:
                        note_whole(self.relay.exchange, whole, leg.read_usage)
            except (UpstreamError, SideChannelError, Untranslatable, GatewayError) as error:
                verdict = _verdict_on(error, upstream)
                let_go(error)
            except Outrun:
                verdict = OUTRUN
            except BaseException as error:  # the client has left, mostly
                self._tell_of_departure(leg, error)
                raise
        if verdict is None:
            self._tell_router(leg, upstream)
        else:
            self._note_failure(leg, verdict)
            router.failed(order.request, replica, time.monotonic(), blamed=verdict.evidence is not None)
        return whole, verdict

    def _note_failure(self, leg: Leg, verdict: Verdict) -> None:
        self.may_be_billed |= verdict.may_be_billed
        leg.attempt.ended_at = time.monotonic()
        leg.attempt.code = record.OUTRUN if verdict is OUTRUN else verdict.error.code or verdict.error.type

    def _tell_router(self, leg: Leg, upstream: Upstream) -> None:
        """The answer is complete: what it has shown of the engine's cache and speed."""
        order = self.order
        route, used = order.route, self.relay.exchange.usage if leg.reader is None else leg.reader.usage
        now = leg.attempt.ended_at = time.monotonic()
        if used is None or (self.resumption is not None and self.resumption.begun):
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
        self._note_traffic(leg, used, now)
        if route.hot is not None:
            route.hot.note(order, self.relay.exchange.tenant)
        if order.path != EMBEDDINGS:
            upstream.signals.saw_usage(used.cached_tokens)

    def _note_traffic(self, leg: Leg, used: Usage, now: float) -> None:
        request, attempt = self.order.request, leg.attempt
        if request.adapter is None:
            self._runtime.traffic.note(
                (
                    attempt.begun_at,
                    self.order.route.model,
                    request.prefix,
                    used.prompt_tokens,
                    used.cached_tokens,
                    used.completion_tokens,
                    request.priority,
                    attempt.first_content_at,
                    now,
                    attempt.replica,
                )
            )

    def _tell_of_departure(self, leg: Leg, error: BaseException) -> None:
        """The client has left. Before any content that says nothing of the replica: patience is no time to first
        token."""
        order, now = self.order, time.monotonic()
        leg.attempt.ended_at = now
        if not leg.completed:
            leg.attempt.code = self._code_of_departure(leg, error)
        if leg.passing:
            order.route.router.finished(order.request, leg.replica, now)
        else:
            order.route.router.failed(order.request, leg.replica, now, blamed=False)

    def _code_of_departure(self, leg: Leg, error: BaseException) -> str:
        """The client has left, or the other of a hedged pair has brought the whole answer meanwhile; or a defect."""
        if isinstance(error, Exception):
            return InternalError.code or ""
        other = self.relay.leg
        won = other is not None and other is not leg and other.attempt.ended_at is not None and not other.attempt.code
        return record.OUTRUN if won else record.LEFT

    def _verdict_of(self, whole: UpstreamReply, upstream: Upstream) -> Verdict | None:
        """What is wrong with a whole answer; None: nothing."""
        if not whole.answers:
            return of_reply(whole, upstream)
        if self._call.path != EMBEDDINGS:
            whole.tree = usage.parsed(whole.body)
            if whole.tree is None and (usage.parses(whole.body) or not whole.body.rstrip().endswith(b"}")):
                return of_relay(_no_json(whole.body), upstream)
            said = error_in_answer(whole.tree, whole.body)
            if said is not None:
                return of_relay(said, upstream)
        return None

    async def _ask(self, leg: Leg, upstream: Upstream) -> UpstreamReply | None:
        """Send the request and relay its answer; tell the engine when it is given up.

        A server that refuses a field which the gateway has added is asked once more without it. It is taken to refuse
        the field for good only when that helped: a client can have any word stand in the message of its own bad
        request.
        """
        order, runtime, exchange = self.order, self._runtime, self.relay.exchange
        dialect, adapter = upstream.dialect, order.route.adapter
        if adapter is not None and adapter not in (upstream.replica.adapters or ()):
            await self._load_adapter(adapter, upstream)
        if dialect.must_know_adapters and upstream.replica.adapters is None:
            await self._learn_adapters(upstream)  # once in each life of the engine
        body, bound = order.body, exchange.max_tokens_set
        if self.resumption is not None and self.resumption.begun:
            body, bound = self.resumption.put(dialect), None
        wish = self._wish(upstream, body, bound)
        left_out: dict[str, int] = {}
        while True:
            prepared = dialect.prepare(wish)
            values = prepared.values
            if self.resumption is not None:
                values.update(self.resumption.counting(dialect, rival=leg is self.relay.rival))
            if bound is not None:
                for name in bounding(order.path, body.fields, bound, dialect.name):
                    values[name] = b"%d" % bound
            if left_out or upstream.signals.refused_fields:
                for name in (*upstream.signals.refused_fields, *left_out):
                    values.pop(name, None)
            text = body.with_values(values) if prepared.body is None else prepared.body
            traced = exchange.traced
            passed_on = order.passed_on
            if traced is not None:
                passed_on = traced.headers(leg.attempt.span_id, hosted=upstream.hosted)
            data = upstream.request(prepared.path, text, order.request.id, passed_on, leg.key)
            connection = upstream.pool.acquire_nowait() or await self._connect(upstream)
            try:
                whole = await leg.run(connection, data, translation=prepared.translation, read_usage=dialect.read_usage)
            except _GIVEN_UP:
                if leg.dispatched_at and not leg.completed:
                    runtime.abort(upstream, wish.request_id)
                raise
            if adapter is not None and dialect.loads_adapters and whole is not None and whole.status == 404:
                raise runtime.adapters.missed(upstream, adapter)
            refused = refused_field(whole, values, body.fields)
            if refused is None or whole is None:
                if whole is None or whole.answers:
                    for name, status in left_out.items():
                        upstream.signals.refuses_field(name, f"it answered {status}")
                return whole
            left_out[refused] = whole.status

    def _wish(self, upstream: Upstream, body: Body, bound: int | None) -> Wish:
        """The request as the replica's dialect is asked to prepare it; `bound`: output tokens that it may have."""
        order, runtime, exchange = self.order, self._runtime, self.relay.exchange
        path = order.path
        return Wish(
            path=path,
            fields=body.fields if bound is None else {**body.fields, **bounding(path, body.fields, bound, "")},
            # An engine may still hold the id of an attempt that was given up, and an abort may still be on its way.
            request_id=order.request.id if exchange.attempts == 1 else runtime.new_request_id(),
            stream=order.request.stream,
            model=upstream.model or order.route.upstream_model,
            adapter=order.route.adapter,
            urgency=order.urgency,
            priority=None if upstream.info is None else upstream.info.priority,
            adapters=upstream.adapters or upstream.configured_adapters,
            dp_rank=upstream.replica.dp_rank,
            cache_salt=runtime.gate.cache_salt(exchange.tenant, body.fields) if order.route.reader.isolates else None,
        )

    async def _load_adapter(self, adapter: str, upstream: Upstream) -> None:
        """Have the replica load the adapter that the policy sent the request there for, within the request's time."""
        order = self.order
        left_s = self.relay.total_deadline - time.monotonic()
        await self._runtime.adapters.ensure(upstream, adapter, min(left_s, order.route.timing.first_token_s))
        order.route.pool.routing.sent(order.request, upstream.replica, time.monotonic())

    async def _learn_adapters(self, upstream: Upstream) -> None:
        """Ask the replica what it holds, within the request's time; others may share the answer, which comes anyway."""
        try:
            async with asyncio.timeout(self.relay.total_deadline - time.monotonic()):
                await upstream.learn_adapters()
        except TimeoutError as error:
            raise self._out_of_time() from error

    def _out_of_time(self) -> UpstreamTimeout:
        return UpstreamTimeout(f"The request took longer than {self.order.total_s:g} s.")

    async def _connect(self, upstream: Upstream) -> Connection:
        """A new connection, or the next that is free, within what is left of the request's time.

        Running out of that time is no mark against the replica: the client chose it, and may have chosen a millisecond.
        """
        order = self.order
        try:
            async with asyncio.timeout(self.relay.total_deadline - time.monotonic()):
                return await upstream.pool.acquire(POOL_WAIT_S, connect_timeout_s=order.route.connect_s)
        except TimeoutError as error:
            raise self._out_of_time() from error


def begin_leg(asking: Asking, replica: Replica, decision: Decision, now: float, *, rival: bool = False) -> Leg:
    """Take note of where the request goes, and open the way back from there. `rival`: beside the one under way."""
    relay = asking.relay
    exchange = relay.exchange
    exchange.attempts += 1
    attempt = Attempt(replica.pool, replica.name, decision.reason, now)
    if exchange.traced is not None:
        attempt.span_id = new_span_id()
    exchange.tries += (attempt,)
    exchange.possible_duplicate |= asking.may_be_billed
    note_choice(exchange, replica, decision)
    headers = reply_headers(exchange, _EVENT_STREAM) if exchange.stream else []
    observe = None
    if asking.resumption is not None:
        observe = asking.resumption.begin_leg(first=relay.leg is None, rival=rival)
    if rival:
        return relay.begin_rival(replica, attempt, headers, observe)
    return relay.begin(replica, attempt, headers, observe)


def note_choice(exchange: Exchange, replica: Replica, decision: Decision) -> None:
    """Who is asked, and why."""
    exchange.pool = replica.pool
    exchange.replica = replica.name
    exchange.region = replica.region
    exchange.route_reason = SPILLED if exchange.spill else decision.reason
    exchange.predicted_cached_tokens = decision.cached_tokens
    exchange.predicted_ttft_ms = decision.predicted_ttft_ms


def _no_json(body: bytes) -> UpstreamFailed:
    if not body:
        return UpstreamFailed("The model server answered with nothing.", code="upstream_truncated")
    return UpstreamFailed("The model server's answer is not the JSON that it should be.", code="upstream_invalid")


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
