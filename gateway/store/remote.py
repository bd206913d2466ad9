"""The store of another process on this machine, reached over a Unix socket: see `server` for the other end.

One connection, opened by the first operation and again by the next one after it was lost. While that does not work,
operations fail at once instead of queueing: callers go on with what they know, and try again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from typing import cast

import msgspec

from gateway.store.frames import (
    MAX_ANSWER_BYTES,
    Answer,
    Claim,
    Done,
    Fetch,
    Fetched,
    Follow,
    Followed,
    Forget,
    FrameError,
    Full,
    Invalid,
    Keep,
    Post,
    Publish,
    Read,
    Release,
    Request,
    Splitter,
    Told,
    Withdraw,
    framed,
)
from gateway.store.protocol import (
    START,
    Facts,
    StoreFull,
    StoreUnavailable,
    check_name,
    check_ttl,
    check_value,
    check_wait,
)
from gateway.store.streams import Passage, check_blob, check_payload

TIMEOUT_S = 2.0
"""The other end answers within a millisecond. One that takes this long is stopped or gone."""
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 1.0
MAX_UNSENT_BYTES = 1024 * 1024
"""Requests held for a supervisor that does not read them."""


class RemoteStore:
    """A `Store` at the Unix socket `path`. Belongs to the event loop of its first operation."""

    def __init__(self, path: str, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._clock = clock
        self._numbers = itertools.count(1)
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._delay_s = 0.0
        self._retry_at = 0.0
        self._closed = False

    def __repr__(self) -> str:
        waiting = 0 if self._connection is None else len(self._connection.pending)
        return f"<RemoteStore {self._path} connected={self._connection is not None} waiting={waiting}>"

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        check_name("a lease", lease)
        check_name("a holder", holder)
        check_ttl(ttl_s)
        answer = await self._ask(Claim(next(self._numbers), lease, holder, ttl_s))
        return isinstance(answer, Done) and answer.claimed

    async def release(self, lease: str, holder: str) -> None:
        check_name("a lease", lease)
        check_name("a holder", holder)
        await self._ask(Release(next(self._numbers), lease, holder))

    async def post(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        check_name("a key", key)
        check_value(value)
        check_ttl(ttl_s)
        await self._ask(Post(next(self._numbers), key, value, ttl_s))

    async def withdraw(self, key: str) -> None:
        check_name("a key", key)
        await self._ask(Withdraw(next(self._numbers), key))

    async def read_since(self, cursor: str = START, wait_s: float = 0.0) -> Facts:
        check_wait(wait_s)
        cursor = cursor if len(cursor) <= 64 else START  # no store of ours gave it, so it means the same
        told = await self._ask(Read(next(self._numbers), cursor, wait_s), wait_s)
        assert isinstance(told, Told)
        return Facts(told.cursor, told.changes, told.reset)

    async def publish(self, stream: str, payload: bytes) -> None:
        check_name("a stream", stream)
        check_payload(payload)
        await self._ask(Publish(next(self._numbers), stream, payload))

    async def follow(self, cursors: Mapping[str, str], wait_s: float = 0.0) -> tuple[Passage, ...]:
        check_wait(wait_s)
        followed = await self._ask(Follow(next(self._numbers), dict(cursors), wait_s), wait_s)
        assert isinstance(followed, Followed)
        return followed.passages

    async def keep(self, name: str, blob: bytes, ttl_s: float) -> None:
        check_name("a kept blob's name", name)
        check_blob(blob)
        check_ttl(ttl_s)
        await self._ask(Keep(next(self._numbers), name, blob, ttl_s))

    async def kept(self, name: str) -> bytes | None:
        check_name("a kept blob's name", name)
        fetched = await self._ask(Fetch(next(self._numbers), name))
        assert isinstance(fetched, Fetched)
        return fetched.blob

    async def aclose(self) -> None:
        self._closed = True
        async with self._connecting:
            if self._connection is not None:
                self._connection.close("it is closed")

    async def _ask(self, request: Request, wait_s: float = 0.0) -> Done | Told | Followed | Fetched:
        """The answer, which may take `wait_s` longer than others. Refusals are raised as what they mean."""
        try:
            async with asyncio.timeout(self._timeout_s + wait_s):
                connection = await self._connected()
                answer = await connection.ask(request)
        except TimeoutError:
            raise self._unavailable(f"no answer within {self._timeout_s + wait_s:g} s") from None
        except OSError as error:
            raise self._unavailable(error.strerror or str(error)) from error
        match answer:
            case Full(_, message):
                raise StoreFull(message)
            case Invalid(_, message):
                raise ValueError(message)
        return answer

    async def _connected(self) -> _Connection:
        """The connection, opened if there is none. Raises `OSError` when it cannot be."""
        if (connection := self._connection) is not None:
            return connection
        async with self._connecting:
            if (connection := self._connection) is not None:  # another operation has opened it
                return connection
            if self._closed:
                raise ConnectionError("it is closed")
            if self._clock() < self._retry_at:
                raise ConnectionError("the connection was lost, and it is too early for another attempt")
            loop = asyncio.get_running_loop()
            try:
                _, connection = await loop.create_unix_connection(lambda: _Connection(self._lost), self._path)
            except OSError:
                self._back_off()
                raise
            if connection.open:
                self._connection = connection
            return connection

    def _lost(self, connection: _Connection) -> None:
        if connection is self._connection:
            self._connection = None
        if connection.answered:
            self._delay_s = 0.0
        self._back_off()

    def _back_off(self) -> None:
        self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S) or FIRST_DELAY_S
        self._retry_at = self._clock() + self._delay_s

    def _unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(self._path, reason, max(0.0, self._retry_at - self._clock()))


class _Connection(asyncio.Protocol):
    """Sends requests and hands each its answer, in whatever order they come."""

    def __init__(self, lost: Callable[[_Connection], None]) -> None:
        self.pending: dict[int, asyncio.Future[Answer]] = {}
        self.answered = False
        """Whether the other end has ever said something."""
        self._lost = lost
        self._reason = "the connection was lost"
        self._splitter = Splitter(MAX_ANSWER_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: Request) -> Answer:
        transport = self._transport
        if transport is None or not self.open:
            raise ConnectionError(self._reason)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise ConnectionError("it does not take what it is sent")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.pending[request.number] = answer
        transport.write(framed(self._encoder, request))
        try:
            return await answer
        except asyncio.CancelledError:
            if isinstance(request, (Read, Follow)) and self.open:
                transport.write(framed(self._encoder, Forget(request.number)))
            raise
        finally:
            del self.pending[request.number]

    def close(self, reason: str) -> None:
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(self)
        for answer in self.pending.values():
            if not answer.done():
                answer.set_exception(ConnectionError(self._reason))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._splitter.feed(data):
                answer = self._decoder.decode(message)
                self.answered = True
                waiting = self.pending.get(answer.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (FrameError, msgspec.MsgspecError) as error:
            self.close(f"it said something unintelligible: {error}")
