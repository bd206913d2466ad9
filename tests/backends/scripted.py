"""A server that does exactly what a test's script says, byte by byte, over real sockets.

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")

    async with scripted(script) as server:
        pool = ConnectionPool(server.origin)

The script runs once per accepted connection, which is closed when it returns. Beside it:
`Recorder`, a consumer that writes down what it is told, and `exchange`, one request from acquire to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from backends.errors import UpstreamError
from backends.http1 import Connection, Headers
from backends.origin import Origin
from backends.pool import ConnectionPool

GET = b"GET /x HTTP/1.1\r\nhost: test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
# Nothing in these tests takes this long; it only keeps a broken one from hanging.
PATIENCE_S = 10.0


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number  # 0 for the first connection the server accepted

    async def request(self) -> bytes:
        """One whole request: its head, and a body of the announced length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        return head + (await self.reader.readexactly(int(length[1])) if length else b"")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def serve(self, answer: bytes) -> None:
        """Give the same answer to each request until the client leaves."""
        while True:
            await self.request()
            await self.send(answer)

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    async def half_close(self) -> None:
        self.writer.write_eof()
        await self.gone()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class ScriptedServer:
    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self.accepted = 0
        self.open = 0
        self.origin = Origin("http", "unset", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, self.accepted)
        self.accepted += 1
        self.open += 1
        try:
            await self._script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, which is often what the test is about
        except Exception as error:
            self._errors.append(error)
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors:
            raise AssertionError("the script failed") from self._errors[0]


@contextlib.asynccontextmanager
async def scripted(
    script: Script,
    *,
    host: str = "127.0.0.1",
    uds: Path | None = None,
    ssl_context: ssl.SSLContext | None = None,
    receive_buffer_bytes: int | None = None,
) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(script)
    if uds is not None:
        listener = await asyncio.start_unix_server(server.accept, str(uds))
        server.origin = Origin("http+unix", "localhost", 0, str(uds))
    else:
        sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        listener = await asyncio.start_server(server.accept, sock=sock, ssl=ssl_context)
        scheme = "http" if ssl_context is None else "https"
        server.origin = Origin(scheme, "localhost" if ssl_context else host, sock.getsockname()[1])
    try:
        yield server
    finally:
        listener.close()
        await server.stop()


class Recorder:
    """A consumer that keeps what it is told, and fails loudly when it is told too much."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.pieces: list[bytes] = []
        self.calls: list[str] = []
        self.error: UpstreamError | None = None
        self.headed = asyncio.Event()
        self.fed = asyncio.Event()
        self.over = asyncio.Event()

    def on_head(self, status: int, headers: Headers) -> None:
        assert not self.calls
        self.calls.append("head")
        self.status, self.headers = status, headers
        self.headed.set()

    def on_data(self, data: bytes) -> None:
        assert self.headed.is_set()
        assert not self.over.is_set()
        assert data
        self.calls.append("data")
        self.pieces.append(data)
        self.fed.set()

    def on_end(self) -> None:
        assert self.headed.is_set()
        assert not self.over.is_set()
        self.calls.append("end")
        self.over.set()

    def on_error(self, error: UpstreamError) -> None:
        assert not self.over.is_set()
        self.calls.append("error")
        self.error = error
        self.over.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    async def result(self) -> bytes:
        """The whole body, once complete; raises what went wrong."""
        await soon(self.over)
        if self.error is not None:
            raise self.error
        return self.body


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is so. For effects that no event announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  there is no event for what is waited for here
            await asyncio.sleep(0.001)


def send(
    connection: Connection,
    data: bytes | list[bytes] = GET,
    recorder: Recorder | None = None,
    *,
    method: bytes = b"GET",
    head_timeout_s: float = PATIENCE_S,
    idle_timeout_s: float = PATIENCE_S,
) -> Recorder:
    recorder = Recorder() if recorder is None else recorder
    connection.send(data, recorder, head_timeout_s=head_timeout_s, idle_timeout_s=idle_timeout_s, method=method)
    return recorder


async def exchange(pool: ConnectionPool, data: bytes | list[bytes] = GET, *, method: bytes = b"GET") -> Recorder:
    """One request on whichever connection the pool has; returns when it is over, well or not."""
    recorder = send(await pool.acquire(PATIENCE_S), data, method=method)
    await soon(recorder.over)
    return recorder
