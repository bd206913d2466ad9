"""Says once that something is away, and once that it is back. What lasts for a moment only is not worth a line."""

from __future__ import annotations

import logging

from gateway.store.protocol import StoreError

logger = logging.getLogger(__name__)

WORTH_S = 1.0


class Outage:
    """Whether peers can be heard. `now` is in seconds and never goes back."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.said = False

    def failed(self, error: StoreError, now: float) -> None:
        """An attempt has failed."""
        if self._since is None:
            self._since = now
        elif not self.said and now - self._since >= WORTH_S:
            self.said = True
            logger.warning("%s; other workers are not heard, replicas are chosen by this worker's own counts", error)

    def ended(self, now: float) -> None:
        """An attempt has succeeded."""
        if self.said and self._since is not None:
            logger.warning("other workers are heard again after %.1f s", now - self._since)
        self._since = None
        self.said = False
