"""Asks a second replica when the first is slower with its first content than it usually is (Dean and Barroso, The Tail
at Scale, 2013: hedged requests), and goes on with whichever has content first.

Only what may be asked twice is: streams with short prompts, at replicas of one's own, within a budget
(`routing.hedging`). Both attempts hold a place at their replicas; the slower one is cut the moment that the other has
content, and its engine told to stop. The client is charged for the answer that it got.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import NamedTuple

from backends.upstream import Upstream
from gateway.asking import OUTRUN, Asking, begin_leg, note_choice
from gateway.attempts import Attempts
from gateway.leg import Leg, Outrun, UpstreamReply
from gateway.verdict import Verdict
from routing.hedging import busy_share, rivals
from routing.router import PANIC
from routing.types import Decision


class Attempted(NamedTuple):
    """What came of an attempt, and where."""

    upstream: Upstream
    whole: UpstreamReply | None
    verdict: Verdict | None


async def hedged(
    asking: Asking, leg: Leg, upstream: Upstream, decision: Decision, now: float, story: Attempts
) -> Attempted:
    """An attempt, and perhaps a second one beside it; what has failed beside what is returned, `story` knows."""
    hedges, relay = asking.order.route.hedges, asking.relay
    tokens = asking.order.request.prompt_tokens
    may = hedges is not None and not relay.started_content and not upstream.hosted and relay.exchange.stream
    delay_s = hedges.delay_s(tokens) if may and hedges is not None else None
    try:
        if delay_s is None:
            return Attempted(upstream, *await asking.attempt(leg, upstream, decision, now))
        return await _raced(asking, leg, upstream, decision, now, story, delay_s)
    finally:
        came_at = relay.exchange.first_content_at
        if may and hedges is not None and came_at is not None:
            hedges.note(tokens, came_at - now)


async def _raced(
    asking: Asking, leg: Leg, upstream: Upstream, decision: Decision, now: float, story: Attempts, delay_s: float
) -> Attempted:
    relay = asking.relay
    patience = asyncio.timeout(None)
    rival = asyncio.create_task(_rival(asking, leg, upstream, story, delay_s, patience))
    try:
        try:
            async with patience:
                first = Attempted(upstream, *await asking.attempt(leg, upstream, decision, now))
        except TimeoutError:
            first = Attempted(upstream, None, OUTRUN)
        # Asked of the relay, not of the verdict: the first may break in the moment that the other has content.
        if relay.leg is not leg or (relay.rival is not None and first.verdict is not None):
            if first.verdict is not None and first.verdict is not OUTRUN:
                story.goes_on(upstream, first.verdict, in_panic=False)
            second = await rival
            if relay.leg is not leg and asking.resumption is not None:
                asking.resumption.rival_won()
            return second or first
        second = rival.result() if rival.done() and rival.exception() is None else None
        if second is not None and second.verdict is not None and second.verdict is not OUTRUN:
            story.goes_on(second.upstream, second.verdict, in_panic=False)
        note_choice(relay.exchange, upstream.replica, decision)
        return first
    finally:
        # The exchange must not settle before both places are free again.
        rival.cancel()
        await asyncio.gather(rival, return_exceptions=True)
        relay.rival = None


async def _rival(
    asking: Asking, other: Leg, first: Upstream, story: Attempts, delay_s: float, patience: asyncio.Timeout
) -> Attempted | None:
    """The second attempt, once the first has taken too long; None when there is none.

    When it has been the answer, `patience` with the first one ends, which may still wait for a connection or an
    adapter: nobody else would tell it.
    """
    await asyncio.sleep(delay_s)
    relay, order = asking.relay, asking.order
    hedges, pool = order.route.hedges, order.route.pool
    if relay.started_content or hedges is None:
        return None
    now = time.monotonic()
    decision = order.route.router.decide(order.request, rivals(pool.replicas, first.replica), now, story.tried)
    replica = decision.replica
    if replica is None or decision.reason in PANIC or not hedges.may(busy_share(pool.replicas, now)):
        return None
    asking.explains(now, story.tried, decision, first)
    relay.exchange.hedged = True
    upstream = pool.upstreams[replica]
    leg = begin_leg(asking, replica, decision, now, rival=True)
    leg.key = story.begins(upstream, now)
    try:
        second = Attempted(upstream, *await asking.attempt(leg, upstream, decision, now))
        if relay.rival is leg:  # without content: it has failed, or is an answer that came whole
            relay.rival = None
            if second.verdict is None:
                loser, relay.leg = relay.leg, leg
                if loser is not None:
                    loser.fail(Outrun())
        return second
    finally:
        if relay.leg is not other:
            with suppress(RuntimeError):  # it has ended
                patience.reschedule(relay.loop.time())
        asking.metrics.hedged(order.route.model, won=relay.leg is leg)
