"""A client that is a bare socket: it sends what it is told, reads when it is told, and leaves in several ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from loadtests.rawclient import Reply, read_reply

Leaving = Literal["close", "reset", "half-close"]
PATIENCE_S = 5.0


async def until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Wait for what sets no event: counts, sets, buffers."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)


class RawClient:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.sock: socket.socket = writer.get_extra_info("socket")

    async def send(self, data: bytes) -> None:
        """Write, and wait until the kernel has it; a peer that has closed is no error."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def reply(self) -> Reply:
        """The next response, whole."""
        async with asyncio.timeout(PATIENCE_S):
            return await read_reply(self.reader)

    async def rest(self, within_s: float = PATIENCE_S) -> bytes:
        """Everything up to the end of the connection, which must come in time; a reset is an end too."""
        data = b""
        async with asyncio.timeout(within_s):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(65536):
                    data += piece
        return data

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(mark)

    def leave(self, how: Leaving) -> None:
        if how == "half-close":
            self.writer.write_eof()
            return
        if how == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(host: str, port: int, *, receive_buffer_bytes: int | None = None) -> AsyncIterator[RawClient]:
    """A connection that is closed at the end of the block, if it still is open then."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except OSError:
        sock.close()
        raise
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096 if receive_buffer_bytes else 2**20)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def post(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    """A well-formed POST with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data
