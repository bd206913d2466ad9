"""What requests show about the replicas that served them. On the way of every request, so it is short.

The evidence goes to the replica's own health machine (`routing.health`), which decides; what changes is logged here,
counted, and told to whoever shares it with other workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from gateway.verdict import Verdict
from routing.health import Change, Evidence, observe
from routing.types import Replica

logger = logging.getLogger(__name__)


class Witness:
    """One worker's account of its replicas."""

    def __init__(self) -> None:
        self.on_change: Callable[[Replica, Change], None] | None = None
        """Told of every change, after it was logged."""
        self.changes: dict[tuple[str, str, str], int] = {}
        """How often each change was seen, by pool, replica and change."""
        self.evidence: dict[tuple[str, str, str], int] = {}
        """How often each kind of evidence other than an answer was seen, by pool, replica and evidence."""

    def answered(self, replica: Replica, pool: Sequence[Replica]) -> None:
        """Content of a stream has come, or a whole answer."""
        change = observe(replica, pool, Evidence.ANSWERED, time.monotonic())
        if replica.credential is not None:
            replica.credential.accepted()
        if change is not None:
            self.changed(replica, change, "it answers again")

    def failed(self, replica: Replica, pool: Sequence[Replica], verdict: Verdict) -> None:
        """An attempt ended otherwise."""
        now = time.monotonic()
        if (
            verdict.credential_refused
            and replica.credential is not None
            and replica.credential.refused(now, verdict.credential_refused)
        ):
            logger.warning(
                "pool %s: %s refuses the key (%d); the key is not used for %.0f s",
                replica.pool,
                replica.name,
                verdict.credential_refused,
                replica.credential.until - now,
            )
        if verdict.evidence is None:
            return
        key = (replica.pool, replica.name, verdict.evidence.value)
        self.evidence[key] = self.evidence.get(key, 0) + 1
        change = observe(replica, pool, verdict.evidence, now)
        if change is not None:
            self.changed(replica, change, str(verdict.cause or verdict.error.message))

    def changed(self, replica: Replica, change: Change, why: str, *, told: bool = False) -> None:
        """Log, count and pass on a change of a replica's health; what others told is not passed on."""
        key = (replica.pool, replica.name, change.value)
        self.changes[key] = self.changes.get(key, 0) + 1
        match change:
            case Change.EJECTED:
                logger.warning("replica %s is ejected: %s", replica.name, why)
            case Change.SPARED:
                logger.warning(
                    "replica %s fails, and stays in use because half of its pool is ejected already, or it is the "
                    "last one: %s",
                    replica.name,
                    why,
                )
            case Change.UNREACHABLE:
                # Said once: as long as it stays away, every pause is followed by another.
                level = logging.WARNING if replica.cooldown.failures <= 1 else logging.DEBUG
                logger.log(level, "replica %s fails: %s", replica.name, why)
            case Change.RECOVERED:
                logger.info("replica %s is back: %s", replica.name, why)
        if self.on_change is not None and not told:
            self.on_change(replica, change)
