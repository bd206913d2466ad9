"""Listens on the wire between the gateway and an engine: a TCP relay that keeps what was asked and answered."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Tap:
    """A relay that serves at `url`. `questions` and `answers` have one entry a connection, growing as bytes come."""

    url: str = ""
    questions: list[bytearray] = field(default_factory=list)
    answers: list[bytearray] = field(default_factory=list)

    def asked(self, target: str) -> int:
        """How often a request line had this method and path, as `GET /health`."""
        line = rf"^{re.escape(target)}(\?\S*)? HTTP/1\.1\r$".encode()
        return sum(len(re.findall(line, bytes(each), re.MULTILINE)) for each in self.questions)

    def posted(self, path: str) -> list[Any]:
        """The JSON bodies of all requests that were posted to this path."""
        found = []
        for each in self.questions:
            rest = bytes(each)
            while rest:
                head, _, rest = rest.partition(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
                size = int(length[1]) if length else 0
                if head.startswith(f"POST {path} ".encode()):
                    found.append(json.loads(rest[:size]))
                rest = rest[size:]
        return found

    def body(self) -> bytes:
        """The body of the only event stream so far, without its chunks' framing. The gateway asks for more: health."""
        (answer,) = (each for each in self.answers if b"text/event-stream" in each.partition(b"\r\n\r\n")[0])
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
    """Relay to the engine at `url` for the length of the block. In a thread: a test may block its own loop."""
    tap = Tap()
    started: Future[Callable[[], object]] = Future()
    thread = Thread(target=asyncio.run, args=(_relay(tap, url, started),))
    thread.start()
    stop = await asyncio.wrap_future(started)
    try:
        yield tap
    finally:
        stop()
        await asyncio.to_thread(thread.join)


async def _relay(tap: Tap, url: str, started: Future[Callable[[], object]]) -> None:
    """Serve until the function that `started` gets is called, from any thread."""
    engine = urlsplit(url)
    relays: set[asyncio.Task[None]] = set()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        relays.add(relay)
        question, answer = bytearray(), bytearray()
        tap.questions.append(question)
        tap.answers.append(answer)
        try:
            engine_reader, engine_writer = await asyncio.open_connection(engine.hostname, engine.port)
        except ConnectionError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, engine_writer, question))
                group.create_task(_copy(engine_reader, writer, answer))
        except asyncio.CancelledError:
            pass  # the tap is taken off

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    tap.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    started.set_result(partial(loop.call_soon_threadsafe, stopping.set))
    await stopping.wait()
    server.close()
    for relay in relays:
        relay.cancel()
    await asyncio.gather(*relays, return_exceptions=True)


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
