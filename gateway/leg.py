"""One attempt's way back: reads the response of one replica and decides what the client may see of it.

A relay has a leg for each attempt, mostly one after the other. Two are under way at once while a request is hedged;
then the first to bring content wins, and the other is cut. A leg that broke off in the middle may be followed by one
that goes on where it ended.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backends.dialects.protocol import Translation, TranslationError
from backends.errors import Disconnected, HeadTimeout, IdleTimeout, UpstreamError
from backends.http1 import Connection
from backends.sse import EventTooLarge
from gateway.errors import GatewayError, StreamInterrupted, UpstreamFailed
from gateway.record import Attempt
from gateway.reply import Headers
from gateway.sse import Observe, ReadUsage, StreamReader, openai_usage
from gateway.upstream_errors import UpstreamStalled, from_stream_event
from routing.credential import Credential
from routing.types import Replica

if TYPE_CHECKING:
    from gateway.relay import Relay

LINGER_S = 0.25
"""How long to wait after `[DONE]` for the upstream to end its body, which makes the connection reusable."""
_EVENT_STREAM = b"text/event-stream"


class Outrun(Exception):
    """Another replica was quicker with the first content of a hedged request."""


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


class Leg:
    """Made by `Relay.begin`. What the upstream connection calls are callbacks; `run` is where the exchange waits."""

    __slots__ = (
        "_assembling",
        "_body",
        "_body_bytes",
        "_connection",
        "_content_events",
        "_done",
        "_first_token_deadline",
        "_held",
        "_last_data_at",
        "_outrun",
        "_relay",
        "_response_headers",
        "_status",
        "_translation",
        "attempt",
        "completed",
        "dispatched_at",
        "headers",
        "key",
        "linger_deadline",
        "observe",
        "passing",
        "read_usage",
        "reader",
        "refunds",
        "replica",
        "whole",
    )

    def __init__(
        self, relay: Relay, replica: Replica, attempt: Attempt, headers: Headers, observe: Observe | None
    ) -> None:
        self._relay = relay
        self.replica = replica
        self.attempt = attempt
        """What is kept of it in the record of the exchange."""
        self.headers = headers
        """What the head of a streamed response will carry if this leg begins it."""
        self.observe = observe
        self.reader: StreamReader | None = None
        self.key: Credential | None = None
        """What it is sent with, where the upstream has several keys."""
        self.refunds: tuple[float, ...] = ()
        """What the pool's retry budget gets back when it brings an answer."""
        self.passing = False
        """Its content is being passed on."""
        self.completed = False
        """The model server's answer has come whole; in a stream, up to its `[DONE]`."""
        self.whole: UpstreamReply | None = None
        """That answer, unless it is a stream."""
        self.dispatched_at = 0.0
        self.read_usage: ReadUsage = openai_usage
        self.linger_deadline: float | None = None
        self._outrun = False
        """Another attempt is the answer; this one may not have been sent yet, and must not be any more."""
        self._done: asyncio.Future[UpstreamReply | None] | None = None
        self._connection: Connection | None = None

    async def run(
        self,
        connection: Connection,
        data: bytes | list[bytes],
        *,
        translation: Translation | None = None,
        read_usage: ReadUsage = openai_usage,
    ) -> UpstreamReply | None:
        """Send the request; return a whole reply, or None when a stream was relayed to its complete end.

        `translation` turns an engine's own form of a successful answer into OpenAI's. May be called again after a
        whole reply that was no answer.

        Raises `UpstreamError` when the connection failed, `Outrun`, and `GatewayError` for everything else that ended
        the attempt. `passing` says whether the client has seen any content of it.
        """
        relay = self._relay
        attempt = self.attempt
        if relay.interruption is not None or self._outrun:
            attempt.connected_at = time.monotonic()
            connection.detach()
            raise relay.interruption or Outrun()
        self._connection = connection
        self._translation = translation
        self._assembling = False
        self._content_events = 0
        self._status = 0
        self._response_headers: Headers = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._held: list[bytes] = []
        self.completed = False
        self.whole = None
        self.reader = None
        self.read_usage = read_usage
        timing = relay.timing
        now = time.monotonic()
        self._last_data_at = self.dispatched_at = attempt.sent_at = now
        if attempt.connected_at is None:
            attempt.connected_at = now
        if not relay.started_content:
            relay.exchange.dispatched_at = now
        self._first_token_deadline = now + timing.first_token_s
        done: asyncio.Future[UpstreamReply | None] = relay.loop.create_future()
        self._done = done
        # Some engines send their head, or the role, before they read the prompt: until there is content, silence is
        # measured by `first_token_s`; from then on by `idle_s`, in `tick`.
        limit_s = timing.first_token_s if relay.exchange.stream else relay.total_deadline - now
        connection.send(data, self, head_timeout_s=limit_s, idle_timeout_s=max(limit_s, timing.idle_s))
        if relay.paused:
            connection.pause_reading()
        try:
            return await done
        finally:
            self._done = None
            self.drop_connection()

    # What the upstream connection calls.

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._response_headers = headers
        events = False
        for name, value in headers:
            if name == b"content-type":
                events = value[: len(_EVENT_STREAM)].lower() == _EVENT_STREAM
            elif name == b"content-encoding" and value.lower() != b"identity":
                # We ask for none; what we cannot read cannot be checked, nor would the client know how to read it.
                self.fail(UpstreamFailed("The model server compressed its answer.", code="upstream_compressed"))
                return
        relay = self._relay
        if status != 200:
            self._translation = None  # errors are told apart by `gateway.upstream_errors`
        elif not events:
            pass
        elif relay.exchange.stream:
            self.reader = StreamReader(
                expected_choices=relay.expected_choices,
                hide_usage=relay.hide_usage,
                max_event_bytes=relay.max_event_bytes,
                read_usage=self.read_usage,
                observe=self.observe,
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
                self.replica.health.progressed_at = now
                return
            passed = reader.feed(data)
        except EventTooLarge:
            limit = self._relay.max_event_bytes
            self.fail(UpstreamFailed(f"The model server sent an event larger than {limit} bytes."))
            return
        except TranslationError as error:
            self.fail(from_stream_event(error.error))
            return
        if reader.content_events != self._content_events:  # pings and roles are no progress
            self._content_events = reader.content_events
            self.replica.health.progressed_at = now
        if self.passing:
            if passed:
                self._relay.write(passed)
        else:
            if passed:
                self._held.append(passed)
                self._body_bytes += len(passed)
            if reader.content_started:
                self._begin_content(now)
            elif self._body_bytes > self._relay.max_response_bytes:
                self.fail(UpstreamFailed("The model server sent too much before the first content."))
                return
        if reader.error is not None:
            self.fail(from_stream_event(reader.error))
        elif reader.done:
            if reader.complete:
                self.completed = True
                if self.linger_deadline is None:  # what comes after `[DONE]` buys no more time
                    self.linger_deadline = now + LINGER_S
            else:
                self.fail(_truncated())

    def on_end(self) -> None:
        reader = self.reader
        self._connection = None
        if reader is None:
            try:
                self._end_whole()
            except Exception as error:  # the connection would only log it, and the request wait for its whole time
                self.fail(error)
        elif reader.complete:
            self._end_cleanly()
        else:
            self.fail(_truncated())

    def on_error(self, error: UpstreamError) -> None:
        self._connection = None
        if self.reader is not None and self.reader.complete:
            # Every choice had finished; only the framing of the end is missing.
            self._end_cleanly()
        elif self.passing:
            if isinstance(error, IdleTimeout):
                self.fail(self._silent())
            else:
                self.fail(StreamInterrupted("The connection to the model server broke before the answer ended."))
        elif isinstance(error, HeadTimeout) and self._relay.exchange.stream:
            self.fail(self._no_content())
        else:
            self.fail(error)

    # What the relay calls.

    def tick(self, now: float) -> bool:
        """The deadlines of a stream; True when one has passed, which ends the attempt."""
        if self._relay.paused or self._done is None:
            return False
        if not self.passing:
            if now < self._first_token_deadline:
                return False
            self.fail(self._no_content())
        elif now - self._last_data_at < self._relay.timing.idle_s:
            return False
        elif self.reader is not None and self.reader.complete:
            self._end_cleanly()
        else:
            self.fail(self._silent())
        return True

    def pause(self, paused: bool) -> None:
        """Stop or go on reading: the client's side is full, or no longer."""
        now = self._last_data_at = time.monotonic()  # silence while paused is our own doing
        if self._done is not None and not paused:
            self._first_token_deadline = max(self._first_token_deadline, now + self._relay.timing.first_token_s)
        if self._connection is not None:
            if paused:
                self._connection.pause_reading()
            else:
                self._connection.resume_reading()

    def abandon(self) -> None:
        """Give it up, unless content has come: its replica is known to have stopped answering."""
        if self._done is not None and not self.passing and not self.completed:
            self.fail(Disconnected(self.replica.name, "body", "the server has stopped", sent=True, got_bytes=True))

    def resolve(self, result: UpstreamReply | None) -> None:
        """The answer is complete. Whoever waits for it may be leaving in this moment: it came before, and counts."""
        done = self._done
        if done is not None and done.done() and not done.cancelled():
            return
        self.completed = True
        if done is not None:
            self.whole = self.whole or result
            if not done.done():
                done.set_result(result)

    def fail(self, error: Exception) -> None:
        """End the attempt with this error, if it is not over."""
        self._outrun |= isinstance(error, Outrun)
        self.drop_connection()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def close(self) -> None:
        """Drop what is under way, and let go of the relay: in a circle they would wait for the garbage collector, with
        all that they hold. Twice is as good as once."""
        self.drop_connection()
        if hasattr(self, "_relay"):
            del self._relay

    def drop_connection(self) -> None:
        """Close the upstream now if its response has not ended: that is how an engine learns to stop."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.detach()

    def _begin_content(self, now: float) -> None:
        self.passing = True
        self.attempt.first_content_at = now
        held, self._held = self._held, []
        self._relay.begin_content(self, b"".join(held) if len(held) != 1 else held[0], now)

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
                self.fail(from_stream_event(error.error))
                return
            if whole is None:
                self.fail(_truncated())
                return
            body = whole
        if self._status == 200:
            self.replica.health.progressed_at = time.monotonic()
        self.resolve(UpstreamReply(self._status, headers, body))

    def _end_cleanly(self) -> None:
        """Every choice has finished: end the stream, with the `[DONE]` that may be missing."""
        if self.reader is not None and not self.reader.done:
            self._relay.write_done()
        self.resolve(None)

    def _collect(self, data: bytes) -> None:
        self._body_bytes += len(data)
        limit = self._relay.max_response_bytes
        if self._body_bytes > limit:
            self.fail(UpstreamFailed(f"The model server's reply exceeded {limit} bytes."))
        else:
            self._body.append(data)

    def _no_content(self) -> GatewayError:
        limit_s = self._relay.timing.first_token_s
        return UpstreamStalled(f"No content came within {limit_s:g} s.", code="first_token_timeout")

    def _silent(self) -> GatewayError:
        return UpstreamStalled(f"The model server sent nothing for {self._relay.timing.idle_s:g} s.")


def _truncated() -> GatewayError:
    return StreamInterrupted(
        "The model server ended the stream before the answer was complete.", code="upstream_truncated"
    )
