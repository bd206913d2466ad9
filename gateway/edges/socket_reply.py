"""The protocol edge's reply: writes a response straight to the client's socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from gateway.reply import Headers
from gateway.runtime import Runtime

_JOIN_LIMIT_BYTES = 65_536
"""Up to here copying head and body together is cheaper than a second write."""


class _Unused:
    """uvicorn sets an event on the current cycle when the client goes; replies need none."""

    __slots__ = ()

    def set(self) -> None: ...


_UNUSED = _Unused()


class ClientConnection(Protocol):
    """What a reply needs of the connection it is written to."""

    transport: asyncio.Transport
    runtime: Runtime
    server_state: ServerState
    headers: Headers

    def on_response_complete(self) -> None: ...


class SocketReply:
    """A `Reply` that writes to the socket. Also what uvicorn's protocol sees as its current cycle."""

    __slots__ = (
        "_chunked",
        "_head",
        "_protocol",
        "body",
        "disconnected",
        "headers",
        "keep_alive",
        "message_event",
        "on_pause",
        "path",
        "response_complete",
        "started",
        "task",
    )

    def __init__(self, protocol: ClientConnection, path: str, *, keep_alive: bool, chunked: bool) -> None:
        self._protocol = protocol
        self._chunked = chunked
        self._head = b""
        self.path = path
        self.body: list[bytes] = []
        self.disconnected = False
        self.headers = protocol.headers
        self.keep_alive = keep_alive
        self.message_event = _UNUSED
        self.on_pause: Callable[[bool], None] | None = None
        self.response_complete = False
        self.started = False
        self.task: asyncio.Task[None] | None = None

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        if self.disconnected or self.started:
            return
        self.started = True
        head = self._render(status, headers, b"content-length: %d\r\n" % len(body))
        if len(body) <= _JOIN_LIMIT_BYTES:
            self._protocol.transport.write(head + body)
        else:
            self._protocol.transport.write(head)
            self._protocol.transport.write(body)
        self._complete()

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        if not self._chunked:
            self.keep_alive = False
        self._head = self._render(status, headers, b"transfer-encoding: chunked\r\n" if self._chunked else b"")

    def write(self, data: bytes) -> None:
        if self.disconnected:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data = self._head + data
            self._head = b""
        self._protocol.transport.write(data)

    def finish(self) -> None:
        if self.disconnected:
            return
        end = self._head + (b"0\r\n\r\n" if self._chunked else b"")
        if end:
            self._protocol.transport.write(end)
        self._complete()

    def forget(self, _: object) -> None:
        """Its task has ended in an error, whose traceback holds the request, which holds this: let go of it now.

        A request of 10 MB would wait for the garbage collector, which counts objects and not their size.
        """
        self.task = None

    def abort(self) -> None:
        self._protocol.transport.abort()

    def _render(self, status: int, headers: Headers, framing: bytes) -> bytes:
        protocol = self._protocol
        runtime = protocol.runtime
        if runtime.draining or runtime.overload.closing:
            self.keep_alive = False
        pieces = [STATUS_LINE[status]]
        for name, value in headers:
            pieces += (name, b": ", value, b"\r\n")
        for name, value in protocol.server_state.default_headers:
            pieces += (name, b": ", value, b"\r\n")
        pieces.append(framing)
        pieces.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(pieces)

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._protocol.transport.close()
        self._protocol.on_response_complete()
