"""The gateway's own way to its front door: where the playground sends its requests, and what shows whose they are.

The secret is made at each start, in the process that answers operators; workers get it with their configuration. It
leaves these processes only towards the gateway's own listener, opens nothing but the playground's path there, and with
a wrong one that path does not exist.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httptools

from gateway.config import Settings

PATH = "/tidegate/playground"
"""On the inference listener, before the path of the API; POST."""
SECRET_HEADER = "x-tidegate-playground"
TRIAL_HEADER = "x-tidegate-trial"
"""JSON of a `gateway.inspection.trial.Trial`."""
CONNECT_WITHIN_S = 5.0
MAX_HEAD_BYTES = 65_536
_READ_BYTES = 65_536
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class DoorClosed(Exception):
    """The gateway's own listener cannot be reached, or has broken off."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where the inference listener is."""

    address: tuple[str, int] | str
    """Host and port, or the path of a Unix socket."""
    secret: str = field(repr=False)

    @property
    def url(self) -> str:
        """Where clients on this machine ask: `http://host:port`, or `unix:` and a path."""
        if isinstance(self.address, str):
            return f"unix:{self.address}"
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @asynccontextmanager
    async def ask(
        self, settings: Settings, path: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> AsyncIterator[Answer]:
        """POST to a path of the API as the playground. Leaving the block ends the request. Raises `DoorClosed`."""
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                if isinstance(self.address, str):
                    reader, writer = await asyncio.open_unix_connection(self.address)
                else:
                    reader, writer = await asyncio.open_connection(*self.address)
        except OSError as error:
            raise DoorClosed(f"the gateway's own listener cannot be reached: {error}") from error
        try:
            lines = [f"POST {PATH}{path} HTTP/1.1", f"host: {_host(settings)}", f"{SECRET_HEADER}: {self.secret}"]
            lines += [f"{name}: {value}" for name, value in headers]
            lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close", "", ""]
            writer.write("\r\n".join(lines).encode("latin-1") + body)
            answer = Answer(reader)
            await answer.read_head()
            yield answer
        finally:
            writer.transport.abort()


def door_to(sockets: Sequence[socket.socket]) -> Door | None:
    """To the first of the listener's sockets, with a new secret; None when there is none."""
    if not sockets:
        return None
    name: Any = sockets[0].getsockname()
    address = name if isinstance(name, str) else (_WILDCARDS.get(name[0], name[0]), name[1])
    return Door(address, secrets.token_urlsafe(32))


def _host(settings: Settings) -> str:
    """A name that the listener takes."""
    for name in settings.server.allowed_hosts:
        if name == "*":
            break
        return f"playground{name}" if name.startswith(".") else name
    return "localhost"


class Answer:
    """A response as it comes. For `httptools`, which calls the methods that begin with `on_`."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._complete = False
        self._headed = False

    async def read_head(self) -> None:
        """Wait for the head. Raises `DoorClosed`."""
        read = 0
        while not self._headed:
            read += await self._feed()
            if read > MAX_HEAD_BYTES and not self._headed:
                raise DoorClosed("the gateway's own answer has too long a head")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `DoorClosed` where it breaks off."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self._complete:
                return
            if not pieces:
                await self._feed()

    async def whole(self, limit_bytes: int) -> bytes:
        """The body, as far as `limit_bytes`."""
        body = b""
        with suppress(DoorClosed):
            async for piece in self.pieces():
                body += piece
                if len(body) > limit_bytes:
                    break
        return body[:limit_bytes]

    async def _feed(self) -> int:
        try:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise DoorClosed("the gateway's own connection has ended")
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise DoorClosed(f"the gateway's own connection broke: {error}") from error
        return len(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._headed = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
