"""Questions aside, over real sockets: what is asked, and answers that cannot be used."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from backends.side import SideChannel, SideChannelError, Trouble


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[tuple[SideChannel, list[bytes]]]:
    """A side channel to a server that says one thing, and the heads of what it was asked."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    side = SideChannel(origin=f"http://127.0.0.1:{port}", headers=[("authorization", "Bearer k")], timeout_s=5)
    try:
        yield side, heads
    finally:
        await side.aclose()
        server.close()
        await server.wait_closed()


async def test_no_compression_is_asked_for() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}") as (side, heads):
        assert (await side.get("/v1/models")).json_object() == {}
        head = heads[0].lower()
        assert b"accept-encoding: identity\r\n" in head
        assert b"gzip" not in head
        assert b"user-agent: tidegate\r\n" in head
        assert b"authorization: bearer k\r\n" in head


async def test_a_compressed_answer_says_what_is_wrong_with_it() -> None:
    body = gzip.compress(b"{}")
    reply = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    async with answering(reply) as (side, _):
        with pytest.raises(SideChannelError, match="compressed") as caught:
            await side.get("/v1/models")
        assert caught.value.trouble == Trouble.BROKEN
