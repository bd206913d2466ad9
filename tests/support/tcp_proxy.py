"""A TCP proxy that spoils what a test wants spoilt: it delays, throttles, swallows, resets and refuses.

    async with TcpProxy("127.0.0.1", engine.port) as proxy:
        proxy.delay_s = 0.2          # of every piece, in both directions
        proxy.reset()                # RST to both ends of all connections

All settings may be changed while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

from tests.support.passing_on import PassingOn

_NO_LINGER = struct.pack("ii", 1, 0)


class TcpProxy(PassingOn):
    """Listens on a free port of 127.0.0.1 and passes on to `host` and `port`."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.target = (host, port)
        self.accepted = 0
        """Connections so far."""
        self.delay_s = 0.0
        """For every piece, in both directions."""
        self.bytes_per_s = 0.0
        """Of answers, for each connection; 0: as fast as they come."""
        self.swallow_requests = False
        self.swallow_answers = False
        self.refusing = False
        """New connections are reset at once."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Open ends, two for each connection that is passed on."""
        return len(self._writers)

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def reset(self) -> None:
        """RST to both ends of all connections."""
        for writer in tuple(self._writers):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        with contextlib.suppress(asyncio.CancelledError):  # by `__aexit__`; asyncio's streams would log it
            await self._pass_on(reader, writer)
        self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing or self._server is None or not self._server.is_serving():
            _reset(writer)
            return
        ends = [writer]
        try:
            answers, there = await asyncio.open_connection(*self.target)
            ends.append(there)
            self._writers.update(ends)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests(reader, there))
                group.create_task(self._answers(answers, writer, there))
        except* OSError:
            pass
        finally:
            for end in ends:
                end.transport.abort()
                self._writers.discard(end)

    async def _requests(self, reader: asyncio.StreamReader, there: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay_s)
            if not self.swallow_requests:
                there.write(data)
                await there.drain()
        there.transport.abort()

    async def _answers(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, there: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
            if not self.swallow_answers:
                back.write(data)
                await back.drain()
        back.close()
        there.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket | None = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()
