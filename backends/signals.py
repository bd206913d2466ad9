"""Which of an engine's signals are there, learned from its answers rather than assumed.

A signal that an engine does not give is done without, and that is said once in the log, with the reason and the cure
where there is one. It is said again only after the engine had begun to give it.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

CACHED_TOKENS = "cached_tokens"
LOAD = "load"
ADAPTERS = "adapters"
INFO = "info"
KV_EVENTS = "kv_events"
GPUS = "gpus"


class Signals:
    """What one replica was found to be without."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._lacking: dict[str, str] = {}
        self.refused_fields: set[str] = set()
        """Body fields the gateway would add and this server refuses; they are left out from then on."""

    @property
    def lacking(self) -> dict[str, str]:
        """The missing signals, each with the reason."""
        return dict(self._lacking)

    def lacks(self, signal: str, reason: str) -> None:
        """Note that a signal is missing. Logged the first time, and again only when the reason is another."""
        if self._lacking.get(signal) != reason:
            self._lacking[signal] = reason
            logger.info("replica %s gives no %s: %s", self._replica, signal, reason)

    def has(self, signal: str) -> None:
        """Note that it is there."""
        self._lacking.pop(signal, None)

    def saw_usage(self, cached_tokens: int | None) -> None:
        """Note whether an answer said how much of its prompt was cached."""
        if cached_tokens is None:
            if CACHED_TOKENS not in self._lacking:
                self.lacks(CACHED_TOKENS, "its answers do not say how many prompt tokens were cached")
        elif self._lacking:
            self.has(CACHED_TOKENS)

    def refuses_field(self, name: str, said: str) -> None:
        """Leave a field out from now on, because the server answered that it does not know it."""
        self.refused_fields.add(name)
        logger.warning("replica %s refuses the field %r, which is left out from now on: %s", self._replica, name, said)
