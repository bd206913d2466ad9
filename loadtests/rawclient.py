"""A raw HTTP client that hides nothing, for tests: what came, byte by byte, and whether it was complete."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from loadtests.engine import FakeEngine

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM: dict[str, Any] = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Reply:
    """One response, read until the connection ended or the message did."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each event; [DONE] as the string it is."""
        found = []
        for line in self.body.replace(b"\r\n", b"\n").split(b"\n"):
            if line.startswith(b"data: "):
                data = line[len(b"data: ") :]
                found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        return found

    @property
    def texts(self) -> list[str]:
        deltas = [e["choices"][0].get("delta", {}) for e in self.events if isinstance(e, dict) and e.get("choices")]
        return [delta["content"] for delta in deltas if delta.get("content")]


def request_bytes(body: Any, path: str = "/v1/chat/completions", headers: str = "", method: str = "POST") -> bytes:
    data = json.dumps(body).encode() if body is not None else b""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {len(data)}\r\n\r\n".encode() + data
    )


async def open_to(engine: FakeEngine) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if engine.uds is not None:
        return await asyncio.open_unix_connection(engine.uds)
    return await asyncio.open_connection("127.0.0.1", engine.ports[0])


async def ask(engine: FakeEngine, body: Any = CHAT, path: str = "/v1/chat/completions", **kwargs: Any) -> Reply:
    reader, writer = await open_to(engine)
    try:
        writer.write(request_bytes(body, path, **kwargs))
        return await read_reply(reader)
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    status, headers = await read_head(reader)
    if headers.get("transfer-encoding") == "chunked":
        body, complete = await read_chunks(reader)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        try:
            body, complete = await reader.readexactly(length), True
        except asyncio.IncompleteReadError as error:
            body, complete = error.partial, False
    else:
        body, complete = await reader.read(), True
    return Reply(status, headers, body, complete)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines)


async def read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    body = b""
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return body, False
    return body, True
