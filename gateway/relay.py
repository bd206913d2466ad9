"""Carries one upstream response to the client, and decides when the client sees the first byte of it.

A relay lives as long as its request and spans attempts: nothing is shown to the client until the first content event,
so a failed attempt can be followed by another one unnoticed. After `hold_s` without content a streaming client gets
its status and heartbeats (SSE comments); attempts can still follow, but errors are in the stream from then on.

Everything here runs in callbacks: `on_data` is called by the upstream connection's read, `tick` by the worker's
ticker. The task that runs the exchange sleeps from sending the request until the response has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.dialects.protocol import Translation, TranslationError
from backends.errors import Disconnected, HeadTimeout, IdleTimeout, UpstreamError
from backends.http1 import Connection
from backends.sse import EventTooLarge
from backends.ticker import Ticker
from gateway.errors import GatewayError, StreamInterrupted, UpstreamFailed, UpstreamTimeout, error_event
from gateway.record import Exchange
from gateway.reply import Headers, Reply
from gateway.sse import ReadUsage, StreamReader, openai_usage
from gateway.upstream_errors import UpstreamStalled, from_stream_event
from routing.types import Replica

HEARTBEAT = b": ping\n\n"
LINGER_S = 0.25
"""How long to wait after `[DONE]` for the upstream to end its body, which makes the connection reusable."""
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Timing:
    """The deadlines of one request, in seconds."""

    first_token_s: float
    idle_s: float
    total_s: float
    hold_s: float
    heartbeat_s: float


@dataclass(slots=True)
class UpstreamReply:
    """A response that was collected whole: any that is not a successful event stream."""

    status: int
    headers: Headers
    body: bytes
    tree: Any = None
    """The body parsed, where somebody has done so."""

    @property
    def answers(self) -> bool:
        """Whether it is an answer. Of the 2xx too: nothing created, partial or empty answers an inference call."""
        return self.status == 200


class Relay:
    """One request's way back. `attempt` may be called again after it failed, while nothing was shown."""

    # fmt: off
    __slots__ = (
        "_answered", "_assembling", "_body", "_body_bytes", "_connection", "_content_events", "_done",
        "_expected_choices", "_first_token_deadline", "_held", "_hide_usage", "_hold_deadline",
        "_interruption", "_last_data_at", "_last_write_at", "_linger_deadline", "_loop", "_max_event_bytes",
        "_max_response_bytes", "_paused", "_reply", "_response_headers", "_status", "_ticker", "_timing",
        "_total_deadline", "_translation", "completed", "exchange", "headers", "read_usage", "reader",
        "replica", "started_content", "whole",
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
        answered: Callable[[Replica], None] | None = None,
    ) -> None:
        """`answered` is told which replica's content is being passed on, when it begins."""
        self.exchange = exchange
        self.reader: StreamReader | None = None
        self.started_content = False
        self.completed = False
        """The model server's answer has come whole; in a stream, up to its `[DONE]`."""
        self.whole: UpstreamReply | None = None
        """That answer, unless it is a stream."""
        self.replica: Replica | None = None
        """The one that is being tried."""
        self.headers: Headers = []
        """Set by the exchange for each attempt of a streaming request: what the response's head will carry."""
        self._reply = reply
        self._timing = timing
        self._ticker = ticker
        self._loop = loop
        self._expected_choices = expected_choices
        self._hide_usage = hide_usage
        self._max_event_bytes = max_event_bytes
        self._max_response_bytes = max_response_bytes
        self._answered = answered
        self._total_deadline = exchange.started_at + timing.total_s
        self._hold_deadline = exchange.started_at + timing.hold_s
        self._last_write_at = exchange.started_at
        self._last_data_at = exchange.started_at
        self._paused = False
        self._connection: Connection | None = None
        self._done: asyncio.Future[UpstreamReply | None] | None = None
        self._status = 0
        self._response_headers: Headers = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._held: list[bytes] = []
        self._first_token_deadline = 0.0
        self._linger_deadline: float | None = None
        self._interruption: GatewayError | None = None
        self._translation: Translation | None = None
        self._assembling = False
        self.read_usage: ReadUsage = openai_usage
        self._content_events = 0

    def open(self) -> None:
        """Start the deadlines; `close` stops them."""
        self._ticker.add(self)

    def close(self) -> None:
        """Stop the deadlines and drop what is still under way. Safe to call more than once."""
        self._ticker.discard(self)
        self._reply.on_pause = None
        self._drop_connection()

    def begin(self, replica: Replica) -> None:
        """Another attempt comes, to this replica: what was complete was an answer that nobody is shown."""
        self.replica = replica
        self.completed = False
        self.whole = None
        self.reader = None

    async def attempt(
        self,
        connection: Connection,
        data: bytes | list[bytes],
        *,
        translation: Translation | None = None,
        read_usage: ReadUsage = openai_usage,
    ) -> UpstreamReply | None:
        """Send the request; return a whole reply, or None when a stream was relayed to its complete end.

        `begin` comes before it, and before whatever may take time on the way to the connection.
        `translation` turns an engine's own form of a successful answer into OpenAI's.

        Raises `UpstreamError` when the connection failed and `GatewayError` for everything else that ended the
        attempt. `started_content` says whether the client has seen any content of it.
        """
        if self._interruption is not None:
            connection.detach()
            raise self._interruption
        self._connection = connection
        self._translation = translation
        self._assembling = False
        self.read_usage = read_usage
        self._content_events = 0
        self._status = 0
        self._body = []
        self._body_bytes = 0
        self._held = []
        now = time.monotonic()
        self.exchange.dispatched_at = now
        remaining_s = self._total_deadline - now
        self._first_token_deadline = now + self._timing.first_token_s
        self._paused = False
        done: asyncio.Future[UpstreamReply | None] = self._loop.create_future()
        self._done = done
        self._reply.on_pause = self._pause
        # Some engines send their head, or the role, before they read the prompt: until there is content, silence is
        # measured by `first_token_s`; from then on by `idle_s`, in `tick`.
        limit_s = self._timing.first_token_s if self.exchange.stream else remaining_s
        connection.send(data, self, head_timeout_s=limit_s, idle_timeout_s=max(limit_s, self._timing.idle_s))
        try:
            return await done
        finally:
            self._done = None
            self._drop_connection()

    # What the upstream connection calls.

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._response_headers = headers
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            # We ask for none; what we cannot read cannot be checked, and the client would not know how to read it.
            self._fail(UpstreamFailed("The model server compressed its answer.", code="upstream_compressed"))
            return
        if status != 200:
            self._translation = None  # errors are told apart by `gateway.upstream_errors`
        elif not _is_event_stream(headers):
            pass
        elif self.exchange.stream:
            self.reader = StreamReader(
                expected_choices=self._expected_choices,
                hide_usage=self._hide_usage,
                max_event_bytes=self._max_event_bytes,
                read_usage=self.read_usage,
            )
        elif self._translation is not None:
            self._assembling = True

    def on_data(self, data: bytes) -> None:
        reader = self.reader
        if reader is None and not self._assembling:
            self._collect(data)
            return
        now = self._last_data_at = time.monotonic()
        try:
            if self._translation is not None:
                data = self._translation.feed(data)
            if reader is None:
                self._note_progress(now)
                return
            passed = reader.feed(data)
        except EventTooLarge:
            self._fail(UpstreamFailed(f"The model server sent an event larger than {self._max_event_bytes} bytes."))
            return
        except TranslationError as error:
            self._fail(from_stream_event(error.error))
            return
        if reader.content_events != self._content_events:  # pings and roles are no progress
            self._content_events = reader.content_events
            self._note_progress(now)
        if self.started_content:
            if passed:
                self._write(passed)
        else:
            if passed:
                self._held.append(passed)
                self._body_bytes += len(passed)
            if reader.content_started:
                self._begin_content()
            elif self._body_bytes > self._max_response_bytes:
                self._fail(UpstreamFailed("The model server sent too much before the first content."))
                return
        if reader.error is not None:
            self._fail(from_stream_event(reader.error))
        elif reader.done:
            if reader.complete:
                self.completed = True
                if self._linger_deadline is None:  # what comes after `[DONE]` buys no more time
                    self._linger_deadline = time.monotonic() + LINGER_S
            else:
                self._fail(self._truncated())

    def on_end(self) -> None:
        reader = self.reader
        self._connection = None
        if reader is None:
            try:
                self._end_whole()
            except Exception as error:  # the connection would only log it, and the request wait for its whole time
                self._fail(error)
        elif reader.complete:
            self._end_cleanly()
        else:
            self._fail(self._truncated())

    def on_error(self, error: UpstreamError) -> None:
        self._connection = None
        if self.reader is not None and self.reader.complete:
            # Every choice had finished; only the framing of the end is missing.
            self._end_cleanly()
        elif self.started_content:
            if isinstance(error, IdleTimeout):
                self._fail(UpstreamStalled(f"The model server sent nothing for {self._timing.idle_s:g} s."))
            else:
                self._fail(StreamInterrupted("The connection to the model server broke before the answer ended."))
        elif isinstance(error, HeadTimeout) and self.exchange.stream:
            self._fail(self._no_content())
        else:
            self._fail(error)

    # What the ticker and the client's side call.

    def tick(self, now: float) -> None:
        """Deadlines, the end of the hold, heartbeats. Resolution is the ticker's, 100 ms."""
        if self._linger_deadline is not None:
            if now >= self._linger_deadline:
                self._resolve(None)
            return
        if now >= self._total_deadline:
            self._fail(UpstreamTimeout(f"The request took longer than {self._timing.total_s:g} s."))
            return
        if not self.exchange.stream:
            return
        if not self.started_content:
            if self._done is not None and now >= self._first_token_deadline:
                self._fail(self._no_content())
                return
            if not self._reply.started and now >= self._hold_deadline and self.headers:
                self._start()
                self._write(HEARTBEAT)
                return
        elif not self._paused and now - self._last_data_at >= self._timing.idle_s:
            if self.reader is not None and self.reader.complete:
                self._end_cleanly()
            else:
                self._fail(UpstreamStalled(f"The model server sent nothing for {self._timing.idle_s:g} s."))
            return
        if self._reply.started and now - self._last_write_at >= self._timing.heartbeat_s:
            self._write(HEARTBEAT)

    def end_with_error(self, error: GatewayError) -> None:
        """Finish a started stream with an error event, and without `[DONE]`."""
        self._write(error_event(error, self.exchange.request_id))
        self._reply.finish()

    def abandon(self, replica: Replica) -> None:
        """Give up an attempt at a replica that is known to have stopped answering, unless content has come.

        Another attempt may follow, so that the client need not notice.
        """
        if self.replica is replica and self._done is not None and not self.started_content and not self.completed:
            self._fail(Disconnected(replica.name, "body", "the server has stopped", sent=True, got_bytes=True))

    def interrupt(self, error: GatewayError) -> None:
        """End the request from outside (shutdown) as if the attempt had failed with `error`.

        An answer that is complete stays so. A request that still waits for a connection ends when it gets one.
        """
        if self.completed:
            self._resolve(None)
            return
        self._interruption = error
        self._fail(error)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        self._last_data_at = time.monotonic()  # silence while paused is our own doing
        if self._connection is not None:
            if paused:
                self._connection.pause_reading()
            else:
                self._connection.resume_reading()

    def _begin_content(self) -> None:
        self.started_content = True
        self.exchange.first_content_at = time.monotonic()
        if self._answered is not None and self.replica is not None:
            self._answered(self.replica)
        if not self._reply.started:
            self._start()
        self._write(b"".join(self._held) if len(self._held) != 1 else self._held[0])
        self._held = []

    def _start(self) -> None:
        self.exchange.status = 200
        self._reply.start(200, self.headers)

    def _end_whole(self) -> None:
        """The response has ended, and was not streamed to the client."""
        body = b"".join(self._body)
        headers = self._response_headers
        translation = self._translation
        if translation is not None:
            headers = [(b"content-type", b"application/json")]
            try:
                whole = translation.assembled() if self._assembling else translation.whole(body)
            except TranslationError as error:
                self._fail(from_stream_event(error.error))
                return
            if whole is None:
                self._fail(self._truncated())
                return
            body = whole
        if self._status == 200:
            self._note_progress(time.monotonic())
        self._resolve(UpstreamReply(self._status, headers, body))

    def _note_progress(self, now: float) -> None:
        if self.replica is not None:
            self.replica.health.progressed_at = now

    def _end_cleanly(self) -> None:
        """Every choice has finished: end the stream, with the `[DONE]` that may be missing."""
        if self.reader is not None and not self.reader.done:
            self._write(DONE)
        self._resolve(None)

    def _write(self, data: bytes) -> None:
        if data:
            self._last_write_at = time.monotonic()
            self.exchange.response_bytes += len(data)
            self._reply.write(data)

    def _collect(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._max_response_bytes:
            self._fail(UpstreamFailed(f"The model server's reply exceeded {self._max_response_bytes} bytes."))
        else:
            self._body.append(data)

    def _no_content(self) -> GatewayError:
        limit_s = self._timing.first_token_s
        return UpstreamStalled(f"No content came within {limit_s:g} s.", code="first_token_timeout")

    def _truncated(self) -> GatewayError:
        return StreamInterrupted(
            "The model server ended the stream before the answer was complete.", code="upstream_truncated"
        )

    def _resolve(self, result: UpstreamReply | None) -> None:
        self.completed = True
        if self._done is not None and not self._done.done():
            self.whole = result
            self._done.set_result(result)

    def _fail(self, error: Exception) -> None:
        self._drop_connection()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _drop_connection(self) -> None:
        """Close the upstream now if its response has not ended: that is how an engine learns to stop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.detach()


def _is_event_stream(headers: list[tuple[bytes, Any]]) -> bool:
    return any(name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers)
