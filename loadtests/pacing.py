"""When a fake engine would have answered: a prefix cache, a queue, and a time for every token.

One `Pace` is one engine. It reads a request's prompt, looks up how much of it is cached, and computes when its first
and its last token come; `loadtests.connection` then plays the answer so. Prompts are worked on one after the other in
the order they come, answers side by side. What is simple here: a request's times are settled when it comes, so those
that come later do not slow it, and one whose client leaves is worked on to its end.

`python -m loadtests.pacing --port 19001 --port 19002` runs one such engine on each port, with caches of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush
from typing import Any, Protocol

import msgspec
import xxhash

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine, run

TOKEN_BYTES = 4
"""A token of a fake engine is so much text. `loadtests.replay_prompts` writes words of that length."""
BLOCK_TOKENS = 64
"""What is cached together."""
DEFAULT_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """What an engine can do. The default is a round figure for an 8B model on one GPU."""

    prefill_us: float = 100.0
    """Per uncached prompt token."""
    token_ms: float = 10.0
    """Between two tokens of an answer, for a request alone."""
    running_ms: float = 0.2
    """More for every other request that is being answered."""
    base_ms: float = 10.0
    """Before a first token, whatever the prompt."""
    kv_tokens: int = 400_000
    """What the cache holds. Blocks that are in use are evicted like others: nothing is locked."""
    max_running: int = 64
    """Requests that are worked on at once; more wait."""


class _Body(msgspec.Struct):
    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    prompt: str | list[Any] = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = False


_decode = msgspec.json.Decoder(_Body).decode


class Pace:
    """One engine's cache and queue. Times are `time.monotonic()`, in seconds."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self._blocks: OrderedDict[int, None] = OrderedDict()
        """Digests of what each block ends, the longest unused first."""
        self._prefill_until = 0.0
        self._ends: list[float] = []
        """Of the requests that are being worked on."""

    @property
    def cached_tokens(self) -> int:
        """What the cache holds at the moment."""
        return len(self._blocks) * BLOCK_TOKENS

    def __call__(self, body: bytes, behaviour: Behaviour, now: float) -> Behaviour:
        """The behaviour with this request's tokens and times. Raises `msgspec.MsgspecError` for a strange body."""
        found = _decode(body)
        text = b"".join(_pieces(found))
        tokens = max(1, len(text) // TOKEN_BYTES)
        output = found.max_completion_tokens or found.max_tokens or DEFAULT_OUTPUT_TOKENS
        cached = self._look_up(text)
        ttft_s, token_s = self._times(tokens - cached, output, now)
        whole_s = 0.0 if found.stream else (output - 1) * token_s
        return replace(
            behaviour,
            chunks=output,
            prompt_tokens=tokens,
            cached_tokens=cached,
            ttft_s=ttft_s + whole_s,
            interval_s=token_s,
            timestamps=False,
        )

    def _times(self, uncached: int, output: int, now: float) -> tuple[float, float]:
        """Seconds to the first token, and between tokens after that."""
        speed, ends = self.speed, self._ends
        while ends and ends[0] <= now:
            heappop(ends)
        begin = max(now, self._prefill_until)
        if len(ends) >= speed.max_running:  # it gets the place of one of those before it
            begin = max(begin, heappop(ends))
        token_s = (speed.token_ms + speed.running_ms * len(ends)) / 1000.0
        self._prefill_until = first = begin + speed.base_ms / 1000.0 + uncached * speed.prefill_us / 1e6
        heappush(ends, first + (output - 1) * token_s)
        return first - now, token_s

    def _look_up(self, text: bytes) -> int:
        """Cached tokens of the prompt, in whole blocks and never all of it; from now on it is cached."""
        size = BLOCK_TOKENS * TOKEN_BYTES
        hashed = xxhash.xxh3_64()
        digests: list[int] = []
        for end in range(size, len(text) + 1, size):
            hashed.update(text[end - size : end])
            digests.append(hashed.intdigest())
        blocks = self._blocks
        held = next((place for place, digest in enumerate(digests) if digest not in blocks), len(digests))
        for digest in reversed(digests):  # the end of a prompt is to be evicted before its beginning
            blocks[digest] = None
            blocks.move_to_end(digest)
        while len(blocks) > self.speed.kv_tokens // BLOCK_TOKENS:
            blocks.popitem(last=False)
        return min(held * BLOCK_TOKENS, max(0, len(text) // TOKEN_BYTES - 1))


def _pieces(body: _Body) -> Iterator[bytes]:
    """What a chat template would make of it, nearly."""
    for message in body.messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        yield f"<{message.get('role')}>{content}".encode()
    if body.prompt:
        yield body.prompt.encode() if isinstance(body.prompt, str) else repr(body.prompt).encode()


# -- the command line


class _Options(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **said: Any) -> argparse.Action: ...


def speed_arguments(parser: _Options) -> None:
    """Add an option for every field of `Speed`."""
    for field in fields(Speed):
        kind = int if isinstance(field.default, int) else float
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=field.default, help=f"of a fake engine (default {field.default})")


def speed_of(options: argparse.Namespace) -> Speed:
    return Speed(**{field.name: getattr(options, field.name) for field in fields(Speed)})


async def _serve(ports: Sequence[int], speed: Speed, model: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        for port in ports:
            engine = FakeEngine(ports=(port,), models=(model,), record=False)
            engine.pace = Pace(speed)
            await stack.enter_async_context(engine)
        gc.freeze()
        await stopping.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.pacing", description="Fake engines that take their time."
    )
    parser.add_argument("--port", type=int, action="append", required=True, help="one engine each; may be repeated")
    parser.add_argument("--model", default="fake-model")
    speed_arguments(parser)
    options = parser.parse_args(argv)
    run(_serve(options.port, speed_of(options), options.model))


if __name__ == "__main__":
    main()
