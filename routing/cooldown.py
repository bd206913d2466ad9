"""How long to leave a replica alone whose connections are refused.

gRPC's connection back-off with shorter numbers (there 1 s, times 1.6, up to 120 s): a refused connection is cheap,
and a server that is back should not wait for work.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_COOLDOWN_S = 0.5
MAX_COOLDOWN_S = 10.0
_DOUBLINGS = 16
"""More than it takes to reach the maximum; unbounded, the power overflows after some hours of a dead fleet."""


@dataclass(slots=True)
class Cooldown:
    """A pause that doubles with every failure in a row and ends at once with a success.

    With the defaults: 0.5 s, 1 s, 2 s, 4 s, 8 s, then 10 s. While a pause lasts, further failures (of requests
    that were already under way) do not lengthen it: one dead process is one event, however many requests it held.
    """

    until: float = 0.0
    failures: int = 0

    def active(self, now: float) -> bool:
        return now < self.until

    def failed(self, now: float) -> None:
        if self.active(now):
            return
        self.until = now + min(MAX_COOLDOWN_S, FIRST_COOLDOWN_S * 2.0 ** min(self.failures, _DOUBLINGS))
        self.failures += 1

    def succeeded(self) -> None:
        self.until = 0.0
        self.failures = 0
