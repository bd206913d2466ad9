"""The client-facing connection: a strict, bounded HTTP/1.1 server protocol, and the fast edge for inference routes.

It is uvicorn's httptools protocol with two additions. Every connection is guarded: deadlines for the head, the body, a
stalled reader and an idle connection; ceilings on head, headers and body; one `Host`, one `Authorization`, never
`Content-Length` beside `Transfer-Encoding`. And a POST to an inference path does not become an ASGI scope: its body is
collected here and given to `gateway.exchange.serve` with a reply that writes to the socket. All other routes, and all
routes when `server.edge` is `asgi`, take uvicorn's way.

The reply stands where uvicorn keeps its request-response cycle, so pipelining, keep-alive and shutdown are uvicorn's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from math import inf
from typing import Any, NoReturn

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.edges.guards import CHUNKED, check_head, refusal_bytes
from gateway.edges.socket_reply import SocketReply
from gateway.errors import BodyTooLarge, GatewayError, InvalidRequest, Overloaded, RequestTimeout
from gateway.exchange import serve
from gateway.inspection.door import PATH
from gateway.inspection.front import shows_secret
from gateway.keys.failures import network_of
from gateway.order import INFERENCE_PATHS, Call
from gateway.runtime import Runtime

_PLAYGROUND = PATH.encode()
_HOT_PATHS = {path.encode(): path for path in INFERENCE_PATHS}
WRITE_BUFFER_BYTES = 32_768
"""What waits in our memory for a client before its source is paused; half of asyncio's own. The kernel has a buffer too
(`SEND_BUFFER_BYTES`), so that nobody who reads notices; of those who do not there may be thousands."""
_LAST_READ_S = 2.0
"""How long a refused client may go on sending. Closing at once would be a reset, and take the refusal with it."""
_MAX_PIPELINED = 100
"""Requests that may wait behind the one being answered. Reading goes on meanwhile, to see the client go."""
_FIRST_TAKE_BYTES = 65_536
"""What a declared length takes of the byte budget at once. The rest is taken as it comes: a claim holds no memory."""


class _Refused(Exception):
    """Stops the parser from inside a callback; the reason is in `GatewayProtocol._refusal`."""


class GatewayProtocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self,
        runtime: Runtime,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # uvicorn's parser tolerates data after `Connection: close`; ours is the strict one.
        self.parser = httptools.HttpRequestParser(self)
        self.runtime = runtime
        self.limits = runtime.settings.server
        self.expires_at = inf
        """When this phase of the connection must be over, in `time.monotonic()` seconds."""
        self.stalled_since: float | None = None
        """Since when the client has not read what waits for it."""
        self.unsent_bytes = 0
        """What waited for it when the sweep last came by."""
        self._counted = ""
        """The address that this connection counts for, where connections of one address are limited."""
        self._open: deque[Any] = deque()
        """The requests not yet answered, in order: `SocketReply` or uvicorn's cycle. The first is being answered."""
        self._hot = self.limits.edge == "protocol"
        self._reply: SocketReply | None = None
        self._refusal: GatewayError | None = None
        self._idle = True
        self._in_head = True
        self._reading = False
        self._answered_early = False
        self._advanced = False
        self._framing_bytes = 0
        self._body_bytes = 0
        self._body_budget_bytes = 0
        self._budget_bytes = 0
        self._began_at = 0.0

    # Life of the connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self.expires_at = time.monotonic() + self.limits.header_timeout_s
        if len(self.connections) > (self.runtime.overload.max_connections or self.limits.max_connections):
            self._refuse(Overloaded("This gateway has as many connections as it takes.", retry_after_s=1.0))
            self.transport.close()
        elif self.limits.max_connections_per_address is not None and self.client is not None:
            self._count(network_of(self.client[0]), self.limits.max_connections_per_address)

    def _count(self, network: str, limit: int) -> None:
        """One more connection of this address, if it may have another one."""
        counts = self.runtime.connections_of
        if counts[network] >= limit:
            self._refuse(Overloaded("Your address has as many connections as it may.", retry_after_s=1.0))
            self.transport.close()
            return
        counts[network] += 1
        self._counted = network

    def connection_lost(self, exc: Exception | None) -> None:
        if self._counted:
            counts = self.runtime.connections_of
            counts[self._counted] -= 1
            if not counts[self._counted]:
                del counts[self._counted]
            self._counted = ""
        self.expires_at = inf
        self.stalled_since = None
        super().connection_lost(exc)
        self._release_budget()
        self._drop_open()

    def _drop_open(self) -> None:
        """Nobody can be answered any more. (uvicorn would tell the last one only.)"""
        self.pipeline.clear()
        for waiting in self._open:
            waiting.disconnected = True
            waiting.message_event.set()
            # Not left to the garbage collector: request and connection refer to each other, and the bytes are in
            # nobody's budget any more.
            waiting.body = [] if isinstance(waiting, SocketReply) else b""
            if isinstance(waiting, SocketReply) and waiting.task is not None:
                waiting.task.add_done_callback(waiting.forget)
                waiting.task.cancel()
        self._open.clear()

    def eof_received(self) -> None:
        """The client has closed its side. Whoever asks and does not wait has left, read our bytes or not."""
        if self._open:
            self.transport.abort()

    def expire(self) -> None:
        """The current phase took too long: close, and say so where a request had begun."""
        if self._refusal is not None or self.transport.is_closing():
            self.transport.abort()
        elif self._answering():
            self.expires_at = inf  # the next request may be slow as long as this one's answer takes
        elif self._idle and self.stalled_since is not None:
            self.expires_at = time.monotonic() + self.limits.keep_alive_s  # it still fetches the last answer
        elif self._idle or (self._in_head and not self._framing_bytes):
            self.transport.close()
        else:
            phase, limit = (
                ("head", self.limits.header_timeout_s) if self._in_head else ("body", self.limits.body_timeout_s)
            )
            self._refuse(RequestTimeout(f"The request's {phase} did not arrive within {limit:g} s."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unsent()
        self._pause_reply(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled_since = None
        if not self._open:
            self._watch_unsent()
        self._pause_reply(False)

    def _watch_unsent(self) -> None:
        """What waits for the client from now on has to keep moving."""
        self.unsent_bytes = self.transport.get_write_buffer_size()
        if self.unsent_bytes and self.stalled_since is None:
            self.stalled_since = time.monotonic()

    def _pause_reply(self, paused: bool) -> None:
        first = self._open[0] if self._open else None
        if isinstance(first, SocketReply) and first.on_pause is not None:
            first.on_pause(paused)

    # From bytes to a call.

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._idle:
            self._begin()
        self._advanced = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._reason())
            return
        if self._advanced:
            self._framing_bytes = 0
            return
        # Neither the end of a head nor a byte of body: a long head, trailers, chunk extensions, empty lines.
        self._framing_bytes += len(data)
        if self._framing_bytes > self.limits.max_header_bytes:
            self._refuse(self._head_too_large())

    def _reason(self) -> GatewayError:
        """Why the parser stopped: our own refusal from a callback, or broken syntax."""
        return self._refusal or InvalidRequest("This is not a valid HTTP/1.1 request.", code="invalid_http")

    def _begin(self) -> None:
        """The first byte of a request on an idle connection."""
        self._idle = False
        self._in_head = True
        self._framing_bytes = 0
        self.expires_at = time.monotonic() + self.limits.header_timeout_s

    def on_message_begin(self) -> None:
        if self._idle:  # it comes in one piece with the end of one that was answered early
            self._begin()
        # uvicorn's part, the ASGI scope, is made only for requests that need one.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._began_at = time.monotonic()
        self._in_head = True
        self._reading = True
        self._answered_early = False
        self._body_bytes = 0
        self._body_budget_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._advanced = True
        version = self.parser.get_http_version()
        length = check_head(version, self.url, self.headers, self.limits, self.runtime.hosts)
        if isinstance(length, GatewayError):
            self._stop(length)
        if self.parser.should_upgrade():
            self._stop(InvalidRequest("Protocol upgrades are not served here.", code="upgrade_refused"))
        if length > self.limits.max_body_bytes:
            self._stop(self._body_too_large())
        if len(self._open) > _MAX_PIPELINED:
            self._stop(InvalidRequest("Too many pipelined requests.", code="too_many_requests"))
        large = length == CHUNKED or length > _FIRST_TAKE_BYTES
        if large or (length and self.runtime.body_budget.scarce):
            self._know_who_sends_it(large)
        if length > 0:
            self._take_budget(min(length, _FIRST_TAKE_BYTES))
        self.expires_at = time.monotonic() + self.limits.body_timeout_s
        path = _HOT_PATHS.get(self.url)
        hot = self._hot or version == "1.0"  # to which uvicorn would send chunks
        if path is None or not hot or self._open or self.parser.get_method() != b"POST":
            self._reply = None
            self._to_asgi()
            self._open.append(self.cycle)
            self.headers = []  # trailers would be added to the head that has been checked
            if self.pipeline:
                self.flow.resume_reading()
            return
        self._reply = SocketReply(
            self,
            path,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            chunked=version != "1.0",
        )
        self.cycle = self._reply  # type: ignore[assignment]
        self._open.append(self._reply)
        self.headers = []
        if self.expect_100_continue and version != "1.0":  # which knows no interim responses
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _know_who_sends_it(self, large: bool) -> None:
        """A body that may be large is only taken from a caller who is known: others could fill the byte budget. And it
        is not taken at all when its class is shed; what is small is read first, so that there is a record of it."""
        secret = self.runtime.trial_secret
        if secret and self.url.startswith(_PLAYGROUND) and shows_secret(secret, self.headers):
            return
        try:
            caller = self.runtime.gate.identify(self.headers, self.client)
            if large and self.runtime.overload.level:
                self.runtime.overload.check_unread(caller, self.headers)
        except GatewayError as problem:
            self._stop(problem)

    def _to_asgi(self) -> None:
        """Hand the request to uvicorn, which starts on a message and ends on the headers being complete."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url = url
        self.headers += headers
        self.expect_100_continue = expects
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.max_body_bytes:
            self._stop(self._body_too_large())
        if self._body_bytes > self._body_budget_bytes:
            self._take_budget(self._body_bytes - self._body_budget_bytes)
        reply = self._reply
        if reply is None:
            super().on_body(body)
            if self.pipeline:
                self.flow.resume_reading()
        else:
            reply.body.append(body)

    def on_message_complete(self) -> None:
        self._reading = False
        self._advanced = True
        self.expires_at = inf
        reply = self._reply
        if reply is None:
            super().on_message_complete()
            if self._answered_early:
                self._release_budget()
                self._rest()
            return
        body = reply.body[0] if len(reply.body) == 1 else b"".join(reply.body)
        reply.body = []
        call = Call(reply.path, reply.headers, body, self._began_at, self.client)
        reply.task = self.loop.create_task(serve(call, reply, self.runtime))

    def on_response_complete(self) -> None:
        """The reply to the current request is written: serve the next one, or wait for it."""
        self._reply = None
        if self._open:
            self._open.popleft()
        if not self._open:
            self._release_budget()
            self._watch_unsent()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        if self._reading:
            self._answered_early = not self._open and not self._in_head
            limit_s = self.limits.header_timeout_s if self._in_head else self.limits.body_timeout_s
            self.expires_at = time.monotonic() + limit_s
        elif not self._open:
            self._rest()

    def _rest(self) -> None:
        """Nothing is under way: wait for the next request."""
        self._idle = True
        self.expires_at = time.monotonic() + self.limits.keep_alive_s

    # Refusals below the API.

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    def _stop(self, problem: GatewayError) -> NoReturn:
        self._refusal = problem
        raise _Refused

    def _refuse(self, problem: GatewayError) -> None:
        """Answer and close, whatever was under way on this connection."""
        self._refusal = problem
        self.expires_at = time.monotonic() + _LAST_READ_S
        self._release_budget()
        if self._answering():
            # What is wrong came after a whole request whose answer is under way: there is no place for another one.
            self.transport.abort()
        elif self._answered_early:  # one request never gets two answers
            self.transport.close()
        elif not self.transport.is_closing():
            self._drop_open()
            self.runtime.metrics.refused(problem.status)
            self.transport.write(refusal_bytes(problem, self.runtime.new_request_id()))
            self.transport.write_eof()

    def _answering(self) -> bool:
        """Whether the oldest open request has come whole, so that its answer may be on its way."""
        if not self._open:
            return False
        first = self._open[0]
        return first.task is not None if isinstance(first, SocketReply) else not first.more_body

    def _take_budget(self, size_bytes: int) -> None:
        if not self.runtime.body_budget.take(size_bytes):
            self._stop(Overloaded("This gateway holds as many request bytes as it can.", retry_after_s=1.0))
        self._budget_bytes += size_bytes
        self._body_budget_bytes += size_bytes

    def _release_budget(self) -> None:
        self.runtime.body_budget.give_back(self._budget_bytes)
        self._budget_bytes = 0

    def _body_too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than {self.limits.max_body_bytes} bytes.")

    def _head_too_large(self) -> InvalidRequest:
        problem = InvalidRequest(
            f"The request head is larger than {self.limits.max_header_bytes} bytes.", code="headers_too_large"
        )
        problem.status = 431
        return problem
