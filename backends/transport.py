"""httpx2's API on top of the lean client: `httpx2.AsyncClient(transport=LeanTransport(), trust_env=False)`.

For everything that is not the hot path: probes, aborts, admin calls. It gives up a part of the client's speed
for the convenience of requests and responses as objects.

What differs from httpx2's own transport: no proxies, no HTTP/2; a request body is read into memory before it
is sent; the `write` time-out is not looked at (a server that does not read does not answer, so `read` ends
it); a kept-alive connection that dies without a byte of answer is replaced once, silently.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator
from math import inf
from typing import Final

import httpx2

from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    PoolTimeout,
    UpstreamError,
)
from backends.http1 import Connection, Headers
from backends.origin import DEFAULT_PORTS, Origin
from backends.pool import ConnectionPool
from backends.ticker import Ticker

# The reader of a response holds about this much, plus one socket read, before the socket is left alone.
HIGH_WATER_BYTES: Final = 65536

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_FINAL_DOT = re.compile(rb"\.(?=:\d+$|$)")  # of an absolute name, which is for the resolver: see `Origin`
_FORBIDDEN = re.compile(rb"[\x00\r\n]")  # RFC 9110 5.5: would end the header early


class LeanTransport(httpx2.AsyncBaseTransport):
    """One pool per origin, for up to `max_origins` of them; the one unused for longest makes room.

    With `uds` all requests go to that unix socket, whatever host they name. Belongs to one event loop.
    """

    def __init__(
        self,
        *,
        uds: str | None = None,
        max_connections: int = 100,
        idle_s: float = 3.0,
        max_origins: int = 64,
        ssl_context: ssl.SSLContext | None = None,
        ticker: Ticker | None = None,
    ) -> None:
        self._uds = uds
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._max_origins = max_origins
        self._ssl_context = ssl_context
        self._ticker = Ticker() if ticker is None else ticker
        self._pools: dict[Origin, ConnectionPool] = {}  # in the order of their last use

    def __repr__(self) -> str:
        return f"<LeanTransport {list(self._pools.values())}>"

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        origin = self._origin_of(request)
        data = await _serialise(request)
        try:
            exchange = await self._exchange(self._pool_for(origin), data, request)
        except UpstreamError as error:
            raise _translated(error, request) from error
        return httpx2.Response(
            exchange.status,
            headers=exchange.headers,
            stream=_Body(exchange, request),
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def _exchange(self, pool: ConnectionPool, data: list[bytes], request: httpx2.Request) -> _Exchange:
        """Send and wait for the head; once more if the connection turned out to be stale."""
        timeouts = request.extensions.get("timeout", {})
        pool_s, connect_s, read_s = (_or_inf(timeouts.get(phase)) for phase in ("pool", "connect", "read"))
        method = request.method.encode("ascii")
        retried = False
        while True:
            connection = await pool.acquire(pool_s, connect_timeout_s=connect_s)
            exchange = _Exchange(connection)
            connection.send(data, exchange, head_timeout_s=read_s, idle_timeout_s=read_s, method=method)
            try:
                await exchange.head()
            except UpstreamError as error:
                if retried or not error.retry_safe:
                    raise
                retried = True
            except BaseException:  # cancelled: the server must learn of it now
                connection.detach()
                raise
            else:
                return exchange

    async def aclose(self) -> None:
        pools = list(self._pools.values())
        self._pools.clear()
        for pool in pools:
            await pool.aclose(force=True)

    def _origin_of(self, request: httpx2.Request) -> Origin:
        url = request.url
        if url.scheme not in ("http", "https") or (url.scheme == "https" and self._uds is not None):
            raise httpx2.UnsupportedProtocol(f"cannot request {url.scheme or 'no scheme'}://", request=request)
        if self._uds is not None:
            return Origin("http+unix", "localhost", 0, self._uds)
        host = url.raw_host.decode("ascii").strip("[]")
        if not host:
            raise httpx2.UnsupportedProtocol("the URL names no host", request=request)
        return Origin(url.scheme, host, url.port or DEFAULT_PORTS[url.scheme])

    def _pool_for(self, origin: Origin) -> ConnectionPool:
        pool = self._pools.pop(origin, None)
        if pool is None:
            if len(self._pools) >= self._max_origins:
                oldest = next(iter(self._pools))
                self._pools.pop(oldest).close_when_idle()
            pool = ConnectionPool(
                origin,
                max_connections=self._max_connections,
                idle_s=self._idle_s,
                ssl_context=self._ssl_context,
                ticker=self._ticker,
            )
        self._pools[origin] = pool
        return pool


class _Exchange:
    """A consumer that lets one coroutine wait for what is pushed, and holds the connection back for it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.status = 0
        self.headers: Headers = []
        self._chunks: deque[bytes] = deque()
        self._held_bytes = 0
        self._ended = False
        self._error: UpstreamError | None = None
        self._change = asyncio.Event()

    def on_head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers
        self._change.set()

    def on_data(self, data: bytes) -> None:
        self._chunks.append(data)
        self._held_bytes += len(data)
        if self._held_bytes >= HIGH_WATER_BYTES:
            self.connection.pause_reading()
        self._change.set()

    def on_end(self) -> None:
        self._ended = True
        self._change.set()

    def on_error(self, error: UpstreamError) -> None:
        self._error = error
        self._change.set()

    async def head(self) -> None:
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._changed()

    async def chunk(self) -> bytes | None:
        """The next piece of body, None at the end. What arrived before an error comes before it."""
        while not self._chunks:
            if self._ended:
                return None
            if self._error is not None:
                raise self._error
            await self._changed()
        data = self._chunks.popleft()
        self._held_bytes -= len(data)
        if not self._chunks:
            self.connection.resume_reading()
        return data

    async def _changed(self) -> None:
        self._change.clear()
        await self._change.wait()


class _Body(httpx2.AsyncByteStream):
    """The response body, as httpx2 wants to iterate and close it."""

    def __init__(self, exchange: _Exchange, request: httpx2.Request) -> None:
        self._exchange = exchange
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while (data := await self._exchange.chunk()) is not None:
                yield data
        except UpstreamError as error:
            raise _translated(error, self._request) from error
        finally:
            self._exchange.connection.detach()  # nothing, when the response is complete

    async def aclose(self) -> None:
        self._exchange.connection.detach()


async def _serialise(request: httpx2.Request) -> list[bytes]:
    """Head and body as bytes; the body whole, with its length."""
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    body = b"".join([chunk async for chunk in request.stream])
    method = request.method.encode("ascii", "replace")
    target = request.extensions.get("target", request.url.raw_path)
    if not _TOKEN.fullmatch(method) or re.search(rb"[\x00-\x20\x7f]", target):
        raise httpx2.LocalProtocolError("malformed method or request target", request=request)
    lines = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    announced = None
    for name, value in request.headers.raw:
        if not _TOKEN.fullmatch(name) or _FORBIDDEN.search(value):
            raise httpx2.LocalProtocolError(f"malformed header {name!r}", request=request)
        lowered = name.lower()
        if lowered == b"content-length":
            announced = value
        elif lowered == b"transfer-encoding":
            announced = b"%d" % len(body)
        else:
            if lowered == b"host":
                value = _FINAL_DOT.sub(b"", value, count=1)
            lines.append(b"%b: %b\r\n" % (name, value))
    if announced is not None:
        if announced != b"%d" % len(body):
            raise httpx2.LocalProtocolError("the body is not as long as its content-length", request=request)
        lines.append(b"content-length: %b\r\n" % announced)
    lines.append(b"\r\n")
    return [b"".join(lines), body] if body else [b"".join(lines)]


def _or_inf(timeout_s: float | None) -> float:
    return inf if timeout_s is None else timeout_s


def _translated(error: UpstreamError, request: httpx2.Request) -> httpx2.TransportError:
    """The httpx2 exception that says the same."""
    kind: type[httpx2.TransportError]
    match error:
        case ConnectTimeout():
            kind = httpx2.ConnectTimeout
        case ConnectFailed():
            kind = httpx2.ConnectError
        case PoolTimeout():
            kind = httpx2.PoolTimeout
        case HeadTimeout() | IdleTimeout():
            kind = httpx2.ReadTimeout
        case Disconnected() if isinstance(error.__cause__, OSError):
            kind = httpx2.ReadError
        case UpstreamError(fault="gateway"):
            kind = httpx2.CloseError
        case _:  # a violation, or an end of stream in the wrong place, which is one as well
            kind = httpx2.RemoteProtocolError
    return kind(str(error), request=request)
