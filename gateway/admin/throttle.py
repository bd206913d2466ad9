"""How often logging in may fail: from one address, and altogether.

Tokens have at least 128 bits and cannot be guessed; what is bounded is what trying costs. While an address (or
everyone together) has failed too often, logging in is refused without looking at what was sent, right or wrong. A
bearer token in a header is never refused for that: whoever is locked out of the dashboard by somebody else's attempts
has the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.keys.failures import network_of

PER_ADDRESS_S, PER_ADDRESS_BURST = 1 / 12, 5.0
"""Five at once, then five a minute."""
OVERALL_S, OVERALL_BURST = 0.5, 30.0
MAX_ADDRESSES = 4096
"""Remembered at once; the one that failed least lately makes room, and the bound on all together stays."""


@dataclass(slots=True)
class _Bucket:
    """A token bucket (https://en.wikipedia.org/wiki/Token_bucket) that begins full."""

    per_s: float
    burst: float
    tokens: float
    at: float

    def wait_s(self, now: float) -> float:
        self.tokens = min(self.burst, self.tokens + max(0.0, now - self.at) * self.per_s)
        self.at = max(self.at, now)
        return max(0.0, (1 - self.tokens) / self.per_s)


class Throttle:
    """Failed logins. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._overall = _Bucket(OVERALL_S, OVERALL_BURST, OVERALL_BURST, now)
        self._buckets: dict[str, _Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: str, now: float) -> float:
        """Seconds until somebody from there may try again; 0: at once."""
        own = self._buckets.get(network_of(address))
        return max(self._overall.wait_s(now), 0.0 if own is None else own.wait_s(now))

    def failed(self, address: str, now: float) -> None:
        """Somebody from there has failed."""
        place = network_of(address)
        own = self._buckets.pop(place, None) or _Bucket(PER_ADDRESS_S, PER_ADDRESS_BURST, PER_ADDRESS_BURST, now)
        if len(self._buckets) >= MAX_ADDRESSES:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[place] = own
        for bucket in (own, self._overall):
            bucket.wait_s(now)
            bucket.tokens = max(0.0, bucket.tokens - 1)
