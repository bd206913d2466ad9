"""What the proxies of the tests share: connections that can be cut, and an end that leaves none open."""

from __future__ import annotations

import asyncio
from types import TracebackType


class PassingOn:
    """A server whose connections are passed on; what it does with them is its own."""

    def __init__(self) -> None:
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0.01)  # connections accepted just now begin to be served, and are known then
        self.cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Close all connections as a broken network does, without a farewell; with FIN where everything was read."""
        for writer in tuple(self._writers):
            writer.transport.abort()
