"""The requests that were answered last, as far as a simulation needs them: times, lengths, and keys of prompts.

No text is kept, nor anything that a client sent but the keyless digests that routing works with (`routing.prefix`).
They are already made for the decision; that they are kept a little longer costs a request less than a microsecond.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from routing.prefix import Prefix

MAX_REQUESTS = 4_096
"""Per worker. A prompt of 10,000 tokens has about forty keys, 1.5 KB; all together some 6 MB."""
MAX_KEYS = 256
"""Of one prompt, beyond which it is left out: a prompt has so many from 10^12 tokens."""


class Answered(NamedTuple):
    """One answered request. Times are `time.monotonic()` seconds, the same clock for all workers of a machine."""

    at: float
    """When it was sent to its replica."""
    model: str
    prefix: Prefix | None
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    priority: int
    first_content_at: float | None
    ended_at: float
    replica: str


AsKept = tuple[float, str, Prefix | None, int, int | None, int, int, float | None, float, str]
"""The fields of an `Answered`: a plain tuple is made in a fifth of the time."""


class Traffic:
    """One worker's."""

    def __init__(self, size: int = MAX_REQUESTS) -> None:
        self._kept: deque[AsKept] = deque(maxlen=size)
        self.note: Callable[[AsKept], None] = self._kept.append

    @property
    def kept(self) -> list[AsKept]:
        """A copy, that a thread can go through."""
        return list(self._kept)

    def counts(self) -> Counter[str]:
        """How many there are, by model."""
        return Counter(each[1] for each in self._kept)


def rows_of(kept: Sequence[AsKept], model: str, limit: int) -> list[dict[str, Any]]:
    """At most `limit` requests of a model as plain data, the last ones, in order of their end."""
    found: list[dict[str, Any]] = []
    for fields in reversed(kept):
        if len(found) >= limit:
            break
        if fields[1] == model:
            found.append(_row(Answered(*fields)))
    return found[::-1]


def _row(each: Answered) -> dict[str, Any]:
    prefix = each.prefix
    return {
        "at": each.at,
        "prompt_tokens": each.prompt_tokens,
        "cached_tokens": each.cached_tokens,
        "output_tokens": each.output_tokens,
        "priority": each.priority,
        "ttft_ms": None if each.first_content_at is None else (each.first_content_at - each.at) * 1000,
        "total_ms": (each.ended_at - each.at) * 1000,
        "prefix": None
        if prefix is None or len(prefix.digests) > MAX_KEYS
        else {
            "digests": prefix.digests,
            "ends": prefix.ends,
            "total": prefix.total,
            "tails": prefix.tails,
            "unit_tokens": prefix.unit_tokens,
        },
    }
