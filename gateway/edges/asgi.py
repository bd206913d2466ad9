"""The reference edge: inference routes as a raw ASGI endpoint.

Not a `Request -> Response` function: with a streaming response object the body would run after the handler has
returned, and clean-up would drift into generator finalisation. Here one task runs the exchange, one watches
`receive()` for the client's going, and the endpoint itself pumps what the exchange writes into `send()`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from gateway.errors import BodyTooLarge
from gateway.exchange import serve
from gateway.inspection.trial import Trial
from gateway.order import Call
from gateway.reply import Headers
from gateway.runtime import Runtime

HIGH_WATER_BYTES = 65_536
LOW_WATER_BYTES = 16_384


class AsgiReply:
    """A `Reply` whose writes wait in a queue until the pump has sent them."""

    def __init__(self) -> None:
        self.started = False
        self.on_pause: Callable[[bool], None] | None = None
        self._queue: deque[Message] = deque()
        self._queued_bytes = 0
        self._paused = False
        self._wake = asyncio.Event()
        self._ended = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        if self._ended or self.started:
            return
        self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        self._put({"type": "http.response.body", "body": body, "more_body": False}, len(body))
        self._ended = True

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self._put({"type": "http.response.start", "status": status, "headers": headers}, 0)

    def write(self, data: bytes) -> None:
        self._put({"type": "http.response.body", "body": data, "more_body": True}, len(data))

    def finish(self) -> None:
        self._put({"type": "http.response.body", "body": b"", "more_body": False}, 0)
        self._ended = True

    def abort(self) -> None:
        """Stop writing; the pump ends, and the server closes a response that was left incomplete."""
        self._ended = True
        self._queue.clear()
        self._wake.set()

    async def pump(self, send: Send) -> None:
        """Send what is written, in order, until the reply has ended."""
        while True:
            while self._queue:
                message = self._queue.popleft()
                await send(message)
                self._queued_bytes -= len(message.get("body", b""))
                if self._paused and self._queued_bytes <= LOW_WATER_BYTES:
                    self._pause(False)
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def _put(self, message: Message, size_bytes: int) -> None:
        if self._ended:
            return
        self._queue.append(message)
        self._queued_bytes += size_bytes
        self._wake.set()
        if not self._paused and self._queued_bytes > HIGH_WATER_BYTES:
            self._pause(True)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self.on_pause is not None:
            self.on_pause(paused)


class InferenceEndpoint:
    """An ASGI application for one inference route."""

    def __init__(
        self,
        runtime: Runtime,
        path_of: Callable[[Scope], str] | None = None,
        trial_of: Callable[[Scope], Trial] | None = None,
    ) -> None:
        """Of the gateway's own playground, both: the path of the API that a request is for, and how it is treated."""
        self._runtime = runtime
        self._path_of = path_of
        self._trial_of = trial_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_at = time.monotonic()
        reply = AsgiReply()
        body = await self._read(receive)
        if body is None:
            return
        headers: Headers = list(scope["headers"])
        path = scope["path"] if self._path_of is None else self._path_of(scope)
        trial = None if self._trial_of is None else self._trial_of(scope)
        call = Call(path, headers, body, received_at, scope["client"], trial)
        exchange = asyncio.create_task(serve(call, reply, self._runtime))
        watch = asyncio.create_task(_watch(receive, exchange, reply))
        try:
            await reply.pump(send)
        except BaseException:
            exchange.cancel()
            raise
        finally:
            watch.cancel()
            await asyncio.gather(exchange, watch, return_exceptions=True)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None when the client left before it had come."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._runtime.settings.server.max_body_bytes:
                # Under our own server the protocol has refused it before.
                raise BodyTooLarge("The request body is too large.")
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)


async def _watch(receive: Receive, exchange: asyncio.Task[None], reply: AsgiReply) -> None:
    """Cancel the exchange when the client goes."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            exchange.cancel()
            reply.abort()
            return
