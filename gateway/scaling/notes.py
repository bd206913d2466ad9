"""What one worker tells of a pool, as a notice `demand/<pool>/<worker>` in JSON."""

from __future__ import annotations

from math import isfinite
from typing import TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

BOUNDS_MS = tuple(1.2**power for power in range(76))
"""Of the buckets in which waits and first tokens are told: a fifth apart, from 1 ms to a quarter of an hour."""
MOST = 1e15
"""Of anything that a worker counts in its life."""


class ReplicaRow(msgspec.Struct, array_like=True, frozen=True):
    """One replica as one worker sees it."""

    name: str
    identity: str
    """Of `routing.types.Replica`: the key of facts about it."""
    in_flight: int
    """This worker's own."""
    reason: str = ""
    """Why it gets no new work; empty: it does. One that is only full gets some soon, and is told as well."""
    draining: bool = False
    kv_use: float | None = None
    capacity: int | None = None
    """Requests that it runs at once."""
    warm_tokens: int = 0
    """Prompt tokens that it is believed to hold."""


class PoolDemand(msgspec.Struct, frozen=True):
    """One pool, by one worker. Counts are from the beginning of its `life`."""

    life: str
    """Another one for each start of a worker, and for each time the pool gets a scaling anew."""
    age_s: float
    arrivals: int = 0
    arrival_tokens: float = 0.0
    """Prompts and expected answers of these."""
    served: int = 0
    served_tokens: float = 0.0
    spilled: int = 0
    spill_usd: float = 0.0
    waiting: int = 0
    waits: dict[int, int] = {}
    """Requests of the last half minute, and those in line, by the bucket of their wait."""
    ttfts: dict[int, int] = {}
    """The same of first tokens, waiting included."""
    predicted_ttft_ms: float | None = None
    replicas: list[ReplicaRow] = []

    @property
    def plausible(self) -> bool:
        """Whether nothing in it is below nothing, or more than there can be."""
        found = [self.age_s, self.arrivals, self.arrival_tokens, self.served, self.served_tokens, self.spilled]
        found += [self.spill_usd, self.waiting, self.predicted_ttft_ms or 0.0, *self.waits.values()]
        found += self.ttfts.values()
        for row in self.replicas:
            found += [row.in_flight, row.kv_use or 0.0, row.capacity or 0, row.warm_tokens]
        places = [*self.waits, *self.ttfts]
        return all(isfinite(each) and 0 <= each <= MOST for each in found) and all(
            0 <= each < len(BOUNDS_MS) for each in places
        )


def read_note(value: bytes | None, kind: type[S]) -> S | None:
    """A notice out of the store; None: there is none, it is another version's, or nobody's at all."""
    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
