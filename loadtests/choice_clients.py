"""The HTTP clients that were weighed for the way to the model servers: CPU time of the client per request.

``python -m loadtests.choice_clients --candidate lean --url http://127.0.0.1:19001`` sends the same requests with one
of them and prints one JSON object. Every client runs on uvloop, may keep all its connections open, and reads each
answer whole. `loadtests.choices` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

import httpx2

from backends.errors import UpstreamError
from backends.http1 import Headers
from backends.origin import Origin
from backends.pool import ConnectionPool
from backends.transport import LeanTransport
from loadtests.bodies import chat_bodies
from loadtests.choice_parsers import cpu_seconds
from loadtests.engine import run

Ask = Callable[[bytes], Awaitable[tuple[int, int]]]
"""Sends one body; gives the status and the size of the answer in bytes."""
Client = Callable[[str], AbstractAsyncContextManager[Ask]]

PATH = "/v1/chat/completions"
SENT_HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-bench", "x-request-id": "req_bench"}
TIMEOUT_S = 10.0


class _Answer:
    """Takes one response; `done` is what the gateway's exchange waits for as well."""

    __slots__ = ("done", "size", "status")

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done
        self.status = 0
        self.size = 0

    def on_head(self, status: int, headers: Headers) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        self.size += len(data)

    def on_end(self) -> None:
        self.done.set_result(None)

    def on_error(self, error: UpstreamError) -> None:
        self.done.set_exception(error)


@asynccontextmanager
async def lean(url: str) -> AsyncIterator[Ask]:
    """`backends.http1` as the gateway uses it: the head is rendered once, only the length changes."""
    origin = Origin.parse(url)
    pool = ConnectionPool(origin)
    loop = asyncio.get_running_loop()
    lines = "".join(f"{name}: {value}\r\n" for name, value in SENT_HEADERS.items())
    head = f"POST {PATH} HTTP/1.1\r\nhost: {origin.host_header.decode()}\r\n{lines}".encode()

    async def ask(body: bytes) -> tuple[int, int]:
        answer = _Answer(loop.create_future())
        connection = pool.acquire_nowait() or await pool.acquire(TIMEOUT_S)
        data = [b"%bcontent-length: %d\r\n\r\n" % (head, len(body)), body]
        connection.send(data, answer, head_timeout_s=TIMEOUT_S, idle_timeout_s=TIMEOUT_S)
        await answer.done
        return answer.status, answer.size

    yield ask
    await pool.aclose(force=True)


@asynccontextmanager
async def _httpx2(url: str, transport: httpx2.AsyncBaseTransport | None) -> AsyncIterator[Ask]:
    limits = httpx2.Limits(max_connections=100, max_keepalive_connections=100)
    address = httpx2.URL(url + PATH)
    async with httpx2.AsyncClient(transport=transport, limits=limits, timeout=TIMEOUT_S, trust_env=False) as client:

        async def ask(body: bytes) -> tuple[int, int]:
            response = await client.post(address, content=body, headers=SENT_HEADERS)
            return response.status_code, len(response.content)

        yield ask


def stock_httpx2(url: str) -> AbstractAsyncContextManager[Ask]:
    return _httpx2(url, None)


def lean_httpx2(url: str) -> AbstractAsyncContextManager[Ask]:
    return _httpx2(url, LeanTransport())


@asynccontextmanager
async def aiohttp(url: str) -> AsyncIterator[Ask]:
    """Not a dependency of ours: measured only where it happens to be installed."""
    library = importlib.import_module("aiohttp")
    async with library.ClientSession() as session:

        async def ask(body: bytes) -> tuple[int, int]:
            async with session.post(url + PATH, data=body, headers=SENT_HEADERS) as response:
                return response.status, len(await response.read())

        yield ask


CLIENTS: Mapping[str, Client] = {
    "backends.http1": lean,
    "aiohttp": aiohttp,
    "httpx2 on LeanTransport": lean_httpx2,
    "httpx2": stock_httpx2,
}


async def load(client: Client, url: str, *, requests: int, concurrency: int = 32) -> dict[str, float]:
    """Ask so often, with so many asking at once, after a tenth of it as a warm-up."""
    bodies = itertools.cycle(chat_bodies(1024))
    answers = set()

    async with client(url) as ask:

        async def asking(count: int) -> None:
            for _ in range(count):
                answers.add(await ask(next(bodies)))

        async def together(count: int) -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(asking(count))

        each = max(1, requests // concurrency)
        await together(max(1, each // 10))
        began = cpu_seconds()
        await together(each)
        used_s = cpu_seconds() - began
    if {status for status, _ in answers} != {200}:
        raise SystemExit(f"not every answer was good: {sorted(answers)}")
    done = each * concurrency
    return {"requests": done, "cpu_us": round(used_s * 1e6 / done, 2), "reply_bytes": max(answers)[1]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.choice_clients", description="HTTP clients.")
    parser.add_argument("--candidate", choices=list(CLIENTS), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args(argv)
    if not urlsplit(options.url).port:
        parser.error("the URL needs a port")

    async def measured() -> None:
        print(json.dumps(await load(CLIENTS[options.candidate], options.url, requests=options.requests)))

    run(measured())


if __name__ == "__main__":
    main()
