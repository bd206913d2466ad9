"""How often an address may show keys that open nothing.

A key cannot be guessed: it has 256 random bits, or at least 16 bytes of the operator's. What is bounded here is what
guessing costs others: log lines, counters, and the answers themselves. Only requests *without* a valid key are refused:
behind a balancer or a NAT everybody has one address, and one client with an old key must not lock out the rest.
"""

from __future__ import annotations

import ipaddress
from math import ceil

PER_S = 10.0
BURST = 50.0
MAX_ADDRESSES = 4096
"""Remembered at once. The one that has failed least lately makes room; who comes anew begins with a full burst."""


class FailedKeys:
    """A token bucket for each address, of a /64 for IPv6, where one machine has that many."""

    def __init__(self, per_s: float = PER_S, burst: float = BURST) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now: float) -> float:
        """One more has failed at `now` (monotonic seconds). Seconds until the next may; 0: this one is told why."""
        place = network_of(address)
        tokens, at = self._buckets.pop(place, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._per_s)
        if len(self._buckets) >= MAX_ADDRESSES:
            del self._buckets[next(iter(self._buckets))]
        if tokens < 1:
            self._buckets[place] = (tokens, now)
            return ceil((1 - tokens) / self._per_s * 1000) / 1000
        self._buckets[place] = (tokens - 1, now)
        return 0.0


def network_of(address: str) -> str:
    """The address, or the /64 of one of IPv6, where one machine has that many."""
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(found.ipv4_mapped or int(found) >> 64)
