"""Where the admin app gets what it shows: a worker in this process (`gateway.state`), or one behind a Unix socket.

Both answer in the same shapes, so that one process and many look alike to whoever scrapes or reads them.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Protocol

import msgspec
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

ANSWER_WITHIN_S = 1.0
"""A worker that takes longer is left out. Its loop is stuck or it is starting; a scrape must not wait for that."""

WORKER_UP = "tidegate_worker_up"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Silent(Exception):
    """A worker did not answer, or not in full."""


class Source(Protocol):
    """One worker, as the admin app asks it. Every question may raise `Silent`."""

    @property
    def index(self) -> int:
        """The worker's number, counted from 0."""

    async def metrics(self) -> list[Metric]: ...

    async def fleet(self) -> dict[str, Any]:
        """What the worker is, serves and sees."""

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        """At most `limit` usage records, the last settled first."""


class RemoteSource:
    """A worker in another process, asked through its own admin app."""

    def __init__(self, index: int, socket_path: str, *, timeout_s: float = ANSWER_WITHIN_S) -> None:
        self.index = index
        self._path = socket_path
        self._timeout_s = timeout_s

    async def metrics(self) -> list[Metric]:
        text = (await self._get("/metrics")).decode()
        return [family for family in text_string_to_metric_families(text) if family.name != WORKER_UP]

    async def fleet(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.json.decode(await self._get("/admin/fleet"))["workers"][0]
        return state

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = msgspec.json.decode(await self._get(f"/admin/usage?limit={limit}"))["data"]
        return records

    async def _get(self, target: str) -> bytes:
        """The body of a 200. HTTP/1.0: one question a connection, answered until it closes."""
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    writer.write(f"GET {target} HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
                    answer = await reader.read()
                finally:
                    writer.close()
        except OSError as error:  # TimeoutError among them
            raise Silent(f"worker {self.index} did not answer") from error
        head, _, body = answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if not re.match(rb"HTTP/1\.[01] 200 ", head) or length is None or int(length[1]) != len(body):
            raise Silent(f"worker {self.index} did not answer in full")
        return body
