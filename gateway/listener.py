"""Listening sockets, and uvicorn run as a part of our own life cycle instead of as its owner."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from starlette.types import ASGIApp

from gateway.edges.strict import StrictProtocol

if TYPE_CHECKING:
    from gateway.edges.guards import Sweep
    from gateway.runtime import Runtime

SEND_BUFFER_BYTES = 262_144
"""Kernel buffer per client. Left to itself Linux lets a client that never reads hold megabytes of it."""
BACKLOG = 2048
MAX_OPERATORS = 200
"""Connections to the admin listener at once."""
FIRST_HEAD_S = 10.0
"""How long an operator's connection may take to send a request's head: the first from the beginning of the connection,
later ones from their first byte."""
BODY_S = 60.0
"""And for what comes after the head."""
UDS_MODE = 0o660


class BindError(Exception):
    """An address cannot be listened on; the message says which one, why, and what to do."""


def bind_tcp(host: str, port: int, setting: str) -> socket.socket:
    """A bound (not yet listening) socket. `setting` names the configuration key in the error."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        hint = (
            " Another program is using it; stop that one or choose another port."
            if error.errno == errno.EADDRINUSE
            else ""
        )
        raise BindError(f"{setting}: cannot listen on {host}:{port}: {reason}.{hint}") from error
    sock.setblocking(False)
    return sock


def bind_uds(path: str, setting: str) -> socket.socket:
    """A bound Unix socket, readable and writable by owner and group. A stale file of a dead process is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise BindError(f"{setting}: {path} exists and is not a socket; remove it or choose another path.")
            if _answers(path):
                raise BindError(f"{setting}: another process is listening on {path}.")
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, UDS_MODE)
    except OSError as error:
        sock.close()
        raise BindError(f"{setting}: cannot listen on {path}: {error.strerror or error}.") from error
    except BindError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


class Listener(uvicorn.Server):
    """One listener. Signals are the life cycle's business, not its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        """Set once it accepts connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def open_connections(self) -> int:
        return len(self.server_state.connections)

    def stop_accepting(self) -> None:
        """Close the listening sockets and the idle connections; busy ones close after their reply."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def cut(self) -> None:
        """Drop every connection that is still open."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def inference_listener(app: ASGIApp, runtime: Runtime) -> tuple[Listener, Sweep]:
    """The guarded listener for clients, and the sweep that enforces its deadlines."""
    # Here, since the supervising process uses the rest of this module and nothing of the request path.
    from gateway.edges.guards import Sweep
    from gateway.edges.protocol import GatewayProtocol

    protocol = functools.partial(GatewayProtocol, runtime)
    listener = Listener(_config(app, cast("type[asyncio.Protocol]", protocol)))
    return listener, Sweep(listener.server_state, runtime.settings.server.write_stall_timeout_s)


class OperatorProtocol(StrictProtocol):
    """For few: whoever can connect may not take the descriptors that clients need."""

    _due: asyncio.TimerHandle | None = None
    """When what has begun must have come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_OPERATORS:
            transport.close()
        else:
            self._expect(FIRST_HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._due is None:  # uvicorn's keep-alive time-out ends with the first byte
            self._expect(FIRST_HEAD_S)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._expect(FIRST_HEAD_S)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._expect(BODY_S)

    def on_message_complete(self) -> None:
        self._expect(None)
        super().on_message_complete()

    def _expect(self, within_s: float | None) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = None if within_s is None else self.loop.call_later(within_s, self._too_late)

    def _too_late(self) -> None:
        self._due = None
        if self.in_head and self.answering:
            self._expect(FIRST_HEAD_S)  # the next request may be slow as long as this one's answer takes
        else:
            self.transport.close()


def admin_listener(app: ASGIApp) -> Listener:
    """A plain listener for operators."""
    return Listener(_config(app, OperatorProtocol))


def _config(app: ASGIApp, http: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=2,
    )


def listen(sockets: Sequence[socket.socket]) -> None:
    """Start the kernel's queue now, so that nobody is refused between binding and serving."""
    for sock in sockets:
        sock.listen(BACKLOG)
