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

from gateway import usage
from gateway.admission.visit import Visit
from gateway.answers import check_regions, note_departure, refuse, write_whole
from gateway.asking import Asking, begin_leg
from gateway.attempts import Attempts
from gateway.errors import GatewayError, InternalError, UpstreamTimeout, let_go
from gateway.hedging import hedged
from gateway.keys.records import PRIORITY_CLASSES
from gateway.leg import Leg
from gateway.logs import about
from gateway.order import Call, Order, read_order
from gateway.reading import read_prompt
from gateway.record import Exchange, Outcome
from gateway.relay import Relay
from gateway.reply import Reply
from gateway.resumption import Resumption
from gateway.runtime import Runtime
from gateway.telemetry.content import captured
from gateway.verdict import Verdict
from routing.filters import exclusion_reason
from routing.router import PANIC
from routing.types import Decision

logger = logging.getLogger(__name__)


async def serve(call: Call, reply: Reply, runtime: Runtime) -> None:
    """Answer one call. Returns when the reply is complete; every way out settles the record exactly once."""
    exchange = runtime.begin(call)
    gate = runtime.gate
    exchange.admission_headers = gate.standing
    relay: Relay | None = None
    visit: Visit | None = None
    try:
        trial = call.trial
        caller = gate.identify(call.headers, call.client) if trial is None else trial.caller(gate)
        exchange.tenant = caller.tenant.name
        exchange.key_id = caller.key_id
        order = read_order(call, runtime.fleet, exchange.request_id, caller)
        if runtime.overload.level:
            _note(exchange, order)
            runtime.overload.check(order.band)
        if trial is not None:
            order = trial.steered(order, call, caller)
            if trial.stays:
                runtime.fallbacks.keep(order, exchange)
        if trial is None or not trial.stays:
            if order.route.reader.takes_long(order.request) and runtime.overflow.reads(order, caller):
                await asyncio.to_thread(read_prompt, order, exchange)
            order = runtime.overflow.consider(order, exchange, caller, time.monotonic())
        if exchange.traced is not None and caller.key is not None and caller.key.capture_content:
            reply = captured(exchange.traced, order.body.fields, reply)
        _note(exchange, order)
        check_regions(order)
        moved = False
        while True:
            relay = _relay(order, exchange, reply, runtime)
            runtime.open_relay(relay)
            try:
                if visit is not None and moved:
                    visit = await gate.move(visit, order, relay)
                else:
                    counted = await gate.count(caller, order) if gate.counts_long(order) else None
                    visit = gate.visit(caller, order, exchange, counted, runtime.new_request_id() if moved else "")
                    if visit is not None:
                        await gate.enter(visit, relay)
                if visit is not None:
                    order = visit.order  # of one that has waited: for the replicas that there are now
                await _answer(call, order, relay, reply, visit, runtime)
                return
            except GatewayError as error:
                if relay.started_content or (reply.started and not exchange.stream):
                    raise
                if trial is not None and trial.stays:
                    raise
                other = runtime.fallbacks.instead(order, exchange, caller, error, time.monotonic())
                if other is None:
                    raise
                let_go(error)
                order, moved = other, True
                _note(exchange, order)
            finally:
                runtime.close_relay(relay)
    except GatewayError as error:
        refuse(error, relay, reply, exchange)
        let_go(error)
    except asyncio.CancelledError:
        note_departure(exchange, relay)
        raise
    except Exception:
        logger.exception("request %s failed inside the gateway", exchange.request_id, extra=about(exchange.request_id))
        refuse(InternalError("Something went wrong inside the gateway."), relay, reply, exchange)
    finally:
        if relay is not None and relay.leg is not None and relay.leg.reader is not None:
            usage.from_stream(exchange, relay.leg.reader)
        if visit is not None:
            gate.leave(visit, exchange)
        runtime.settle(exchange)


async def _answer(call: Call, order: Order, relay: Relay, reply: Reply, visit: Visit | None, runtime: Runtime) -> None:
    """Try replicas until one answers; write its answer."""
    exchange = relay.exchange
    route = order.route
    pool = route.pool
    explaining = runtime.explaining
    asking = Asking(call, order, relay, runtime)
    if route.continues and exchange.stream:
        asking.resumption = Resumption(order, exchange.max_tokens_set)
    story = Attempts(pool, runtime.witness, order.request.model, exchange.request_id)
    # After admission: who is refused costs nothing here.
    if route.reader.takes_long(order.request):
        await asyncio.to_thread(read_prompt, order, exchange)
    else:
        read_prompt(order, exchange)
    try:
        while True:
            now = time.monotonic()
            if now >= relay.total_deadline:
                raise UpstreamTimeout(f"The request took longer than {order.total_s:g} s.")
            if relay.interruption is not None:
                raise relay.interruption
            decision = route.router.decide(order.request, pool.replicas, now, story.tried)
            if now >= explaining.due_at or exchange.attempts or call.trial is not None:
                explaining.take(order, now, story.tried, decision, asked=call.trial is not None)
            replica = decision.replica
            if replica is None or story.exhausted:
                if visit is not None and replica is None and _some_are_full(decision):
                    fits = partial(_fits, story, relay)
                    if await runtime.gate.wait_for_replica(visit, relay, fits):
                        if visit.order is not order:  # a reload has brought other replicas
                            order = asking.order = visit.order
                            route, pool = order.route, order.route.pool
                        continue
                raise asking.broken_off or story.nothing_left(decision, now)
            upstream = pool.upstreams[replica]
            leg = begin_leg(asking, replica, decision, now)
            leg.key, leg.refunds = story.begins(upstream, now), story.refunds
            if route.hedges is None:
                whole, verdict = await asking.attempt(leg, upstream, decision, now)
            else:
                upstream, whole, verdict = await hedged(asking, leg, upstream, decision, now, story)
            if verdict is None:
                story.served = True
                if whole is None:
                    reply.finish()
                else:
                    runtime.witness.answered(upstream.replica, pool.replicas, leg.key)
                    if leg.refunds:
                        pool.retries.pay_back(leg.refunds, time.monotonic())
                    write_whole(whole, relay, reply, exchange)
                exchange.outcome = Outcome.COMPLETED
                return
            in_panic = decision.reason in PANIC
            goes_on = story.goes_on(upstream, verdict, in_panic=in_panic, seen=relay.started_content)
            if relay.started_content:
                story = _resumed(asking, verdict, story, goes_on, runtime, visit)
            elif not goes_on:
                raise verdict.error
            if story.pause_s:
                await asyncio.sleep(min(story.pause_s, relay.total_deadline - time.monotonic()))
    finally:
        story.close()


def _resumed(
    asking: Asking, verdict: Verdict, story: Attempts, goes_on: bool, runtime: Runtime, visit: Visit | None
) -> Attempts:
    """The answer has broken off, or a replica that was to go on with it has not: the story that another attempt belongs
    to. Raises what the client gets when there can be none."""
    order, leg, resumption = asking.order, asking.relay.leg, asking.resumption
    if resumption is None or leg is None:
        raise verdict.error
    refusal = resumption.goes_on(leg, verdict, order.route.pool)
    if refusal or leg.passing:
        runtime.attempt_metrics.broke_off(order.route.model, refusal)
    if refusal or not (goes_on or leg.passing):
        own = leg.passing or verdict.evidence is None
        raise verdict.error if own else asking.broken_off or verdict.error
    if not leg.passing:
        return story
    asking.relay.exchange.continuations += 1
    if visit is not None:
        visit.broke_off(time.monotonic(), asking.relay.total_deadline)
    failed, replica = asking.relay.exchange.request_id, leg.replica.name
    logger.info("request %s goes on after %s: %s", failed, replica, verdict.error.code, extra=about(failed))
    story.close()
    story = Attempts(order.route.pool, runtime.witness, order.request.model, failed)
    story.tried += resumption.unable
    return story


def _fits(story: Attempts, relay: Relay, order: Order) -> bool:
    """Whether some replica could take the request now, or there is none, or no reason, that it could wait for."""
    request, replicas, now = order.request, order.route.pool.replicas, time.monotonic()
    if relay.interruption is not None or order.route.router.fits(request, replicas, now, story.tried):
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


def _first_content(order: Order, runtime: Runtime, leg: Leg) -> None:
    """Content of the answer has come."""
    pool, now = order.route.pool, time.monotonic()
    runtime.witness.answered(leg.replica, pool.replicas, leg.key)
    if leg.refunds:
        pool.retries.pay_back(leg.refunds, now)
    order.route.router.first_token(order.request, leg.replica, now)


def _note(exchange: Exchange, order: Order) -> None:
    exchange.model = order.route.name
    exchange.stream = order.request.stream
    if not exchange.replica:  # else it is that one's, until another is asked
        exchange.pool = order.route.pool.name
    exchange.price = order.route.price
    exchange.priority_class = PRIORITY_CLASSES[order.band]
