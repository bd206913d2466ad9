"""A lean HTTP/1.1 client: bytes out in one write, the response pushed to a consumer.

It exists because every request of the gateway passes through it. A request on a kept-alive connection costs
one write, one or more reads, and no task, future or timer. What it leaves to the caller: building the request
head, retries, redirects, decompression, limits on the size of a body.

A `Connection` is one exchange; the `Wire` below it is the socket and its parser, which lives on in the pool
(`pool.py`) and serves the next exchange. So whoever keeps a `Connection` for too long holds a husk, never
somebody else's socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from math import inf
from typing import Final, Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from backends.errors import (
    ConsumerFailed,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    ProtocolViolation,
    UpstreamError,
    reason_of,
)

logger = logging.getLogger(__name__)

# Below this, copying head and body together is cheaper than a second write; above it, the copy costs more.
JOIN_LIMIT_BYTES: Final = 65536
# Everything that is not body: head, interim responses, chunk extensions, trailers. Envoy allows 60 KiB.
MAX_HEAD_BYTES: Final = 65536
MAX_HEADERS: Final = 100

Headers = list[tuple[bytes, bytes]]


class Consumer(Protocol):
    """Receives one response. All callbacks are synchronous, in order, in the event loop.

    Exactly one of `on_end` and `on_error` is called, unless the connection was detached: then neither is.
    A consumer that raises is logged and loses its connection, and is told so by `on_error(ConsumerFailed)`.
    (From `on_end` it is only logged: the exchange was over, and the connection is somebody else's.)
    """

    def on_head(self, status: int, headers: Headers) -> None:
        """The final status (1xx are swallowed) and the headers, names in lower case."""

    def on_data(self, data: bytes) -> None:
        """Body bytes, framing removed; at most one call per socket read. Never empty."""

    def on_end(self) -> None:
        """Complete and well framed. The connection is back in its pool already, if it can be reused."""

    def on_error(self, error: UpstreamError) -> None:
        """The response will not be completed."""


class Keeper(Protocol):
    """What a wire needs from the pool that owns it."""

    address: str

    def release(self, wire: Wire, *, reusable: bool) -> None: ...
    def forget(self, wire: Wire) -> None: ...


class Connection:
    """The right to one exchange on one connection. Ends by itself with `on_end` or `on_error`.

    Whoever acquired it must either `send` or `detach`; otherwise its slot in the pool stays taken.
    """

    __slots__ = ("_wire", "reused")

    def __init__(self, wire: Wire) -> None:
        self._wire: Wire | None = wire
        self.reused = wire.served
        wire.connection = self

    def __repr__(self) -> str:
        state = "ended" if self._wire is None else "sent" if self._wire.consumer is not None else "unused"
        return f"<Connection {state} reused={self.reused}>"

    def send(
        self,
        data: bytes | Sequence[bytes],
        consumer: Consumer,
        *,
        head_timeout_s: float,
        idle_timeout_s: float,
        method: bytes = b"POST",
    ) -> None:
        """Write one whole request and have `consumer` called with the response, never from within this call.

        `data` is everything from the request line to the last body byte, in one or several pieces.
        """
        if self._wire is None or self._wire.consumer is not None:
            raise RuntimeError("a connection carries one request; acquire another one")
        self._wire.start(data, consumer, head_timeout_s, idle_timeout_s, method)

    def pause_reading(self) -> None:
        """Stop reading from the socket (back-pressure). What was read already is still delivered."""
        if self._wire is not None:
            self._wire.pause()

    def resume_reading(self) -> None:
        if self._wire is not None:
            self._wire.resume()

    def detach(self) -> None:
        """The consumer lost interest: close the socket now. No callback follows.

        Idempotent, and harmless after the end. A connection on which nothing was sent goes back to the pool.
        """
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abandon()

    def end(self) -> None:
        """For the wire: this exchange is over."""
        self._wire = None


class _Refused(Exception):
    """Raised inside a parser callback to stop the parser; the reason is in `Wire.violation`."""


class Wire(asyncio.Protocol):
    """One socket and its parser. Internal to `http1.py` and `pool.py`.

    Parser callbacks only take notes; consumers are called after the parser has returned, so that a consumer
    may detach, or send the next request on this very wire, from within any callback.
    """

    # fmt: off
    __slots__ = (
        "_body_until_eof", "_complete", "_fresh_bytes", "_head", "_head_done", "_head_timeout_s", "_headers",
        "_idle_timeout_s", "_is_head", "_keep_alive", "_loop", "_parser", "_paused", "_pieces", "_pool",
        "_status", "_violation", "closed", "connection", "consumer", "deadline", "got_bytes", "served",
        "transport",
    )
    # fmt: on

    def __init__(self, pool: Keeper, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = None
        self.connection: Connection | None = None
        self.consumer: Consumer | None = None
        self.closed = False
        self.served = False  # it has carried a response, or at least been idle in the pool
        self.deadline = inf  # loop time by which the next byte is due; looked at by the pool's tick
        self._pieces: list[bytes] = []
        self._headers: Headers = []
        self._reset(b"")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "idle" if self.consumer is None else "busy"
        return f"<Wire {self._pool.address} {state}>"

    def _reset(self, method: bytes) -> None:
        """Forget the previous response."""
        self._is_head = method == b"HEAD"
        self._headers = []
        self._head: Headers | None = None  # complete, not yet delivered
        self._head_done = False
        self._keep_alive = False
        self._body_until_eof = False
        self._paused = False
        self._violation: str | None = None
        self._fresh_bytes = 0  # read since the start, the head or the last piece of body
        self._complete = False
        self.got_bytes = False

    # -- what a Connection asks for

    def start(
        self,
        data: bytes | Sequence[bytes],
        consumer: Consumer,
        head_timeout_s: float,
        idle_timeout_s: float,
        method: bytes,
    ) -> None:
        self.consumer = consumer
        self._reset(method)
        transport = self.transport
        if self.closed or transport is None or transport.is_closing():
            # Died between acquire and send. Reported later: nobody expects a callback from within send().
            self._loop.call_soon(self._report_stillborn, consumer)
            return
        if self._parser is None:
            self._parser = HttpResponseParser(self)
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self.deadline = self._loop.time() + head_timeout_s
        if isinstance(data, bytes):
            transport.write(data)
        elif sum(map(len, data)) <= JOIN_LIMIT_BYTES:
            transport.write(b"".join(data))
        else:
            for piece in data:
                transport.write(piece)

    def _report_stillborn(self, consumer: Consumer) -> None:
        if self.consumer is consumer:
            self.fail(self._error(Disconnected, "closed before the request was sent", sent=False))

    def pause(self) -> None:
        if not self._paused and self.consumer is not None and self.transport is not None:
            self._paused = True
            self.deadline = inf  # silence is our own doing now
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.deadline = self._loop.time() + (self._idle_timeout_s if self._head_done else self._head_timeout_s)
            self.transport.resume_reading()

    def abandon(self) -> None:
        unused = self.consumer is None and not self.closed
        self.consumer = None
        self.connection = None
        if unused:
            self.served = True  # it will have been idle, so the keep-alive race applies to it
            self._pool.release(self, reusable=True)
        else:
            self.shut()
            self._pool.forget(self)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        consumer = self.consumer
        parser = self._parser
        if consumer is None or parser is None:
            # Nobody asked. Whatever it is, the next exchange must not take it for its answer.
            self.shut()
            self._pool.forget(self)
            return
        self.got_bytes = True
        self._fresh_bytes += len(data)
        cause: Exception | None = None
        try:
            parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            cause = error
        try:
            if self._head is not None:
                headers, self._head = self._head, None
                self._fresh_bytes = 0
                consumer.on_head(self._status, headers)
            if self._pieces:
                pieces, self._pieces = self._pieces, []
                self._fresh_bytes = 0
                if self.consumer is not None:
                    consumer.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        except Exception as error:
            self._consumer_raised(consumer, error)
            return
        if self.consumer is None:
            return  # detached from within a callback
        if self._complete:
            # An error after the end means bytes after the end: the response stands, the connection does not.
            self._finish(self._keep_alive and cause is None)
        elif cause is not None:
            self._refuse(self._violation or str(cause), cause)
        elif self._fresh_bytes > MAX_HEAD_BYTES:
            self._refuse(f"more than {MAX_HEAD_BYTES} bytes without body")
        elif self._head_done and not self._paused:
            self.deadline = self._loop.time() + self._idle_timeout_s

    def eof_received(self) -> bool:
        if self.consumer is not None and self._body_until_eof:
            self._finish(False)
        else:
            self._lost(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed:
            self._lost(exc)
        self.transport = None

    # -- httptools callbacks, called within feed_data

    def on_message_begin(self) -> None:
        if self._complete:
            raise _Refused  # a second response, or junk, behind the one that was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # else it is a trailer: framing, not something we act on
            self._headers.append((name.lower(), value.rstrip(b" \t")))  # llhttp strips the left side only

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        headers = self._headers
        if status < 200:
            if status < 100 or status == 101:
                self._stop("status 101 without an upgrade" if status == 101 else "malformed status")
            self._headers = []
            return
        if len(headers) > MAX_HEADERS:
            self._stop(f"more than {MAX_HEADERS} headers")
        if self._fresh_bytes > MAX_HEAD_BYTES and sum(len(n) + len(v) + 4 for n, v in headers) > MAX_HEAD_BYTES:
            self._stop(f"more than {MAX_HEAD_BYTES} bytes of headers")
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._stop("neither HTTP/1.1 nor HTTP/1.0")
        chunked = sized = closing = False
        for name, value in headers:
            if name == b"content-length":
                sized = True
            elif name == b"transfer-encoding":
                # We ask for no coding and undo none; twice "chunked" would be two layers.
                if chunked or value.lower() != b"chunked":
                    self._stop("a transfer coding other than chunked")
                chunked = True
            elif name == b"connection" and b"close" in value.lower():
                closing = True
        if chunked and sized:
            self._stop("both content-length and transfer-encoding")
        self._status = status
        self._head = headers
        self._head_done = True
        self._keep_alive = version == "1.1" and not closing
        if self._is_head:
            self._complete = True
        elif not chunked and not sized and status not in (204, 304):
            self._body_until_eof = True
            self._keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self._head_done:
            self._stop("an interim response with a body")
        if self._complete:
            raise _Refused  # a body in answer to HEAD
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._head_done:  # else an interim response
            self._complete = True

    def _stop(self, violation: str) -> None:
        self._violation = violation
        raise _Refused

    # -- how an exchange ends

    def _finish(self, keep_alive: bool) -> None:
        """Give the connection back, then tell the consumer: it may ask for it again at once."""
        consumer, transport = self.consumer, self.transport
        assert consumer is not None
        assert transport is not None
        self._let_go()
        self.served = True
        if self._is_head:
            self._parser = None  # it is still waiting for the body that HEAD answers announce and never have
        if self._paused:
            self._paused = False
            transport.resume_reading()
        # Bytes of the request still unsent: the server answered early and will never be in step again.
        self._pool.release(self, reusable=keep_alive and not transport.get_write_buffer_size())
        try:
            consumer.on_end()
        except Exception:
            logger.exception("%s: on_end of %s raised", self._pool.address, type(consumer).__name__)

    def fail(self, error: UpstreamError) -> None:
        """Close the socket and tell the consumer, if there is one."""
        consumer = self.consumer
        self._let_go()
        self.shut()
        self._pool.forget(self)
        if consumer is None:
            return
        try:
            consumer.on_error(error)
        except Exception:
            logger.exception("%s: on_error of %s raised", self._pool.address, type(consumer).__name__)

    def time_out(self) -> None:
        """The deadline passed; called by the pool's tick."""
        if self._head_done:
            self.fail(self._error(IdleTimeout, f"silent for {self._idle_timeout_s:g} s"))
        else:
            self.fail(self._error(HeadTimeout, f"no answer within {self._head_timeout_s:g} s"))

    def shut(self) -> None:
        """Close the socket without ceremony. No exchange may be under way. Idempotent."""
        self.closed = True
        self.deadline = inf
        self._parser = None  # it holds our bound methods: a cycle that only the garbage collector would break
        if self.transport is not None:
            self.transport.abort()

    def _let_go(self) -> None:
        self.consumer = None
        self.deadline = inf
        if self.connection is not None:
            self.connection.end()
            self.connection = None

    def _lost(self, exc: Exception | None) -> None:
        if self.consumer is None:
            self.shut()
            self._pool.forget(self)
            return
        if exc is not None:
            reason = reason_of(exc)
        elif not self.got_bytes:
            reason = "closed without an answer"
        else:
            reason = "closed in the middle of the response"
        error = self._error(Disconnected, reason)
        error.__cause__ = exc
        self.fail(error)

    def _refuse(self, reason: str, cause: Exception | None = None) -> None:
        error = self._error(ProtocolViolation, reason)
        error.__cause__ = cause
        self.fail(error)

    def _consumer_raised(self, consumer: Consumer, cause: Exception) -> None:
        logger.error("%s: a callback of %s raised", self._pool.address, type(consumer).__name__, exc_info=cause)
        error = self._error(ConsumerFailed, f"our own callback raised {type(cause).__name__}")
        error.__cause__ = cause
        self.fail(error)

    def _error(self, kind: type[UpstreamError], reason: str, *, sent: bool = True) -> UpstreamError:
        return kind(
            self._pool.address,
            "body" if self._head_done else "head",
            reason,
            sent=sent,
            reused=self.served,
            got_bytes=self.got_bytes,
        )
