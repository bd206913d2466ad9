"""Connections to one model server, shared between requests: last in, first out.

Every decision here is synchronous; the only awaits are for a connection to be made and for a turn to get one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from math import isfinite
from time import monotonic

from backends.addresses import Addresses, connect_first
from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    OutOfSockets,
    PoolClosed,
    PoolTimeout,
    UpstreamError,
    reason_of,
)
from backends.http1 import Connection, Wire
from backends.origin import Origin
from backends.ticker import Ticker


class _Waiter:
    """One acquire() in the queue. Its future yields a wire, or None: a slot is reserved, open one."""

    __slots__ = ("deadline", "future")

    def __init__(self, future: asyncio.Future[Wire | None], deadline: float) -> None:
        self.future = future
        self.deadline = deadline


class ConnectionPool:
    """Up to `max_connections` connections to one origin; idle ones are kept for `idle_s`.

    Last in, first out, so that a pool larger than the load needs shrinks by itself. Belongs to the event loop
    it is first used in. `idle_s` must be below the server's own keep-alive time-out (uvicorn: 5 s), else both
    sides race for the last moment.

    Invariants: idle + active <= max_connections, where `active` counts connections being made as well; and
    while anybody waits, nothing is idle and no slot is free.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        max_connections: int = 1024,
        idle_s: float = 3.0,
        connect_timeout_s: float = 2.0,
        ssl_context: ssl.SSLContext | None = None,
        ticker: Ticker | None = None,
    ) -> None:
        if max_connections < 1:
            raise ValueError("max_connections must be at least 1")
        self.origin = origin
        self.address = origin.address
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._connect_timeout_s = connect_timeout_s
        self._ssl = (ssl_context or _default_ssl_context()) if origin.tls else None
        self._addresses = Addresses(origin.host, origin.port)
        self._ticker = Ticker() if ticker is None else ticker
        self.on_connect: Callable[[float], None] | None = None
        """Told how long a connection took to open, in seconds: a round trip, or two with TLS, and what delayed it."""
        self._loop: asyncio.AbstractEventLoop | None = None
        # The whole mutable state. Each wire is in one of the two; the idle ones in the order of their last
        # use, which is their value (loop time).
        self._idle: dict[Wire, float] = {}
        self._active: set[Wire] = set()
        self._connecting = 0
        self._waiters: deque[_Waiter] = deque()
        self._closing = False
        self._drained = asyncio.Event()

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def active(self) -> int:
        """Connections that carry an exchange, are acquired for one, or are being made."""
        return len(self._active) + self._connecting

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @property
    def closing(self) -> bool:
        return self._closing

    def __repr__(self) -> str:
        counts = f"idle={self.idle} active={self.active} waiting={self.waiting}"
        return f"<ConnectionPool {self.address} {counts}{' closing' if self._closing else ''}>"

    # -- getting a connection

    def acquire_nowait(self) -> Connection | None:
        """The idle connection used last, if there is one that is fresh enough."""
        if not self._idle:
            return None
        assert self._loop is not None
        wire, since = self._idle.popitem()
        now = self._loop.time()
        if now - since >= self._idle_s:
            self._idle[wire] = since
            self._expire_idle(now)
            return None
        self._active.add(wire)
        return Connection(wire)

    async def acquire(self, timeout_s: float, *, connect_timeout_s: float | None = None) -> Connection:
        """An idle connection, else a new one, else the next that becomes free, first come, first served.

        `timeout_s` bounds the wait for a free one only; making one takes up to `connect_timeout_s` (default:
        the pool's). Raises `ConnectFailed`, `OutOfSockets`, `PoolTimeout` or `PoolClosed`, all before anything was
        sent.
        """
        while True:
            connection = self.acquire_nowait()
            if connection is not None:
                return connection
            if self._closing:
                raise PoolClosed(self.address, "pool", "closing")
            if len(self._idle) + self.active < self._max_connections:
                self._connecting += 1
                return await self._open(connect_timeout_s)
            wire = await self._wait(timeout_s)
            if wire is None:
                return await self._open(connect_timeout_s)
            if not wire.closed:
                return Connection(wire)
            # It died between being handed over and our waking up; its slot is free again.

    async def _wait(self, timeout_s: float) -> Wire | None:
        if timeout_s <= 0:
            raise self._pool_timeout()
        loop = self._the_loop()
        waiter = _Waiter(loop.create_future(), loop.time() + timeout_s)
        self._waiters.append(waiter)
        self._ticker.add(self)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise

    def _give_back(self, waiter: _Waiter) -> None:
        """The waiter was cancelled: leave the queue, or pass on what it was just given."""
        future = waiter.future
        if future.cancelled():
            # Already gone from the queue if a connection was offered to others in the meantime.
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        elif future.exception() is None:
            wire = future.result()
            if wire is None:
                self._connecting -= 1
                self._slot_freed()
            elif not wire.closed:
                self.release(wire, reusable=True)

    async def _open(self, connect_timeout_s: float | None) -> Connection:
        """Make a connection; a slot is already reserved in `_connecting`."""
        limit_s = self._connect_timeout_s if connect_timeout_s is None else connect_timeout_s
        loop = self._the_loop()
        self._ticker.add(self)
        wire = Wire(self, loop)
        made = False
        try:
            begun = monotonic()  # uvloop's own time has whole milliseconds
            async with asyncio.timeout(limit_s if isfinite(limit_s) else None):
                await self._dial(loop, wire)
            if self.on_connect is not None:
                self.on_connect(monotonic() - begun)
            if self._closing:
                raise PoolClosed(self.address, "connect", "closing")
            if wire.closed:
                raise ConnectFailed(self.address, "connect", "closed as soon as it was opened")
            made = True
        except TimeoutError as error:
            # With an errno it is the kernel that gave up (ETIMEDOUT), without one it is us.
            reason = "timed out" if error.errno else f"timed out after {limit_s:g} s"
            raise ConnectTimeout(self.address, "connect", reason) from error
        except (OSError, UnicodeError) as error:  # the latter: a name that no resolver takes
            if isinstance(error, OSError) and error.errno in OutOfSockets.NUMBERS:
                raise OutOfSockets(self.address, "connect", reason_of(error)) from error
            raise ConnectFailed(self.address, "connect", reason_of(error)) from error
        finally:
            self._connecting -= 1
            if made:
                self._active.add(wire)
            else:
                wire.shut()
                self._slot_freed()
        return Connection(wire)

    async def _dial(self, loop: asyncio.AbstractEventLoop, wire: Wire) -> None:
        origin = self.origin
        if origin.uds is not None:
            await loop.create_unix_connection(lambda: wire, origin.uds)
            return
        addresses = await self._addresses.get()
        name = None if self._ssl is None else origin.server_name
        try:
            sock = await connect_first(addresses)
        except BaseException:  # running out of time is one of the ways
            self._addresses.doubt()
            raise
        await loop.create_connection(lambda: wire, sock=sock, ssl=self._ssl, server_hostname=name)

    def _the_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    # -- getting it back (called by wires)

    def release(self, wire: Wire, *, reusable: bool) -> None:
        """An exchange is over: keep the connection, hand it to whoever waits longest, or close it."""
        if not reusable or self._closing:
            wire.shut()
            self.forget(wire)
            return
        waiter = self._next_waiter() if self._waiters else None
        if waiter is not None:
            self._active.add(wire)
            waiter.future.set_result(wire)
            return
        self._active.discard(wire)
        assert self._loop is not None
        self._idle[wire] = self._loop.time()

    def forget(self, wire: Wire) -> None:
        """The socket is closed: its slot is free. Wires that were never counted are ignored."""
        if wire in self._active:
            self._active.remove(wire)
        elif self._idle.pop(wire, None) is None:
            return
        self._slot_freed()

    def _slot_freed(self) -> None:
        waiter = self._next_waiter()
        if waiter is not None:
            self._connecting += 1
            waiter.future.set_result(None)
        elif not self._active and not self._idle and not self._connecting:
            self._drained.set()

    def _next_waiter(self) -> _Waiter | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                return waiter
        return None

    # -- time

    def tick(self, now: float) -> None:
        """Time out what is overdue and close what has been idle for too long. Called by the ticker."""
        for wire in [wire for wire in self._active if wire.deadline <= now]:
            if wire.deadline <= now:  # a callback of the one before may have ended this one
                wire.time_out()
        self._expire_idle(now)
        for waiter in [waiter for waiter in self._waiters if waiter.deadline <= now]:
            if not waiter.future.done():
                self._waiters.remove(waiter)
                waiter.future.set_exception(self._pool_timeout())
        if not self._active and not self._idle and not self._waiters and not self._connecting:
            self._ticker.discard(self)

    def _expire_idle(self, now: float) -> None:
        stale: list[Wire] = []
        for wire, since in self._idle.items():  # oldest first
            if now - since < self._idle_s:
                break
            stale.append(wire)
        for wire in stale:
            wire.shut()
            self.forget(wire)

    def _pool_timeout(self) -> UpstreamError:
        return PoolTimeout(self.address, "pool", f"all {self._max_connections} connections are busy")

    # -- draining

    def drop_idle(self) -> None:
        """Close the idle connections: one of them turned out to be dead, and the others are no younger."""
        for wire in tuple(self._idle):
            wire.shut()
            self.forget(wire)

    def close_when_idle(self) -> None:
        """Take no more requests: idle connections close now, active ones after their exchange."""
        self._closing = True
        self.drop_idle()
        while (waiter := self._next_waiter()) is not None:
            waiter.future.set_exception(PoolClosed(self.address, "pool", "closing"))

    async def aclose(self, *, force: bool = False) -> None:
        """Close everything. Waits for the exchanges under way; with `force` they fail at once."""
        self.close_when_idle()
        if force:
            for wire in tuple(self._active):
                if wire.consumer is None:  # acquired, not sent: send() will report it
                    wire.shut()
                    self.forget(wire)
                else:
                    wire.fail(
                        PoolClosed(
                            self.address,
                            "body" if wire.got_bytes else "head",
                            "closed by force",
                            sent=True,
                            reused=wire.served,
                            got_bytes=wire.got_bytes,
                        )
                    )
        while self._active or self._connecting:
            self._drained.clear()
            await self._drained.wait()
        self._ticker.discard(self)


def _default_ssl_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
