"""What attempts and other workers show of one replica, judged among those that could stand in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from routing.evidence import Change, Evidence
from routing.health import Health

_ANSWERED = Evidence.ANSWERED


class Judged(Protocol):
    """What has a health: a replica."""

    @property
    def health(self) -> Health: ...


def observe(replica: Judged, pool: Sequence[Judged], evidence: Evidence, now: float) -> Change | None:
    """Record what one attempt showed, and draw the consequences; what changed, for a log line or a shared fact.

    `pool` holds all replicas that could stand in for this one, itself included: no more than
    `Rules.ejected_share` of it may be out at once, and the rest has to do, however it fails (Envoy's
    `max_ejection_percent`). A pool of one is never ejected.
    """
    health = replica.health
    if evidence is _ANSWERED:
        window = health.window
        # Nearly every call ends here; what follows would change nothing else.
        if health.calm and now < window.ends and not health.cooldown.failures:
            window.answered += 1
            health.progressed_at = now
            return None
        return health.answered(now)
    if evidence is Evidence.REJECTED or evidence is Evidence.OVERLOADED:
        health.alive(now)
        return None
    if evidence is Evidence.UNREACHABLE:
        return health.unreachable(now)
    return health.failed(now, _room(replica, pool))


def heed_ejection(replica: Judged, pool: Sequence[Judged], observer: str, until: float, now: float) -> Change | None:
    """Another worker says that it has ejected the replica until then: follow it or not, under the same ceiling.

    What comes of it is not to be told to others: they would count one observation twice.
    """
    if not replica.health.hint_ejected(observer, until, now) or not _room(replica, pool):
        return None
    replica.health.adopt_ejection(until, now)
    return Change.EJECTED


def _room(replica: Judged, pool: Sequence[Judged]) -> bool:
    """Whether the replica may be out, given how many others are. One that is out already may stay so."""
    health = replica.health
    if health.ejection.out:
        return True
    out = 0
    for each in pool:
        if each.health.ejection.out:
            out += 1
    return out < health.rules.ceiling(len(pool))
