"""The checks every request head passes, the reply for what fails them, and the sweep over open connections."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from gateway.config import Server
from gateway.edges.hosts import HostList
from gateway.errors import GatewayError, InvalidRequest

SWEEP_EVERY_S = 0.25

_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)
"""RFC 9110 §7.2. Anything else (`a/x?y=`) has made others see another URL than the one that was checked."""


CHUNKED = -1
"""The length of a body that comes in chunks."""


_CHECKED = frozenset(
    {b"host", b"content-length", b"authorization", b"transfer-encoding", b"content-encoding", b"origin"}
)


def check_head(
    version: str, target: bytes, headers: list[tuple[bytes, bytes]], limits: Server, names: HostList | None = None
) -> int | GatewayError:
    """The length that the body is to have, or `CHUNKED`; or what is wrong with a request head beyond its syntax.
    `names`: those that it may ask for.

    Two of these headers mean that somebody in front of us may read the request differently, which is how requests are
    smuggled (RFC 9112 §11.2); there is no harmless reading of them.
    """
    if version not in ("1.1", "1.0"):
        return _problem(400, "This server speaks HTTP/1.1.", "unsupported_version")
    size = len(target)
    hosts = authorizations = lengths = encodings = length = 0
    foreign: GatewayError | None = None
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name not in _CHECKED:
            continue
        if name == b"host":
            hosts += 1
            if names is not None and value in names.seen:
                continue
            if not _HOST.fullmatch(value):
                return _problem(400, "The Host header is not a host name with an optional port.", "invalid_host")
            if names is not None:
                foreign = foreign or names.host_problem(value)
        elif name == b"content-length":
            lengths += 1
            length = int(value)
        elif name == b"authorization":
            authorizations += 1
        elif name == b"transfer-encoding":
            encodings += 1
            if value.lower() != b"chunked" or version != "1.1":
                return _problem(400, "The only transfer coding is chunked, and only in HTTP/1.1.", "invalid_framing")
        elif name == b"content-encoding" and value.lower() != b"identity":
            return _problem(415, "Compressed request bodies are not accepted.", "unsupported_encoding")
        elif names is not None and name == b"origin":
            foreign = foreign or names.origin_problem(value)
    if size > limits.max_header_bytes:
        return _problem(431, f"The request head is larger than {limits.max_header_bytes} bytes.", "headers_too_large")
    if len(headers) > limits.max_header_count:
        return _problem(431, f"The request has more than {limits.max_header_count} headers.", "too_many_headers")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return _problem(400, "A request must have exactly one Host header.", "invalid_host")
    if authorizations > 1:
        return _problem(400, "A request must not have two Authorization headers.", "duplicate_authorization")
    if lengths > 1 or encodings > 1 or (lengths and encodings):
        return _problem(400, "Content-Length must come once, and not beside Transfer-Encoding.", "invalid_framing")
    if foreign is not None:
        return foreign
    return CHUNKED if encodings else length


def _problem(status: int, message: str, code: str) -> InvalidRequest:
    problem = InvalidRequest(message, code=code)
    problem.status = status
    return problem


def refusal_bytes(problem: GatewayError, request_id: str) -> bytes:
    """A whole HTTP response that says what was wrong and closes the connection."""
    body = problem.body()
    hints = b"".join([b"%b: %b\r\n" % header for header in problem.headers()])
    return (
        b"%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%bconnection: close\r\n\r\n%b"
        % (STATUS_LINE[problem.status], len(body), request_id.encode(), hints, body)
    )


class Guarded(Protocol):
    """What the sweep needs to know of a connection."""

    transport: asyncio.Transport
    expires_at: float
    stalled_since: float | None
    unsent_bytes: int

    def expire(self) -> None: ...


class Sweep:
    """Closes connections whose phase took too long or whose client stopped reading. A member of the ticker."""

    def __init__(self, state: ServerState, write_stall_timeout_s: float) -> None:
        self._connections: set[Guarded] = state.connections  # type: ignore[assignment]
        self._write_stall_timeout_s = write_stall_timeout_s
        self._next_at = 0.0
        self.unsent_bytes = 0
        """What clients that read slowly had not fetched at the last look, all together."""

    def tick(self, now: float) -> None:
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + SWEEP_EVERY_S
        stalled_before = now - self._write_stall_timeout_s
        total_bytes = 0
        for connection in list(self._connections):
            if connection.stalled_since is not None:
                unsent_bytes = connection.transport.get_write_buffer_size()
                if unsent_bytes < connection.unsent_bytes:  # slow is not stalled
                    connection.stalled_since = now if unsent_bytes else None
                connection.unsent_bytes = unsent_bytes
                total_bytes += unsent_bytes
            if connection.stalled_since is not None and connection.stalled_since < stalled_before:
                connection.transport.abort()
            elif connection.expires_at < now:
                connection.expire()
        self.unsent_bytes = total_bytes
