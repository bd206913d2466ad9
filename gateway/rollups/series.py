"""Tallies over time, in three resolutions, each with an end: an hour by 10 s, a day by 5 min, a week by 30 min."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.rollups.tally import Tally

MAX_MODELS = 64
"""Counted by name in one slot; those of workers that are gone may be others."""
OTHER_MODELS = "other"


@dataclass(frozen=True, slots=True)
class Width:
    """How finely a stretch of time is kept."""

    name: str
    slot_s: int
    slots: int

    @property
    def window_s(self) -> int:
        return self.slot_s * self.slots


HOUR = Width("hour", 10, 360)
DAY = Width("day", 300, 288)
WEEK = Width("week", 1800, 336)
WIDTHS = (HOUR, DAY, WEEK)


@dataclass(slots=True)
class Level:
    """The slots of one resolution, by when they begin (Unix seconds, whole multiples of the width)."""

    width: Width
    slots: dict[int, Tally] = field(default_factory=dict)

    def add(self, tally: Tally, at_unix_s: float) -> None:
        """Count it in the slot of this moment; what has become too old goes."""
        start = self.start_of(at_unix_s)
        slot = self.slots.get(start)
        if slot is None:
            slot = self.slots[start] = Tally()
            oldest = start - self.width.window_s
            for old in [each for each in self.slots if each <= oldest]:
                del self.slots[old]
            while len(self.slots) > self.width.slots + 1:  # a clock that was set back leaves slots of the future
                del self.slots[max(each for each in self.slots if each != start)]
        slot.add(tally)
        if len(slot.models) > MAX_MODELS:
            _fold(slot)

    def start_of(self, at_unix_s: float) -> int:
        return int(at_unix_s // self.width.slot_s) * self.width.slot_s

    def each(self, now_unix_s: float) -> Iterator[tuple[int, Tally | None]]:
        """Every slot of the window that ends now, the running one last; None of one in which nothing happened."""
        last = self.start_of(now_unix_s)
        for start in range(last - self.width.slot_s * (self.width.slots - 1), last + 1, self.width.slot_s):
            yield start, self.slots.get(start)

    def total(self, now_unix_s: float, last_s: float | None = None) -> Tally:
        """Of the slots that end within the last seconds; None: of the whole window."""
        first = now_unix_s - (self.width.window_s if last_s is None else last_s)
        found = Tally()
        for start, tally in self.slots.items():
            if first < start + self.width.slot_s and start <= now_unix_s:
                found.add(tally)
        return found


class Series:
    """All resolutions. Each tally is counted in every one of them."""

    def __init__(self) -> None:
        self.levels = {width.name: Level(width) for width in WIDTHS}

    def add(self, tally: Tally, at_unix_s: float) -> None:
        """`at_unix_s`: a moment within the stretch of time that was counted."""
        for level in self.levels.values():
            level.add(tally, at_unix_s)


def _fold(slot: Tally) -> None:
    """Bring the models beyond the limit together."""
    names = sorted(slot.models, key=lambda name: slot.models[name].requests, reverse=True)
    for name in names[MAX_MODELS - 1 :]:
        if name != OTHER_MODELS:
            folded = slot.models.pop(name)
            other = slot.models.get(OTHER_MODELS)
            if other is None:
                slot.models[OTHER_MODELS] = folded
            else:
                other.add(folded)
