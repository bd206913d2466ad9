"""Listens on the wire between the gateway and an engine: a TCP relay that keeps what the engine answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Tap:
    """A relay that serves at `url`. `answers` has one entry a connection, growing as bytes come."""

    url: str = ""
    answers: list[bytearray] = field(default_factory=list)

    def body(self) -> bytes:
        """The body of the only answer so far, without its chunks' framing."""
        (answer,) = self.answers
        head, _, rest = bytes(answer).partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        pieces: list[bytes] = []
        while True:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            if length == 0:
                return b"".join(pieces)
            pieces.append(rest[:length])
            rest = rest[length + 2 :]


@asynccontextmanager
async def tapped(url: str) -> AsyncIterator[Tap]:
    """Relay to the engine at `url` for the length of the block."""
    engine = urlsplit(url)
    tap = Tap()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = bytearray()
        tap.answers.append(answer)
        engine_reader, engine_writer = await asyncio.open_connection(engine.hostname, engine.port)
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(reader, engine_writer, bytearray()))
            group.create_task(_copy(engine_reader, writer, answer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    tap.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    """Copy until the sender ends, then end the other side too."""
    try:
        while data := await reader.read(65536):
            kept += data
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # that side is gone, which closing the other one passes on
    finally:
        writer.close()
