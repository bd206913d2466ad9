"""What a gateway tells of replicas of a pool that start, as a notice `start/<pool>/<gateway>` in JSON."""

from __future__ import annotations

import msgspec


class StartNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pool, by one gateway. Told while replicas start, or were ordered and nothing is seen of them."""

    starting: int = 0
    """Replicas that say, or of which is said, that they start."""
    since_unix_s: float = 0.0
    """When the one that is furthest began, or was ordered."""
    phase: str = ""
    """Of that one, as `Member.phase`."""
    progress: float | None = None
    detail: str = ""
    """For people: what it is at, or why it does not start."""
    lead_s: float | None = None
    """What four of five starts took; None: nobody knows."""
    learned: bool = False
    """That was seen, and is not what the settings say."""
    problem: str = ""
    """Why none can be ordered."""
