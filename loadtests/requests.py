"""Load of plain requests: so many connections, each asks again as soon as it has its answer.

``python -m loadtests.requests --url http://127.0.0.1:7400 --connections 32`` prints one JSON object.
It costs about 10 µs of CPU a request on uvloop, so that a gateway on another core is what limits the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import cast
from urllib.parse import urlsplit

from loadtests.bodies import chat_bodies
from loadtests.engine import run


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What one run of load saw. Latencies are of good answers, in milliseconds."""

    requests: int
    """Good answers: status 200 and a complete body."""
    errors: int
    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share (0..1) of the sorted values does not exceed; 0 without values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def http_post(path: str, body: bytes) -> bytes:
    headers = "host: localhost\r\naccept: application/json\r\nauthorization: Bearer sk-bench-not-a-secret\r\n"
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{headers}{kind}\r\n".encode() + body


class _Run:
    """What all connections share."""

    def __init__(self, messages: list[bytes], count: int, loop: asyncio.AbstractEventLoop) -> None:
        self.messages: Iterator[bytes] = itertools.cycle(messages)
        self.left = count
        self.open = 0
        self.errors = 0
        self.took_ns = array("q")
        self.finished: asyncio.Future[None] = loop.create_future()

    def left_by_one(self) -> None:
        self.open -= 1
        if self.open == 0 and not self.finished.done():
            self.finished.set_result(None)


class _Connection(asyncio.Protocol):
    def __init__(self, shared: _Run) -> None:
        self._shared = shared
        self._buffer = b""
        self._asking = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shared.open += 1

    def ask(self) -> None:
        shared = self._shared
        if shared.left <= 0:
            self._transport.close()
            return
        shared.left -= 1
        self._asking = True
        self._began = time.perf_counter_ns()
        self._transport.write(next(shared.messages))

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        if not _complete(data):
            self._buffer = data
            return
        self._buffer = b""
        self._asking = False
        if data.startswith(b"HTTP/1.1 200"):
            self._shared.took_ns.append(time.perf_counter_ns() - self._began)
        else:
            self._shared.errors += 1
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._asking:
            self._shared.errors += 1
        self._shared.left_by_one()


def _complete(data: bytes) -> bool:
    """Whether this is one whole response. Enough for the peers measured here; a client would use a parser."""
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    head = data[:head_end].lower()
    start = head.find(b"\r\ncontent-length:")
    if start < 0:
        return data.endswith(b"\r\n0\r\n\r\n")
    end = head.find(b"\r\n", start + 2)
    length = int(head[start + 17 : end if end > 0 else head_end])
    return len(data) >= head_end + 4 + length


async def load(url: str, bodies: list[bytes], *, connections: int, count: int, max_s: float = 60.0) -> Result:
    """Send count requests, over so many connections, in at most max_s seconds."""
    loop = asyncio.get_running_loop()
    target = urlsplit(url)
    shared = _Run([http_post("/v1/chat/completions", body) for body in bodies], count, loop)
    opened = []
    for _ in range(connections):
        _, connection = await loop.create_connection(
            lambda: _Connection(shared), target.hostname or "", target.port or 80
        )
        opened.append(connection)
    limit = loop.call_later(max_s, setattr, shared, "left", 0)
    began = time.perf_counter()
    for connection in opened:
        connection.ask()
    try:
        await asyncio.wait_for(shared.finished, max_s + 10)
    except TimeoutError:
        shared.errors += shared.open
    seconds = time.perf_counter() - began
    limit.cancel()
    ordered = sorted(took / 1e6 for took in shared.took_ns)
    return Result(
        requests=len(ordered),
        errors=shared.errors,
        seconds=round(seconds, 4),
        per_second=round(len(ordered) / seconds, 1),
        p50_ms=round(percentile(ordered, 0.5), 4),
        p99_ms=round(percentile(ordered, 0.99), 4),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.requests", description="Load of plain chat requests.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--body-bytes", type=int, default=1024)
    parser.add_argument("--model", default="bench")
    parser.add_argument("--max-s", type=float, default=60.0)
    options = parser.parse_args(argv)
    bodies = chat_bodies(options.body_bytes, model=options.model)

    async def measured() -> None:
        result = await load(
            options.url,
            bodies,
            connections=options.connections,
            count=options.requests,
            max_s=options.max_s,
        )
        print(json.dumps(dataclasses.asdict(result)))

    run(measured())


if __name__ == "__main__":
    main()
