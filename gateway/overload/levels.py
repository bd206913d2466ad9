"""From what is short to how much is shed. Pure: readings and the time go in, a level comes out.

| level | from | what is done |
|---|---|---|
| 0 | | nothing |
| 1 | 80 % of any resource | `sheddable` requests are refused |
| 2 | 90 %, or an event loop 250 ms late for 2 s | `batch` too, and replies close their connections |
| 3 | 95 % | everything but `critical` |

The idea is Envoy's overload manager (envoyproxy.io, "Overload manager"): pressures from 0 to 1, actions at thresholds.
Its actions switch off as soon as a pressure is below its threshold again, which for memory means that shedding flaps:
what is shed is what lowers it. Here a level is entered at once, since memory may be gone a second later, and left one
step at a time: a pressure has to be `MARGIN` below the level's threshold for `CALM_S`.

Worked example with the defaults: memory reads 91 %, level 2 at once. It falls to 88 % and stays: level 2, since 88 %
is not below 90 % - 3 %. It falls to 86 %: level 1 two seconds later. At 76 % level 0 two seconds after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MARGIN = 0.03
"""How far below a threshold a pressure has to be before its level is left. A sample of memory differs from the next by
about 1 % under load."""
CALM_S = 2.0
"""And for how long."""
LAG_FOR_S = 2.0
"""How long the event loop has to be late before it counts: one long parse is not overload."""
LAG_LEVEL = 2
LEVELS = 3


class Cause(StrEnum):
    """What is short."""

    MEMORY = "memory"
    DESCRIPTORS = "descriptors"
    BYTES = "held_bytes"
    """Request bodies in memory, and what slow clients have not fetched."""
    LOOP = "event_loop"


RESOURCES = (Cause.MEMORY, Cause.DESCRIPTORS, Cause.BYTES)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where the levels begin: shares of a resource, rising, and the event loop's lateness."""

    shares: tuple[float, float, float] = (0.8, 0.9, 0.95)
    lag_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample. Shares are of what there is, 0 to 1 and beyond; 0 where it is not known."""

    memory: float = 0.0
    descriptors: float = 0.0
    held_bytes: float = 0.0
    lag_s: float = 0.0
    """How late the event loop called a timer."""

    def share(self, cause: Cause) -> float:
        match cause:
            case Cause.MEMORY:
                return self.memory
            case Cause.DESCRIPTORS:
                return self.descriptors
            case Cause.BYTES:
                return self.held_bytes
        raise ValueError(f"{cause} is no share of anything")


class Stair:
    """The level that one resource asks for."""

    __slots__ = ("_calm_since", "level")

    def __init__(self) -> None:
        self.level = 0
        self._calm_since: float | None = None

    def after(self, share: float, thresholds: tuple[float, ...], now: float) -> int:
        """The level after one more sample."""
        asked = sum(share >= each for each in thresholds)
        if asked >= self.level:
            self.level, self._calm_since = asked, None
            return self.level
        if share >= thresholds[self.level - 1] - MARGIN:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= CALM_S:
            self.level -= 1
            self._calm_since = now
        return self.level


class Lateness:
    """Whether the event loop has been late for long enough to count.

    Two late samples in a row at least: a machine that was suspended, or a process that was stopped for a debugger,
    wakes up with one that is as late as it slept.
    """

    __slots__ = ("_calm_since", "_late_since", "level")

    def __init__(self) -> None:
        self.level = 0
        self._late_since: float | None = None
        self._calm_since: float | None = None

    def after(self, lag_s: float, limit_s: float, now: float) -> int:
        """The level after one more sample."""
        if lag_s > limit_s:
            self._calm_since = None
            if self._late_since is None:
                self._late_since = now
            elif now - self._late_since >= LAG_FOR_S:
                self.level = LAG_LEVEL
            return self.level
        self._late_since = None
        if not self.level:
            return 0
        if lag_s > limit_s / 2:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= CALM_S:
            self.level, self._calm_since = 0, None
        return self.level


class Levels:
    """The worker's level: the highest that anything asks for."""

    def __init__(self) -> None:
        self.level = 0
        self.cause = Cause.MEMORY
        """What asks for it; means nothing at level 0."""
        self._stairs = {cause: Stair() for cause in RESOURCES}
        self._lateness = Lateness()

    def after(self, reading: Reading, thresholds: Thresholds, now: float) -> int:
        """The level after one more sample, at `now` seconds of any monotonic clock."""
        asked = {
            cause: stair.after(reading.share(cause), thresholds.shares, now) for cause, stair in self._stairs.items()
        }
        asked[Cause.LOOP] = self._lateness.after(reading.lag_s, thresholds.lag_s, now)
        level = max(asked.values())
        if level and (level != self.level or asked[self.cause] < level):
            self.cause = next(cause for cause, each in asked.items() if each == level)
        self.level = level
        return level
