"""Record what a real engine takes for a designed set of requests: the ground that `loadtests.fits.fit` stands on.

    python -m loadtests.fits.record --url http://127.0.0.1:31000 --name sglang-cpu --note "how it was started" \\
        --chunk 2048 --kv-tokens 65536 --max-running 8 --out loadtests/fits/recorded/sglang-cpu.jsonl.gz

Talks to the engine itself, without a gateway, in token ids, so that lengths are exact. Five phases:

    alone    uncached prompts of all lengths, one after the other
    cached   a long prompt again with a little more at its end
    batch    1 to 8 answers side by side, from short and from long prompts: time per token at a known batch
    join     a prompt that comes while others are being answered
    mixed    clients that each ask again when answered, lengths at random: never fitted, only predicted

The file has a header line and a line per request: times in milliseconds from the start of the run, tokens, and the gaps
between the tokens of the answer in tenths of a millisecond.

With `--pid` there are two clocks: that of the wall, and the processor time that the engine's processes have used. On a
machine with other things to do the second is the one to fit: an engine with one thread that is busy all the time uses
as much of it as the wall would show on a machine of its own. Gaps are then in processor time too.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

LENGTHS = (64, 128, 256, 512, 1024, 2048, 3072, 4096)
TAILS = (16, 64, 256)
BATCHES = (1, 2, 3, 4, 6, 8)
ANSWER_S = 300.0
_LOWEST_TOKEN, _HIGHEST_TOKEN = 300, 2000
"""Ordinary words in any vocabulary the recorder is used with."""


class RecordError(Exception):
    """The engine did not answer as it should; the message says what it said."""


@dataclass(slots=True)
class Row:
    """One request."""

    phase: str
    sent_ms: float
    first_ms: float = 0.0
    last_ms: float = 0.0
    prompt: int = 0
    cached: int = 0
    output: int = 0
    others: int = 0
    """Requests in flight when it was sent."""
    gaps: list[int] = field(default_factory=list)
    sent_cpu_ms: float = 0.0
    first_cpu_ms: float = 0.0
    last_cpu_ms: float = 0.0

    def line(self) -> str:
        times = [round(each, 1) for each in (self.sent_ms, self.first_ms, self.last_ms)]
        times += [round(each, 1) for each in (self.sent_cpu_ms, self.first_cpu_ms, self.last_cpu_ms)]
        return json.dumps(
            [self.phase, *times, self.prompt, self.cached, self.output, self.others, self.gaps], separators=(",", ":")
        )


class Recorder:
    """Sends requests to one engine and keeps their rows."""

    def __init__(self, url: str, model: str, rng: Random, scale: float, pids: Sequence[int] = ()) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model = model
        self._scale = scale
        self.rng = rng
        self.rows: list[Row] = []
        self._busy = 0
        self._start = time.perf_counter()
        # The clock of another process's processor time, as clock_getcpuclockid(3) makes it up on Linux.
        self._clocks = [(~pid << 3) | 2 for pid in pids]

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randrange(_LOWEST_TOKEN, _HIGHEST_TOKEN) for _ in range(length)]

    def times(self, count: int) -> int:
        return max(1, round(count * self._scale))

    async def ask(self, phase: str, prompt: Sequence[int], output: int) -> Row:
        """Send one, read its answer to the end."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "cache_prompt": True,
        }
        payload = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        row = Row(phase, self._now(), prompt=len(prompt), others=self._busy, sent_cpu_ms=self._cpu())
        self._busy += 1
        try:
            writer.write(head.encode() + payload)
            async with asyncio.timeout(ANSWER_S):
                await self._read(reader, row)
        finally:
            self._busy -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        self.rows.append(row)
        return row

    async def _read(self, reader: asyncio.StreamReader, row: Row) -> None:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RecordError(f"the engine answered {status!r}: {(await reader.read(2000))!r}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if any(choice.get("text") for choice in event.get("choices", ())):
                now, cpu = self._now(), self._cpu()
                if not row.first_ms:
                    row.first_ms, row.first_cpu_ms = now, cpu
                else:
                    row.gaps.append(round((cpu - row.last_cpu_ms) * 10))
                row.last_ms, row.last_cpu_ms = now, cpu
            usage = event.get("usage")
            if usage:
                row.prompt, row.output = usage["prompt_tokens"], usage["completion_tokens"]
                row.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if not row.first_ms:
            raise RecordError("an answer without content")

    def _now(self) -> float:
        return (time.perf_counter() - self._start) * 1000.0

    def _cpu(self) -> float:
        if not self._clocks:
            return self._now()
        return sum(time.clock_gettime_ns(clock) for clock in self._clocks) / 1e6


def family(pid: int) -> list[int]:
    """The process and all that descend from it. Linux only."""
    pids = [pid]
    for each in pids:
        for task in Path(f"/proc/{each}/task").iterdir():
            pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


async def alone(recorder: Recorder) -> None:
    lengths = list(LENGTHS) * recorder.times(5)
    recorder.rng.shuffle(lengths)  # what else the machine does then falls on all lengths alike
    for length in lengths:
        await recorder.ask("alone", recorder.prompt(length), 8)


async def cached(recorder: Recorder) -> None:
    for length in (512, 1024, 2048, 3072, 4096) * recorder.times(2):
        prefix = recorder.prompt(length)
        await recorder.ask("alone", prefix, 1)
        for tail in TAILS:
            await recorder.ask("cached", prefix + recorder.prompt(tail), 4)


async def batch(recorder: Recorder) -> None:
    for count in BATCHES * recorder.times(1):
        for length in (64, 1024, 3072):
            await asyncio.gather(*(recorder.ask("batch", recorder.prompt(length), 96) for _ in range(count)))


async def join(recorder: Recorder) -> None:
    for count in (1, 3, 6) * recorder.times(1):
        running = [asyncio.create_task(recorder.ask("join", recorder.prompt(256), 160)) for _ in range(count)]
        await asyncio.sleep(0.5)
        for length in (64, 512, 2048):
            await recorder.ask("join", recorder.prompt(length), 2)
        await asyncio.gather(*running)


async def mixed(recorder: Recorder) -> None:
    rng = recorder.rng

    async def client() -> None:
        prefix = recorder.prompt(rng.choice((256, 1024)))
        for _ in range(recorder.times(6)):
            prefix = prefix + recorder.prompt(round(2 ** rng.uniform(5, 10)))
            await recorder.ask("mixed", prefix, round(2 ** rng.uniform(2, 6.5)))

    for count in (3, 8):
        await asyncio.gather(*(client() for _ in range(count)))


PHASES = (alone, cached, batch, join, mixed)


async def record(recorder: Recorder) -> None:
    for _ in range(3):
        await recorder.ask("warm", recorder.prompt(300), 8)
    recorder.rows.clear()
    for phase in PHASES:
        await phase(recorder)
        print(f"{phase.__name__}: {len(recorder.rows)} requests so far, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.fits.record", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True, help="of the engine, in engines.json")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--note", default="", help="how the engine was started; kept in the header")
    parser.add_argument("--pid", type=int, help="of the engine, to use its processor time")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunk", type=int, required=True, help="prompt tokens that it takes per step")
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--max-running", type=int, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of requests")
    arguments = parser.parse_args(argv)
    recorder = Recorder(
        arguments.url, arguments.model, Random(1), arguments.scale, family(arguments.pid) if arguments.pid else ()
    )
    before = os.getloadavg()
    asyncio.run(record(recorder))
    header = {
        "name": arguments.name,
        "note": arguments.note,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "cores": os.cpu_count(),
        "load_average": [before[0], *os.getloadavg()],
        "processor_time": bool(arguments.pid),
        "chunk": arguments.chunk,
        "kv_tokens": arguments.kv_tokens,
        "max_running": arguments.max_running,
        "columns": "phase sent_ms first_ms last_ms sent_cpu_ms first_cpu_ms last_cpu_ms prompt cached output others "
        "gaps_tenths_ms",
    }
    with gzip.open(arguments.out, "wt", encoding="utf-8") as file:
        file.write("\n".join([json.dumps(header), *(row.line() for row in recorder.rows)]) + "\n")
    print(f"{len(recorder.rows)} requests, {arguments.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
