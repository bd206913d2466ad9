"""Clients that are bare sockets by the hundred, and what the others feel of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from loadtests.hammer_bounds import percentile
from tests.faults.crowd import Answer
from tests.faults.rig import Rig

CONNECT_AT_ONCE = 100


class Holder(asyncio.Protocol):
    """One connection: what came, and when it ended. Reads, unless told not to."""

    def __init__(self, message: bytes, reads: bool = True) -> None:
        self._message = message
        self._reads = reads
        self.transport: asyncio.Transport | None = None
        self.made_s = 0.0
        self.lost_s: float | None = None
        self.data = b""
        self.sent_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if not self._reads:
            # Not at once: up to CPython 3.11.2 the transport begins to read after this, paused or not.
            asyncio.get_running_loop().call_soon(self.transport.pause_reading)
        self.made_s = time.monotonic()
        self.send(self._message)

    def send(self, data: bytes) -> None:
        if data and self.transport is not None and self.lost_s is None:
            self.sent_bytes += len(data)
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_s = time.monotonic()

    @property
    def status(self) -> int:
        """Of what came; 0 if nothing that is HTTP."""
        words = self.data[:16].split(b" ")
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0

    @property
    def open_s(self) -> float | None:
        """From its beginning to its end."""
        return None if self.lost_s is None else self.lost_s - self.made_s


@contextlib.asynccontextmanager
async def held(
    found: Rig, count: int, message: bytes, *, reads: bool = True, receive_buffer_bytes: int = 0
) -> AsyncIterator[list[Holder]]:
    """So many connections to the gateway, each having sent `message`; they are gone at the end of the block."""
    loop = asyncio.get_running_loop()
    holders = [Holder(message, reads) for _ in range(count)]

    async def connect(holder: Holder) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await loop.sock_connect(sock, found.crowd.address)
        await loop.create_connection(lambda: holder, sock=sock)

    try:
        for begin in range(0, count, CONNECT_AT_ONCE):
            await asyncio.gather(*(connect(holder) for holder in holders[begin : begin + CONNECT_AT_ONCE]))
        yield holders
    finally:
        for holder in holders:
            if holder.transport is not None and not holder.transport.is_closing():
                holder.transport.abort()


async def until_lost(holders: Sequence[Holder], within_s: float) -> int:
    """Wait until the gateway has closed all of them; how many it has not."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(each.lost_s is None for each in holders):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return sum(holder.lost_s is None for holder in holders)


async def good(found: Rig, count: int, per_s: float = 50.0) -> list[Answer]:
    """Short requests of somebody else, beside whatever goes on."""
    answers = await found.crowd.many(count, found.body(fake={"chunks": 1}), per_s=per_s)
    await found.crowd.ended(answers)
    return answers


def took_ms(answers: Sequence[Answer], percent: float) -> float:
    return percentile([((answer.ended_s or 1e9) - answer.at_s) * 1000 for answer in answers], percent)


@dataclass
class Watch:
    """The gateway's memory and CPU time while something goes on."""

    found: Rig
    begun_mb: float = 0.0
    peak_mb: float = 0.0
    cpu_s: float = 0.0
    took_s: float = 0.0
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def grown_mb(self) -> float:
        return self.peak_mb - self.begun_mb

    async def _look(self) -> None:
        while not self._over.is_set():
            self.peak_mb = max(self.peak_mb, self.found.footprint().rss_mb)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 0.05)


def cpu_s(found: Rig) -> float:
    """User and system time so far of the gateway's processes."""
    ticks = 0
    for pid in found.processes():
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text[text.rindex(")") + 2 :].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def watched(found: Rig) -> AsyncIterator[Watch]:
    """Looks 20 times a second until the end of the block."""
    watch = Watch(found, found.footprint().rss_mb)
    began_s, before_s = time.monotonic(), cpu_s(found)
    looking = asyncio.create_task(watch._look())
    try:
        yield watch
    finally:
        watch._over.set()
        await looking
        watch.cpu_s, watch.took_s = cpu_s(found) - before_s, time.monotonic() - began_s
