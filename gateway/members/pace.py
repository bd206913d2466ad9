"""How soon a change of the members is put into force: at once where one or two come, seldom where thousands do.

Every reload costs as much as there are replicas, however few of them are new. So the pause before the next one grows
while they come one upon the other, to some times of what the last one took. Plain code: the time is told.
"""

from __future__ import annotations

from typing import Final

GATHER_S: Final = 0.1
"""Changes that come one upon the other are put into force together."""
MOST_TIMES: Final = 4
"""Of what a reload took, before the next one: a storm costs a fifth of one processor, and no more."""
LONGEST_S: Final = 1.0
"""Beyond what a reload took itself: one that registers is told that it is in force, and waits for 2 s at most."""
LONGEST_GATHER_S: Final = 2.0
QUIET_S: Final = 2.0
"""Without a change, after which the next one is the first again."""
FEW: Final = 2
"""Reloads in a row that are no storm yet."""


class Pace:
    """Of one gateway's reloads for its members."""

    def __init__(self) -> None:
        self._row = 0
        """Reloads one upon the other, up to now."""
        self._not_before_s = 0.0
        self._dear = False
        """Whether more than `GATHER_S` has to lie between two."""

    def pause_s(self, now_s: float) -> float:
        """Something has changed just now: how long to wait for more before it is put into force."""
        if now_s - self._not_before_s > QUIET_S:
            self._row = 0
        return max(GATHER_S, self._not_before_s - now_s)

    def reloaded(self, now_s: float, took_s: float) -> None:
        """It is in force."""
        self._row = min(self._row + 1, MOST_TIMES)
        rest_s = max(took_s, min(self._row * took_s, LONGEST_S))
        self._not_before_s = now_s + min(rest_s, LONGEST_GATHER_S)
        self._dear = rest_s > GATHER_S

    def storming(self, now_s: float) -> bool:
        """Whether a change now waits for longer than a single one would, since many have come, and dear ones."""
        return self._dear and self._row > FEW and now_s - self._not_before_s <= QUIET_S
