"""Engines that answer what a file says, over real sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from backends.side import SideChannel
from tests.backends.scripted import Peer, scripted

_FOLDER = Path(__file__).parent / "recorded"


def recorded(name: str) -> dict[str, Any]:
    """The file `recorded/<name>.json`, whose `source` says where it comes from."""
    tree: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text())
    return tree


@contextlib.asynccontextmanager
async def answering(replies: Mapping[str, Any]) -> AsyncIterator[SideChannel]:
    """A channel to a server that has these replies ("GET /path" to status and body), and 404 for all else."""

    async def script(peer: Peer) -> None:
        while True:
            method, path, _ = (await peer.request()).split(b" ", 2)
            reply = replies.get(f"{method.decode()} {path.decode()}", {"status": 404, "body": '{"detail":"Not Found"}'})
            body = reply["body"].encode()
            await peer.send(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (reply["status"], len(body), body))

    async with scripted(script) as server:
        side = SideChannel(origin=f"http://127.0.0.1:{server.origin.port}")
        try:
            yield side
        finally:
            await side.aclose()
