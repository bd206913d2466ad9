"""Until when a model is not to be asked for: what a server's `Retry-After` says, kept.

Pauses are kept by model, since providers limit each model by itself: for a rented server with the key that it was said
to, which other servers are called with as well; for an own one with the replica. They are one process's: others learn
of a limit when they meet it.
"""

from __future__ import annotations

MAX_PAUSE_S = 300.0
"""Longest that a server is believed (Envoy's `rate_limited_reset_headers` drops longer ones; here they are cut)."""


class Pauses:
    """The pauses of one key, or of one replica. `now` is seconds of any one monotonic clock."""

    __slots__ = ("_until", "latest")

    def __init__(self) -> None:
        self.latest = 0.0
        """End of the last of them: after it nothing is paused, which is all that a request has to look at."""
        self._until: dict[str, float] = {}

    def begin(self, model: str, length_s: float, now: float) -> float:
        """Pause a model for 0 to 300 s; what is longer is cut. The end: a pause is made longer, never shorter."""
        until = now + min(max(0.0, length_s), MAX_PAUSE_S)
        before = self._until.get(model, 0.0)
        if until <= max(before, now):
            return before
        if before <= now:  # as good a time as any to forget: there are as many as models that were ever limited
            self._until = {each: end for each, end in self._until.items() if end > now}
        self._until[model] = until
        self.latest = max(self.latest, until)
        return until

    def until(self, model: str, now: float) -> float:
        """When the model's pause ends; 0.0 when it is not paused."""
        if now >= self.latest:
            return 0.0
        end = self._until.get(model, 0.0)
        return end if end > now else 0.0

    def running(self, now: float) -> dict[str, float]:
        """The models that are paused, with the end of each."""
        return {model: end for model, end in self._until.items() if end > now}
