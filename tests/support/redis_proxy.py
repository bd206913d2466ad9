"""A TCP proxy between a client and a Redis that spoils what a test wants spoilt.

    async with RedisProxy("127.0.0.1", server.port) as proxy:
        client = RedisClient(parse_address(proxy.url))
        proxy.drop_replies = True

What `refuse` names is refused by the proxy itself, as managed services refuse `SCRIPT` or `CONFIG`.
"""

from __future__ import annotations

import asyncio
import contextlib

import hiredis

from tests.support.passing_on import PassingOn


class RedisProxy(PassingOn):
    """Listens on a free port of 127.0.0.1. All settings may be changed while it runs."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._target = (host, port)
        self.connections = 0
        """Accepted so far."""
        self.delay_s = 0.0
        """For every piece of what Redis says."""
        self.drop_replies = False
        """Commands arrive and are carried out, answers are thrown away."""
        self.drop_commands = False
        self.refuse: set[str] = set()
        """First words of commands that are answered with an error, upper case."""
        self.refusing_connections = False
        """New connections are closed at once."""
        self.writes: list[bytes] = []
        """What clients sent, by piece read: with `keep`."""
        self.keep = False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def __aenter__(self) -> RedisProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.transport.abort()
            return
        with contextlib.suppress(asyncio.CancelledError):  # by `__aexit__`; asyncio's streams would log it
            await self._pass_on(reader, writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        if self.refusing_connections:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        there: asyncio.StreamWriter | None = None
        try:
            from_redis, there = await asyncio.open_connection(*self._target)
            self._writers |= {writer, there}
            async with asyncio.TaskGroup() as group:
                group.create_task(self._commands(reader, there, writer))
                group.create_task(self._replies(from_redis, writer, there))
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()
                    self._writers.discard(end)
            self._tasks.discard(task)

    async def _commands(
        self, reader: asyncio.StreamReader, there: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        """A refusal is written at once: it is in order only while nothing else is on its way, as in a handshake."""
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            if self.keep:
                self.writes.append(data)
            if self.drop_commands:
                continue
            if not self.refuse:
                there.write(data)
                continue
            parser.feed(data)
            while (words := parser.gets()) is not False:
                if words[0].decode().upper() in self.refuse:
                    back.write(b"-ERR unknown command '%b'\r\n" % words[0])
                else:
                    there.write(hiredis.pack_command(tuple(words)))
        there.transport.abort()

    async def _replies(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, there: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if not self.drop_replies:
                with contextlib.suppress(OSError):
                    back.write(data)
        back.transport.abort()
        there.transport.abort()
