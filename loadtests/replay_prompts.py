"""Prompts for the rows of a trace: text of about the right length, equal where the trace says prompts are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from loadtests.real_chats_plan import WORDS
from loadtests.simulator.traces import BLOCK_TOKENS, Row, quantum, read_trace

MAX_KEPT_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a replay."""

    at_s: float
    """Since the first one."""
    number: int
    """Of the row, in order of time."""
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    block_tokens: int

    def messages(self) -> list[dict[str, str]]:
        """A system message with the first block, and the rest of the prompt as one question.

        A prompt of which the trace says nothing but its length is like no other.
        """
        if not self.blocks:
            return [{"role": "user", "content": text_of(f"row {self.number}", self.prompt_tokens)}]
        texts = [block_text(block, self.block_tokens) for block in self.blocks]
        # Words take four bytes, so the cut falls between two of them.
        whole = "".join(texts)[: 4 * self.prompt_tokens]
        first = len(texts[0])
        system, question = whole[:first], whole[first:]
        if not question:
            return [{"role": "user", "content": system}]
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def text_of(seed: str, tokens: int) -> str:
    """So many words of three letters, each with a blank; the same for the same seed in any process."""
    words = Random(seed).choices(WORDS, k=tokens)
    return " ".join(words) + " " if words else ""


@lru_cache(maxsize=MAX_KEPT_BLOCKS)
def block_text(block: int, tokens: int) -> str:
    return text_of(f"block {block}", tokens)


def arrivals(rows: Sequence[Row], *, speed: float, scale: float, output_scale: float, seed: int = 0) -> list[Arrival]:
    """Rows as requests, `speed` times as fast, with prompts and answers scaled to so much of their length.

    Times that come in steps (of 3 s in some of Mooncake's traces) are spread over the step.
    """
    step, rng = quantum(rows), Random(seed)
    timed = sorted(((row.at + rng.random() * step, number) for number, row in enumerate(rows)))
    first = timed[0][0]
    block_tokens = max(1, round(BLOCK_TOKENS * scale))
    return [
        Arrival(
            (at - first) / speed,
            number,
            max(1, round(rows[number].prompt_tokens * scale)),
            max(1, round(rows[number].output_tokens * output_scale)),
            rows[number].blocks,
            block_tokens,
        )
        for at, number in timed
    ]


def from_trace(path: Path, *, limit: int | None, speed: float, scale: float, output_scale: float) -> list[Arrival]:
    """The first `limit` requests of a trace of either kind. Raises `TraceError`."""
    return arrivals(read_trace(path, limit), speed=speed, scale=scale, output_scale=output_scale)
