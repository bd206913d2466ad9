"""What one worker knows of a model's most used prompt beginnings and adapters, from a sample of its requests.

The prompts of the sampled requests are held in memory, at most 64 and 8 MiB of them for a model (`routing.hot`), and
are sent to the model's own replicas only. They are neither logged nor shown, and another worker never sees them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from backends.dialects.protocol import CHAT, COMPLETIONS
from routing.hot import HALF_LIFE_S, Hot, HotPrefixes
from routing.prefix import Prefix

if TYPE_CHECKING:
    from gateway.order import Order

SAMPLED = 32
"""One request in so many is counted at last, by chance: at a fixed step, clients that take turns could hide from it."""
QUICK = 16
"""So many are counted before one more is passed over for each: a gateway that was just started learns from its first
requests, and a busy one has enough of them."""
MAX_ADAPTERS = 256


@dataclass(frozen=True, slots=True)
class Kept:
    """One request, as far as it takes to have a replica read its prompt."""

    path: str
    body: bytes
    """As the client sent it."""
    prefix: Prefix
    adapter: str | None
    tenant: str


class HotPrompts:
    """Of one model, its adapters included."""

    __slots__ = ("_adapters", "_keeps_prompts", "_prefixes", "_rng", "_taken", "_until_next")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._taken = 0
        self._until_next = 1
        self._prefixes: HotPrefixes[Kept] = HotPrefixes()
        self._adapters: dict[str, tuple[float, float]] = {}
        """By name: how often it was wanted, faded, and when that was last reckoned."""
        self._keeps_prompts = True

    def configure(self, keeps_prompts: bool) -> None:
        """Whether prompts may be kept; those that are there are dropped otherwise."""
        self._keeps_prompts = keeps_prompts
        if not keeps_prompts:
            self._prefixes = HotPrefixes()

    def note(self, order: Order, tenant: str) -> None:
        """A request has ended well."""
        self._until_next -= 1
        if self._until_next <= 0:
            self._taken += 1
            self._until_next = self._rng.randrange(1, 2 * min(SAMPLED, 1 + self._taken // QUICK))
            self._take(order, tenant, time.monotonic())

    def _take(self, order: Order, tenant: str, now: float) -> None:
        request = order.request
        if request.adapter is not None:
            self._note_adapter(request.adapter, now)
        prefix = request.prefix
        if prefix is None or not self._keeps_prompts or order.path not in (CHAT, COMPLETIONS):
            return
        digest = self._prefixes.count(prefix.digests, now)
        body = order.body.raw
        if digest is not None and self._prefixes.wants(digest, request.regions, len(body), now):
            kept = Kept(order.path, body, prefix, request.adapter, tenant)
            self._prefixes.keep(digest, request.regions, kept, len(body), now)

    def _note_adapter(self, adapter: str, now: float) -> None:
        if adapter not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
            del self._adapters[min(self._adapters, key=lambda name: self._uses(name, now))]
        self._adapters[adapter] = (self._uses(adapter, now) + 1.0, now)

    def _uses(self, adapter: str, now: float) -> float:
        count, at = self._adapters.get(adapter, (0.0, now))
        return float(count * 2.0 ** ((at - now) / HALF_LIFE_S))

    def hottest(self, most: int, region: str | None, now: float) -> list[Hot[Kept]]:
        """The most used beginnings that may be sent to a region, the hottest first."""
        return self._prefixes.hottest(most, now, region)

    def adapters(self, now: float) -> dict[str, float]:
        """How often each was wanted of late."""
        return {name: self._uses(name, now) for name in self._adapters}

    @property
    def held(self) -> tuple[int, int]:
        """How many prompts are kept, and their bytes."""
        return self._prefixes.sample_count, self._prefixes.sample_bytes
