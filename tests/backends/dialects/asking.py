"""An engine that gives prepared answers, for the questions that a dialect asks aside; and the recorded answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.side import SideChannel

RECORDED = Path(__file__).parent / "recorded"

Reply = tuple[int, bytes]
ABSENT: Reply = (404, b'{"detail":"Not Found"}')
"""What FastAPI answers to an unknown path."""


def recorded(name: str) -> Reply:
    """Status and body of a recorded answer, by its path below `recorded/`."""
    path = RECORDED / name
    if path.suffix == ".txt":
        return 200, path.read_bytes()
    tree = json.loads(path.read_text())
    body = tree["body"]
    return tree["status"], body.encode() if isinstance(body, str) else json.dumps(body).encode()


def body_of(name: str) -> Any:
    """The body of a recorded JSON answer."""
    return json.loads((RECORDED / name).read_text())["body"]


def ok(tree: Any) -> Reply:
    return 200, json.dumps(tree).encode()


@dataclass(slots=True)
class Engine:
    """Answers each path as `replies` says and everything else with 404."""

    side: SideChannel
    replies: dict[str, Reply]
    asked: list[str] = field(default_factory=list)
    """Method and path of each request, in order."""
    bodies: list[Any] = field(default_factory=list)
    """What was posted."""


@asynccontextmanager
async def asking(replies: Mapping[str, Reply]) -> AsyncIterator[Engine]:
    """A listening engine and the side channel to it; `replies` may be changed while it listens."""

    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                engine.asked.append(f"{method} {path}")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:") and (size := int(line[15:])):
                        engine.bodies.append(json.loads(await reader.readexactly(size)))
                status, body = engine.replies.get(path, ABSENT)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    engine = Engine(SideChannel(origin=f"http://127.0.0.1:{port}"), dict(replies))
    try:
        yield engine
    finally:
        await engine.side.aclose()
        await asyncio.gather(*serving)
        server.close()
        await server.wait_closed()
