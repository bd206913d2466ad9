"""Load of paced streams, and how late each chunk came.

``python -m loadtests.streams --url http://127.0.0.1:7400 --streams 200 --rate 50`` prints one JSON object.
The fake engine stamps each chunk with CLOCK_MONOTONIC when it sends it; both processes run on one machine, so
the difference on arrival is the one-way delay through whatever lies between. A stream is good only if every
chunk, the finish_reason and [DONE] came and the body ended properly.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import time
from array import array
from typing import cast
from urllib.parse import urlsplit

import httptools

from loadtests.engine import run
from loadtests.requests import http_post, percentile

STAMP = re.compile(rb'"t":(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What one run of streams saw; times in milliseconds."""

    streams: int
    good: int
    chunks: int
    seconds: float
    chunks_per_second: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    delay_p50_ms: float
    delay_p99_ms: float
    chunks_per_read: float
    """Above 1, chunks were merged on the way, and CPU per chunk is not comparable with other runs."""


class _Run:
    def __init__(self) -> None:
        self.good = 0
        self.chunks = 0
        self.reads = 0
        self.ttft_ns = array("q")
        self.delays_ns = array("q")


class _Stream(asyncio.Protocol):
    """One stream on one connection."""

    def __init__(self, shared: _Run, message: bytes, chunks: int, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._message = message
        self._expected = chunks
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._tail = b""
        self._chunks = 0
        self._finished = False
        self._done = False
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._began = time.monotonic_ns()
        self._transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()
            return
        if self._parts:
            self._read(now)

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        if self._parts:
            self._read(time.monotonic_ns())
        good = self._parser.get_status_code() == 200 and self._finished and self._done
        self._shared.good += good and self._chunks == self._expected
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def give_up(self) -> None:
        self._transport.abort()

    def _read(self, now: int) -> None:
        shared = self._shared
        if self._began:
            shared.ttft_ns.append(now - self._began)
            self._began = 0
        text = self._tail + b"".join(self._parts)
        self._parts.clear()
        end = text.rfind(b"\n\n") + 2
        if end < 2:
            self._tail = text
            return
        text, self._tail = text[:end], text[end:]
        stamps = STAMP.findall(text)
        for stamp in stamps:
            shared.delays_ns.append(now - int(stamp))
        if stamps:
            shared.reads += 1
            shared.chunks += len(stamps)
            self._chunks += len(stamps)
        if b'"finish_reason":"stop"' in text:
            self._finished = True
        if text.endswith(b"data: [DONE]\n\n"):
            self._done = True


async def load(url: str, *, streams: int, chunks: int, rate: float, model: str = "bench") -> Result:
    """Run so many streams side by side, each of so many chunks at a rate of chunks per second.

    They start spread over one second, so that first tokens are not all due at once.
    """
    loop = asyncio.get_running_loop()
    target = urlsplit(url)
    shared = _Run()
    fake = {"chunks": chunks, "interval_s": 1 / rate}
    question = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body = json.dumps({**question, "stream_options": {"include_usage": True}, "fake": fake}).encode()
    message = http_post("/v1/chat/completions", body)

    async def one(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        _, stream = await loop.create_connection(
            lambda: _Stream(shared, message, chunks, loop), target.hostname or "", target.port or 80
        )
        try:
            await asyncio.wait_for(stream.ended, chunks / rate * 2 + 20)
        except TimeoutError:
            stream.give_up()

    began = time.perf_counter()
    await asyncio.gather(*(one(number / streams) for number in range(streams)), return_exceptions=True)
    seconds = time.perf_counter() - began
    ttft = sorted(value / 1e6 for value in shared.ttft_ns)
    delays = sorted(value / 1e6 for value in shared.delays_ns)
    return Result(
        streams=streams,
        good=shared.good,
        chunks=shared.chunks,
        seconds=round(seconds, 3),
        chunks_per_second=round(shared.chunks / seconds, 1),
        ttft_p50_ms=round(percentile(ttft, 0.5), 3),
        ttft_p99_ms=round(percentile(ttft, 0.99), 3),
        delay_p50_ms=round(percentile(delays, 0.5), 3),
        delay_p99_ms=round(percentile(delays, 0.99), 3),
        chunks_per_read=round(shared.chunks / max(1, shared.reads), 3),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.streams", description="Load of paced streams.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=250)
    parser.add_argument("--rate", type=float, default=50.0, help="chunks per second and stream")
    parser.add_argument("--model", default="bench")
    options = parser.parse_args(argv)

    async def measured() -> None:
        result = await load(
            options.url,
            streams=options.streams,
            chunks=options.chunks,
            rate=options.rate,
            model=options.model,
        )
        print(json.dumps(dataclasses.asdict(result)))

    run(measured())


if __name__ == "__main__":
    main()
