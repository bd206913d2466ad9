"""Requests to a gateway under test over a bare socket: the whole reply, or a stream bit by bit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway.order import CHAT
from loadtests.rawclient import Reply, read_head
from tests.support.client import PATIENCE_S, RawClient, connect, post
from tests.support.serving import Serving


async def ask(gateway: Serving, body: Any, path: str = CHAT, *headers: str) -> Reply:
    """One POST on a connection of its own, and the whole reply. `body` is bytes as they are, or a value for JSON."""
    async with connect(gateway.host, gateway.port) as client:
        await client.send(post(path, body, *headers))
        return await client.reply()


class Stream:
    """A chunked reply under way: the head is read, the body comes chunk by chunk."""

    def __init__(self, client: RawClient, status: int, headers: dict[str, str]) -> None:
        self.client = client
        self.status = status
        self.headers = headers
        self.body = b""
        """What has been read of it."""
        self.started_at = time.monotonic()

    async def chunk(self, within_s: float = PATIENCE_S) -> bytes:
        """The next chunk of the body; empty at its end. Raises where the connection breaks off."""
        async with asyncio.timeout(within_s):
            size = int(await self.client.reader.readuntil(b"\r\n"), 16)
            data = (await self.client.reader.readexactly(size + 2))[:-2]
        self.body += data
        return data

    async def until(self, mark: bytes) -> None:
        """Read on until the body contains `mark`."""
        while mark not in self.body:
            assert await self.chunk(), f"the stream ended without {mark!r}"

    async def rest(self) -> bytes:
        """Read to the end; return the whole body."""
        while await self.chunk():
            pass
        return self.body


@asynccontextmanager
async def streaming(gateway: Serving, body: Any, path: str = CHAT, *headers: str) -> AsyncIterator[Stream]:
    """A POST whose reply's head is awaited and whose body is read in the block; then the connection is closed."""
    async with connect(gateway.host, gateway.port) as client:
        await client.send(post(path, body, *headers))
        async with asyncio.timeout(PATIENCE_S):
            status, found = await read_head(client.reader)
        yield Stream(client, status, found)


def error_of(body: bytes) -> dict[str, Any]:
    """The error object of a reply, which must have OpenAI's four keys and nothing beside."""
    value = json.loads(body)
    assert value.keys() == {"error"}
    error: dict[str, Any] = value["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str | None)
    assert isinstance(error["param"], str | None)
    return error
