"""The prefix keys of one prompt: chained digests at growing positions, by which replicas are asked what they hold.

Each digest covers everything up to its position and the seed (model, weights version, adapter, tenant where caches are
isolated), so equal digests mean equal prefixes. Positions are fixed and grow geometrically: a prompt of 128k tokens has
about fifty. `routing.keys` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Digest: TypeAlias = int
"""64 bits, unsigned."""


@dataclass(slots=True)
class Prefix:
    """Nobody changes one after it was made."""

    digests: list[Digest]
    """At the checkpoints, shortest prefix first."""
    ends: list[int]
    """Position of each digest in units: bytes of the canonical text, or tokens."""
    total: int
    """Units of the whole prompt."""
    tails: list[tuple[Digest, int]]
    """Digest and position at the ends of the last messages, the longest first; the first is the whole prompt. Only that
    one is kept in an index: the next turn of a conversation finds it among its own tails, to the byte, where the
    checkpoints are up to an eighth short."""
    unit_tokens: float = 0.25
    """Tokens per unit, about: 1 where the units are tokens."""
    reaches: list[int] | None = None
    """For each tail, up to where a replica has cached the prompt that holds it: the answer that it gave is cached as
    well, and stands next in this prompt. None: up to the tail."""
