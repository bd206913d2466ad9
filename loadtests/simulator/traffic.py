"""What is sent: requests with their prompts as cache segments, ready for any policy, and workloads made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from loadtests.simulator.cache import Path
from routing.keys import BLOCK_TOKENS, TAILS, checkpoints
from routing.prefix import Digest, Prefix
from routing.types import InferenceRequest

MODEL = "model"
_ENDS = [block * BLOCK_TOKENS for block in checkpoints(1 << 14)]


@dataclass(slots=True)
class Job:
    """One request as the world knows it, what no gateway knows included: how long the answer will be."""

    index: int
    at: float
    """When it is sent, in seconds; jobs with `after` are sent then or later."""
    path: Path
    prompt_tokens: int
    output_tokens: int
    answer: int
    """Segment that the answer becomes in the engine's cache."""
    prefix: Prefix
    max_output_tokens: int | None = None
    session: str | None = None
    adapter: str | None = None
    origin: str = ""
    """Region of the gateway that receives it."""
    regions: tuple[str, ...] = ()
    priority: int = 1
    ms_per_usd: float = 0.0
    after: int | None = None
    """Index of the job whose answer its prompt contains."""
    pause_s: float = 0.5
    """It is sent this long after that one's end at the earliest."""
    gateway: float = 0.0
    """0 to 1: which of several gateways of its region receives it."""

    def request(self) -> InferenceRequest:
        return InferenceRequest(
            str(self.index),
            MODEL,
            stream=True,
            prompt_bytes=4 * self.prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            regions=self.regions,
            adapter=self.adapter,
            prompt_tokens=self.prompt_tokens,
            prefix=self.prefix,
            session=self.session,
            priority=self.priority,
            ms_per_usd=self.ms_per_usd,
        )


@dataclass(slots=True)
class Workload:
    name: str
    jobs: list[Job]
    """In order of `at`."""
    slo_ttft_ms: float = 2000.0
    slo_tpot_ms: float = 100.0
    adapters: tuple[str, ...] = ()
    warm_s: float = 0.0
    """Until then less is going on than there will be."""


Source: TypeAlias = Callable[[int, float, Random], Workload]
"""Makes a workload of so many requests at so many per second (in the mean)."""


def prefix_of(path: Path, ends: Sequence[int] = ()) -> Prefix:
    """The keys of a prompt as `routing.keys.token_prefix` would place them: checkpoints, the whole prompt and the last
    three of `ends`, the positions where parts of it end that a former prompt may have ended with.

    The key at a position is drawn from the segment that it lies in, which stands for all that is before it.
    """
    total = sum(length for _, length in path)
    digests: list[Digest] = []
    positions: list[int] = []
    number = begin = 0
    segment, length = path[0]
    for position in _ENDS:
        if position > total:
            break
        while position > begin + length:
            begin += length
            number += 1
            segment, length = path[number]
        digests.append(_mix(segment, position))
        positions.append(position)
    tails = [(_mix(path[-1][0], total), total)]
    last = sorted({end for end in ends if 0 < end < total}, reverse=True)[: TAILS - 1]
    tails.extend((_mix(_segment_at(path, end), end), end) for end in last)
    return Prefix(digests, positions, total, tails, 1.0)


def _segment_at(path: Path, end: int) -> int:
    for segment, length in path:
        end -= length
        if end <= 0:
            return segment
    raise ValueError("the end lies beyond the prompt")


def _mix(segment: int, position: int) -> Digest:
    """A 64-bit key of both: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (segment * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFF_FFFF_FFFF_FFFF
    return value ^ (value >> 31)


def poisson(count: int, per_s: float, rng: Random) -> list[float]:
    """Arrival times of `count` requests."""
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(per_s)
        times.append(now)
    return times
