"""Serves a memory store to the workers of this machine, over a Unix socket that is bound already."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import cast

import msgspec

from gateway.store.frames import (
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
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
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Facts, StoreFull, StoreUnavailable

logger = logging.getLogger("tidegate")

MAX_READS = 64
"""Reads that one connection may have waiting; a worker needs two or three."""
MAX_UNSENT_BYTES = 2 * MAX_ANSWER_BYTES
"""Answers held for a worker that does not take them. One that lets so much pile up is cut, and may come back."""


class StoreServer:
    """Answers on `sock` from `start` until `aclose`; the socket is closed then, the store is not."""

    def __init__(self, store: MemoryStore, sock: socket.socket) -> None:
        self._store = store
        self._sock = sock
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def start(self) -> None:
        """Connections are accepted from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Connection(self._store, self._connections), sock=self._sock
        )

    async def aclose(self) -> None:
        """Cut every connection; reads that wait end unanswered."""
        if self._server is not None:
            self._server.close()
        ended = [task for connection in list(self._connections) for task in connection.cut()]
        await asyncio.gather(*ended, return_exceptions=True)


class _Connection(asyncio.Protocol):
    """One worker. Short operations are answered at once and in order; each read has a task."""

    def __init__(self, store: MemoryStore, connections: set[_Connection]) -> None:
        self._store = store
        self._connections = connections
        self._splitter = Splitter(MAX_REQUEST_BYTES)
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._encoder = msgspec.msgpack.Encoder()
        self._reads: dict[int, asyncio.Task[None]] = {}
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._connections.discard(self)
        self.cut()

    def data_received(self, data: bytes) -> None:
        try:
            answers = bytearray()
            for message in self._splitter.feed(data):
                answer = self._answer(self._decoder.decode(message))
                if answer is not None:
                    answers += framed(self._encoder, answer)
            self._send(answers)
        except (FrameError, msgspec.MsgspecError) as error:
            logger.error("store: a worker is cut: %s", error)
            self.cut()
        except StoreUnavailable:  # this process is stopping
            self.cut()

    def cut(self) -> list[asyncio.Task[None]]:
        """Close the connection; returns the reads that are ending with it."""
        if self._transport is not None:
            self._transport.abort()
        tasks = list(self._reads.values())
        for task in tasks:
            task.cancel()
        return tasks

    # Nothing more is read from a worker that does not take its answers.

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def _answer(self, request: Request) -> Answer | None:
        """Carry a request out; None when its answer comes later or never."""
        try:
            match request:
                case Claim(number, lease, holder, ttl_s):
                    return Done(number, self._store.claim_now(lease, holder, ttl_s))
                case Release(number, lease, holder):
                    self._store.release_now(lease, holder)
                case Post(number, key, value, ttl_s):
                    self._store.post_now(key, value, ttl_s)
                case Withdraw(number, key):
                    self._store.withdraw_now(key)
                case Read(number, cursor, wait_s):
                    if wait_s == 0:
                        return _told(number, self._store.read_now(cursor))
                    self._begin(request)
                    return None
                case Publish(number, stream, payload):
                    self._store.publish_now(stream, payload)
                case Follow(number, cursors, wait_s):
                    passages = self._store.follow_now(cursors)
                    if passages or wait_s == 0:
                        return Followed(number, passages)
                    self._begin(request)
                    return None
                case Keep(number, name, blob, ttl_s):
                    self._store.keep_now(name, blob, ttl_s)
                case Fetch(number, name):
                    return Fetched(number, self._store.kept_now(name))
                case Forget(number):
                    if (task := self._reads.get(number)) is not None:
                        task.cancel()
                    return None
        except StoreFull as error:
            return Full(request.number, str(error))
        except ValueError as error:
            return Invalid(request.number, str(error))
        return Done(request.number)

    def _begin(self, read: Read | Follow) -> None:
        if read.number in self._reads:
            raise FrameError(f"a second read has the number {read.number}")
        if len(self._reads) >= MAX_READS:
            raise StoreFull(f"{MAX_READS} reads wait on this connection already")
        task = asyncio.get_running_loop().create_task(self._read(read), name="store read")
        self._reads[read.number] = task
        task.add_done_callback(lambda _: self._reads.pop(read.number, None))

    async def _read(self, read: Read | Follow) -> None:
        answer: Answer
        try:
            if isinstance(read, Follow):
                answer = Followed(read.number, await self._store.follow(read.cursors, read.wait_s))
            else:
                answer = _told(read.number, await self._store.read_since(read.cursor, read.wait_s))
        except ValueError as error:
            answer = Invalid(read.number, str(error))
        except StoreUnavailable:
            self.cut()
            return
        self._send(framed(self._encoder, answer))

    def _send(self, data: bytearray) -> None:
        transport = self._transport
        if transport is None or not data:
            return
        if transport.get_write_buffer_size() + len(data) > MAX_UNSENT_BYTES:
            logger.error("store: a worker is cut: it does not take its answers")
            self.cut()
            return
        transport.write(data)


def _told(number: int, facts: Facts) -> Told:
    return Told(number, facts.cursor, facts.changes, facts.reset)
