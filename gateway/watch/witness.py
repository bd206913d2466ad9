"""What requests show about the replicas that served them. On the way of every request, so it is short.

The evidence goes to the replica's own health machine (`routing.health`), which decides; what changes is logged here,
counted, and told to whoever shares it with other workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from gateway.verdict import Verdict
from routing.credential import Credential
from routing.health import Change, Evidence
from routing.observing import observe
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

    def answered(self, replica: Replica, pool: Sequence[Replica], key: Credential | None = None) -> None:
        """Content of a stream has come, or a whole answer. `key`: which one it was asked with, if it has several."""
        now = time.monotonic()
        change = observe(replica, pool, Evidence.ANSWERED, now)
        if replica.meter.learned is not None:
            replica.meter.answered(_in_flight(replica), now)
        if replica.credential is not None:
            replica.credential.accepted(key)
        if change is not None:
            self.changed(replica, change, "it answers again")

    def failed(
        self, replica: Replica, pool: Sequence[Replica], verdict: Verdict, key: Credential | None = None
    ) -> None:
        """An attempt ended otherwise."""
        now = time.monotonic()
        if verdict.credential_refused:
            self._refused(replica, verdict.credential_refused, now, key)
        if verdict.evidence is None:
            return
        seen = (replica.pool, replica.name, verdict.evidence.value)
        self.evidence[seen] = self.evidence.get(seen, 0) + 1
        # What one of several keys may do is not what the server takes: the next key has its own limit.
        if verdict.evidence in (Evidence.OVERLOADED, Evidence.STALLED) and not (verdict.limits_key and key is not None):
            self._note_refusal(replica, now, said=verdict.evidence is Evidence.OVERLOADED)
        change = observe(replica, pool, verdict.evidence, now)
        if change is not None:
            # Not in the engine's own words, which may quote a prompt.
            self.changed(replica, change, str(verdict.cause or verdict.error.code))

    def _refused(self, replica: Replica, status: int, now: float, key: Credential | None) -> None:
        ring = replica.credential
        if ring is not None and ring.refused(now, status, key):
            key = key or ring.keys[0]
            which = f"key {key.position} of {len(ring.keys)}" if len(ring.keys) > 1 else "key"
            logger.warning(
                "pool %s: %s refuses the %s (%d); it is not used for %.0f s",
                replica.pool,
                replica.name,
                which,
                status,
                key.until - now,
            )

    def _note_refusal(self, replica: Replica, now: float, *, said: bool) -> None:
        """It is too busy, or silent as if it were: its limit falls, where nobody says what it takes."""
        before = replica.meter.capacity.requests
        replica.meter.refused(_in_flight(replica), now, said=said)
        after = replica.meter.capacity.requests
        if before is None and after is not None:
            logger.info(
                "replica %s refuses work: it gets %d requests at once, and more as it takes them", replica.name, after
            )

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


def _in_flight(replica: Replica) -> int:
    """Requests there, those of other gateways included, as far as they tell."""
    work = replica.work
    return max(replica.in_flight, work.queued + work.running)
