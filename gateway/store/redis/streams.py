"""Streams in Redis: each is one of Redis' own, and a reader that waits does so on a connection of its own.

`XREAD BLOCK` holds up everything that is asked behind it, so it must not share a connection with requests' calls, and
it may not be used in a script. Kept blobs take the same connection, since a megabyte would hold up others as well.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from gateway.store.protocol import StoreUnavailable
from gateway.store.redis.address import Address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.link import Link, Refused
from gateway.store.redis.scripts import Script, load
from gateway.store.streams import MAX_STREAM_MESSAGES, PAGE_MESSAGES, Passage

ANSWER_S = 2.0
"""For an answer, on top of the time that it may wait."""
UNUSED_MS = 3_600_000
"""A stream to which nothing was published for so long ends."""
_BEGINNING = "0-0"
_CURSOR = re.compile(r"[0-9]{1,20}-[0-9]{1,20}", re.ASCII)


class _Apart:
    """Owner of a connection whose calls nobody counts."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def answered(self, calls: int) -> None: ...

    def failed(self, calls: int, reason: str) -> None: ...

    def lost(self, link: Link) -> None: ...


class RedisStreams:
    """See `Streams`. Cursors are Redis' own ids."""

    def __init__(self, client: RedisClient, prefix: str, *, load: Callable[[str], Script] = load) -> None:
        self._client = client
        self._prefix = prefix
        self._publish = load("publish")
        self._owner = _Apart(client.address)
        self._idle: Link | None = None
        """A connection that nobody uses now."""
        self._used: set[Link] = set()
        self._known: dict[Link, set[str]] = {}
        """Of each connection, the streams whose cursors were compared with what Redis has."""

    async def publish(self, stream: str, payload: bytes) -> None:
        await self._client.run(self._publish, (self._stream(stream),), (payload, MAX_STREAM_MESSAGES, UNUSED_MS))

    async def follow(self, cursors: Mapping[str, str], wait_s: float) -> tuple[Passage, ...]:
        if not cursors:
            await asyncio.sleep(wait_s)
            return ()
        async with self._link(wait_s) as link:
            since = {stream: await self._since(link, stream, cursor) for stream, cursor in cursors.items()}
            names = {self._stream(stream).encode(): stream for stream in cursors}
            block = ("BLOCK", max(1, round(wait_s * 1000))) if wait_s > 0 else ()
            reply = await link.ask("XREAD", "COUNT", PAGE_MESSAGES, *block, "STREAMS", *names, *since.values())
            if block and not reply:
                self._known.pop(link, None)
        return tuple(
            Passage(names[key], entries[-1][0].decode(), tuple(fields[1] for _, fields in entries))
            for key, entries in reply or ()
        )

    async def keep(self, name: str, blob: bytes, ttl_s: float) -> None:
        async with self._link() as link:
            await link.ask("SET", self._blob(name), blob, "PX", max(1, round(ttl_s * 1000)))

    async def kept(self, name: str) -> bytes | None:
        async with self._link() as link:
            blob: bytes | None = await link.ask("GET", self._blob(name))
        return blob

    def close(self) -> None:
        """What waits for an answer fails."""
        for link in (*self._used, *((self._idle,) if self._idle is not None else ())):
            link.close("it is closed")

    async def _since(self, link: Link, stream: str, cursor: str) -> str:
        """The id to read on from: the beginning, when this Redis cannot have given the cursor.

        That is found out once for each connection: while one lasts, it is the same Redis at its other end. And after a
        silence: Redis may have evicted the stream, and its clock, by which a new one is numbered, gone back.
        """
        if _CURSOR.fullmatch(cursor) is None:
            return _BEGINNING
        known = self._known.setdefault(link, set())
        if stream not in known:
            newest: Any = await link.ask("XREVRANGE", self._stream(stream), "+", "-", "COUNT", 1)
            if not newest or _order(newest[0][0].decode()) < _order(cursor):
                return _BEGINNING
            known.add(stream)
        return cursor

    @asynccontextmanager
    async def _link(self, wait_s: float = 0.0) -> AsyncIterator[Link]:
        """A connection for one caller. One on which an answer is still to come is closed, not used again."""
        link, self._idle = self._idle, None
        if link is None or not link.open:
            if link is not None:
                self._known.pop(link, None)
            link = await self._client.open_apart(self._owner)
        self._used.add(link)
        whole = False
        try:
            async with asyncio.timeout(wait_s + ANSWER_S):
                yield link
            whole = True
        except Refused as refused:
            whole = True
            raise StoreUnavailable(self._client.address.shown, str(refused)) from refused
        except TimeoutError:
            raise StoreUnavailable(self._client.address.shown, "no answer in time") from None
        finally:
            self._used.discard(link)
            if whole and link.open and self._idle is None:
                self._idle = link
            else:
                self._known.pop(link, None)
                link.close("it is not needed any more")

    def _stream(self, name: str) -> str:
        return f"{self._prefix}:{{stream:{name}}}"

    def _blob(self, name: str) -> str:
        return f"{self._prefix}:{{kept:{name}}}"


def _order(id: str) -> tuple[int, int]:
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number)
