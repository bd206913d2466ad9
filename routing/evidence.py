"""The words of health: what an attempt showed, what state a replica is in, and what changed."""

from __future__ import annotations

from enum import StrEnum


class Evidence(StrEnum):
    """What one attempt showed about the replica. An attempt that its client gave up shows nothing."""

    ANSWERED = "answered"
    """First content, or a complete answer."""
    REJECTED = "rejected"
    """4xx: the client's fault. Proves life, is no sample of anything."""
    OVERLOADED = "overloaded"
    """429, 529, "queue is full": load. No failure, and no success either."""
    FAILED = "failed"
    """5xx, a broken connection, bad HTTP, a stream cut short."""
    UNREACHABLE = "unreachable"
    """Connection refused, or no connection in time: nothing was sent."""
    STALLED = "stalled"
    """No first token, or no next one, in time."""


class Change(StrEnum):
    """What an observation led to, told once, at the moment it happens."""

    EJECTED = "ejected"
    SPARED = "spared"
    """The rules say eject, and too much of the pool is out already."""
    RECOVERED = "recovered"
    """Back after an ejection, with slow start."""
    UNREACHABLE = "unreachable"
    """A cool-down began."""


class HealthState(StrEnum):
    """The most serious mark. All but the first are words of `unavailable_reason`; one that is warming may get a part of
    its share already, see `routing.health.Health.share`."""

    HEALTHY = "healthy"
    WARMING = "warming"
    JOINING = "joining"
    COOLING_DOWN = "cooling_down"
    EJECTED = "ejected"
    HALF_OPEN = "half_open"
    NOT_READY = "not_ready"
    UNRESPONSIVE = "unresponsive"
    STALLED = "stalled"
