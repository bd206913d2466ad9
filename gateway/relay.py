"""Carries upstream responses to the client, and decides when the client sees the first byte of one.

A relay lives as long as its request and spans attempts, each of which is a `gateway.leg.Leg`: nothing is shown to the
client until the first content event, so a failed attempt can be followed by another one unnoticed. After `hold_s`
without content a streaming client gets its status and heartbeats (SSE comments); attempts can still follow, but errors
are in the stream from then on.

Everything here runs in callbacks: the legs' are called by the upstream connections' reads, `tick` by the worker's
ticker. The task that runs the exchange sleeps from sending the request until the response has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from backends.ticker import Ticker
from gateway import usage
from gateway.errors import GatewayError, UpstreamTimeout, error_event
from gateway.leg import Leg, Outrun
from gateway.record import Attempt, Exchange
from gateway.reply import Headers, Reply
from gateway.sse import Observe
from routing.types import Replica

HEARTBEAT = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Timing:
    """The deadlines of one request, in seconds."""

    first_token_s: float
    idle_s: float
    total_s: float
    hold_s: float
    heartbeat_s: float


class Relay:
    """One request's way back."""

    # fmt: off
    __slots__ = (
        "_answered", "_hold_deadline", "_last_write_at", "_reply", "_ticker", "exchange", "expected_choices", "headers",
        "hide_usage", "interruption", "leg", "loop", "max_event_bytes", "max_response_bytes", "paused", "rival",
        "started_content", "timing", "total_deadline",
    )
    # fmt: on

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        timing: Timing,
        ticker: Ticker,
        loop: asyncio.AbstractEventLoop,
        *,
        expected_choices: int,
        hide_usage: bool,
        max_event_bytes: int,
        max_response_bytes: int,
        answered: Callable[[Leg], None] | None = None,
    ) -> None:
        """`answered` is told whose content is being passed on, when it begins."""
        self.exchange = exchange
        self.timing = timing
        self.loop = loop
        self.expected_choices = expected_choices
        self.hide_usage = hide_usage
        self.max_event_bytes = max_event_bytes
        self.max_response_bytes = max_response_bytes
        self.started_content = False
        """The client has seen content; from now on nothing can be taken back."""
        self.leg: Leg | None = None
        """The attempt under way or the last one; of two, the one that has won."""
        self.rival: Leg | None = None
        """The other one, while a request is hedged."""
        self.headers: Headers = []
        """What the response's head carries if it has to begin before there is content."""
        self.interruption: GatewayError | None = None
        self.paused = False
        """The client's side is full."""
        self.total_deadline = exchange.started_at + timing.total_s
        self._reply = reply
        self._ticker = ticker
        self._answered = answered
        self._hold_deadline = exchange.started_at + timing.hold_s
        self._last_write_at = exchange.started_at

    def open(self) -> None:
        """Start the deadlines; `close` stops them."""
        self._reply.on_pause = self._pause
        self._ticker.add(self)

    def close(self) -> None:
        """Stop the deadlines and drop what is still under way. Safe to call more than once."""
        self._ticker.discard(self)
        self._reply.on_pause = None
        for leg in (self.leg, self.rival):
            if leg is not None:
                leg.close()

    def begin(self, replica: Replica, attempt: Attempt, headers: Headers, observe: Observe | None = None) -> Leg:
        """An attempt comes, to this replica. `headers`: the head of the response if that one begins it."""
        before = self.leg
        if before is not None and before.passing and before.reader is not None:
            usage.from_stream(self.exchange, before.reader)
        leg = self.leg = Leg(self, replica, attempt, headers, observe)
        if headers:
            self.headers = headers
        return leg

    def begin_rival(self, replica: Replica, attempt: Attempt, headers: Headers, observe: Observe | None = None) -> Leg:
        """A second attempt beside the one under way: whichever brings content first is passed on."""
        leg = self.rival = Leg(self, replica, attempt, headers, observe)
        return leg

    # What the legs call.

    def begin_content(self, leg: Leg, held: bytes, now: float) -> None:
        """The first content of this leg is there, after what was held back before it."""
        rival = self.rival
        if rival is not None:
            loser = self.leg if leg is rival else rival
            self.leg, self.rival = leg, None
            if loser is not None:
                loser.fail(Outrun())
        if not self.started_content:
            self.started_content = True
            self.exchange.first_content_at = now
            self.exchange.dispatched_at = leg.dispatched_at
        if self._answered is not None:
            self._answered(leg)
        if not self._reply.started:
            self._start(leg.headers)
        self.write(held)

    def write(self, data: bytes) -> None:
        """Pass on some bytes of the answer."""
        if data:
            self._last_write_at = time.monotonic()
            self.exchange.response_bytes += len(data)
            self._reply.write(data)

    def write_done(self) -> None:
        """The `[DONE]` that an engine has left out."""
        self.write(DONE)

    # What the ticker and the client's side call.

    def tick(self, now: float) -> None:
        """Deadlines, the end of the hold, heartbeats. Resolution is the ticker's, 100 ms."""
        leg, rival = self.leg, self.rival
        if leg is not None and leg.linger_deadline is not None:
            if now >= leg.linger_deadline:
                leg.resolve(None)
            return
        if now >= self.total_deadline:
            self._fail(UpstreamTimeout(f"The request took longer than {self.timing.total_s:g} s."))
            return
        if not self.exchange.stream:
            return
        if leg is not None and leg.tick(now):
            return
        if rival is not None and rival.tick(now):
            return
        if not self._reply.started:
            if now >= self._hold_deadline and self.headers:
                self._start(self.headers)
                self.write(HEARTBEAT)
        elif now - self._last_write_at >= self.timing.heartbeat_s:
            self.write(HEARTBEAT)

    def end_with_error(self, error: GatewayError) -> None:
        """Finish a started stream with an error event, and without `[DONE]`."""
        self.write(error_event(error, self.exchange.request_id))
        self._reply.finish()

    def abandon(self, replica: Replica) -> None:
        """Give up an attempt at a replica that is known to have stopped answering, unless content has come.

        Another attempt may follow, so that the client need not notice.
        """
        for leg in (self.leg, self.rival):
            if leg is not None and leg.replica is replica:
                leg.abandon()

    def interrupt(self, error: GatewayError) -> None:
        """End the request from outside (shutdown) as if the attempt had failed with `error`.

        An answer that is complete stays so. A request that still waits for a connection ends when it gets one.
        """
        if self.leg is not None and self.leg.completed:
            self.leg.resolve(None)
            return
        self.interruption = error
        self._fail(error)

    def _fail(self, error: GatewayError) -> None:
        for leg in (self.leg, self.rival):
            if leg is not None:
                leg.fail(error)

    def _pause(self, paused: bool) -> None:
        self.paused = paused
        for leg in (self.leg, self.rival):
            if leg is not None:
                leg.pause(paused)

    def _start(self, headers: Headers) -> None:
        self.exchange.status = 200
        self._reply.start(200, headers)
