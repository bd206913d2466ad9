"""When a request may leave for rented replicas: its own would keep it waiting for too long, and there is money for it.

Two questions, both answered without a clock or I/O. *Is it worth it?* A request leaves when the first token at the own
replicas is predicted later than `enter` times its target, and from then on all do, until a prediction falls below
`leave` times the target. In between nothing changes, and after the last prediction above `enter` it stays so for
`DWELL_S` at least: a fleet that is just full does not send every other request away. *Is there money?* What a request
can cost is reserved before it is sent, and replaced by what it did cost at its end. Reservations and costs together
never pass the ceiling of any 60 minutes, nor that of a calendar day (UTC).

    target 2000 ms, enter 1.2, leave 0.8      predicted 2500: leaves    2100: leaves    1700: leaves    1500: stays
                                              predicted 2100: stays, since none was above 2400 lately

The hour is counted in whole minutes, 61 of them, so that any 60 minutes are covered; for up to a minute longer than
necessary money counts as spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

PREDICTED_WAIT = "predicted_wait"
OWN_UNAVAILABLE = "own_unavailable"
"""No replica of its own can take it at all."""
ON_TARGET = "on_target"
NOT_WORTH_IT = "not_worth_it"
"""The rented ones are not faster, or by less than their price is worth."""
HOUR_CEILING = "hour_ceiling"
DAY_CEILING = "day_ceiling"

DWELL_S = 1.0
"""Longer than predictions take to follow a change: those of a second all come from a few steps of an engine."""
IDLE_S = 60.0
"""After so long without a request that was near its target, nothing is left of an earlier rush."""

_MINUTE_S, _DAY_S = 60, 86_400
_MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class SpillDecision:
    spill: bool
    reason: str
    """Why, low cardinality: one of the constants of this module."""


@dataclass(slots=True)
class _Reservation:
    minute: int
    day: int
    micros: int


class Ceilings:
    """Money that is reserved and spent, in millionths of a US dollar, against an hour's and a day's ceiling.

    `now_unix_s` may go back a little, as clocks do: what lies in the future then counts as well.
    """

    __slots__ = ("_days", "_minutes", "_reserved", "per_day", "per_hour", "spent_micros")

    def __init__(self, usd_per_hour: float, usd_per_day: float) -> None:
        self.per_hour = int(usd_per_hour * _MICRO)
        self.per_day = int(usd_per_day * _MICRO)
        self.spent_micros = 0
        """All that was ever settled."""
        self._minutes: dict[int, int] = {}
        self._days: dict[int, int] = {}
        self._reserved: dict[str, _Reservation] = {}

    @property
    def reserved(self) -> int:
        """Requests that are not settled."""
        return len(self._reserved)

    def change(self, usd_per_hour: float, usd_per_day: float) -> None:
        """Other ceilings from now on; what is spent stays spent."""
        self.per_hour = int(usd_per_hour * _MICRO)
        self.per_day = int(usd_per_day * _MICRO)

    def hour_micros(self, now_unix_s: float) -> int:
        """Reserved and spent in the last 60 minutes, and in what had begun of the minute before."""
        first = int(now_unix_s // _MINUTE_S) - 60
        return sum(micros for minute, micros in self._minutes.items() if minute >= first)

    def day_micros(self, now_unix_s: float) -> int:
        """Reserved and spent in this calendar day."""
        today = int(now_unix_s // _DAY_S)
        return sum(micros for day, micros in self._days.items() if day >= today)

    def in_the_way(self, cost_usd: float, now_unix_s: float, share: int = 1) -> str | None:
        """The ceiling that so much more would pass; None: none. Of the ceilings, one of `share` equal parts counts."""
        micros = micros_of(cost_usd)
        if (self.hour_micros(now_unix_s) + micros) * share > self.per_hour:
            return HOUR_CEILING
        if (self.day_micros(now_unix_s) + micros) * share > self.per_day:
            return DAY_CEILING
        return None

    def reserve(self, id: str, cost_usd: float, now_unix_s: float) -> None:
        """Count it as spent, until `settle` says what it was. Ask `in_the_way` first."""
        self.settle(id, None)
        micros = micros_of(cost_usd)
        held = _Reservation(int(now_unix_s // _MINUTE_S), int(now_unix_s // _DAY_S), micros)
        if held.minute not in self._minutes:
            self._forget(held)
        self._reserved[id] = held
        self._add(held, micros)

    def settle(self, id: str, cost_usd: float | None) -> float:
        """What the request has really cost, or None when nobody knows: then it stays what was reserved. Dollars that
        were counted; 0 for an id without a reservation."""
        held = self._reserved.pop(id, None)
        if held is None:
            return 0.0
        micros = held.micros if cost_usd is None else micros_of(cost_usd)
        self._add(held, micros - held.micros)
        self.spent_micros += micros
        return micros / _MICRO

    def _add(self, held: _Reservation, micros: int) -> None:
        # What has been forgotten since is not in any window any more.
        if held.minute in self._minutes or micros > 0:
            self._minutes[held.minute] = self._minutes.get(held.minute, 0) + micros
        if held.day in self._days or micros > 0:
            self._days[held.day] = self._days.get(held.day, 0) + micros

    def _forget(self, now: _Reservation) -> None:
        """Drop what no window reaches any more, with another window's length to spare for clocks that go back."""
        self._minutes = {minute: micros for minute, micros in self._minutes.items() if minute >= now.minute - 120}
        self._days = {day: micros for day, micros in self._days.items() if day >= now.day - 1}


class Spill:
    """One model's. `lane`s (priority classes, say) have targets of their own, so each is judged by itself."""

    __slots__ = ("_near_at", "_over_at", "ceilings", "enter", "leave")

    def __init__(self, usd_per_hour: float, usd_per_day: float, enter: float = 1.2, leave: float = 0.8) -> None:
        """`enter` is 1 or more, `leave` above 0 and at most 1."""
        self.ceilings = Ceilings(usd_per_hour, usd_per_day)
        self.enter = enter
        self.leave = leave
        self._over_at: dict[str, float] = {}
        """By lane, while its requests leave: when one was last predicted above `enter`."""
        self._near_at: dict[str, float] = {}
        """The same: when one was last predicted above `leave`."""

    def leaving(self, lane: str) -> bool:
        """Whether requests of the lane leave at the moment."""
        return lane in self._over_at

    def decide(
        self,
        predicted_own_ms: float | None,
        predicted_hosted_ms: float | None,
        target_ms: float,
        cost_usd: float,
        now_unix_s: float,
        lane: str = "",
        share: int = 1,
    ) -> SpillDecision:
        """Whether this request should leave; reserves nothing.

        Predictions are milliseconds to the first token: None, where nothing is known (such a request stays, or the host
        is taken to keep the target), and infinity where no own replica can serve. What the host's price is worth in
        milliseconds is part of `predicted_hosted_ms`. `cost_usd` is the most that it can cost. `share`: of how many
        gateways this is one.
        """
        if predicted_own_ms is None or not self._late(predicted_own_ms / target_ms, now_unix_s, lane):
            return SpillDecision(False, ON_TARGET)
        if predicted_hosted_ms is not None and predicted_hosted_ms >= predicted_own_ms:
            return SpillDecision(False, NOT_WORTH_IT)
        ceiling = self.ceilings.in_the_way(cost_usd, now_unix_s, share)
        if ceiling is not None:
            return SpillDecision(False, ceiling)
        return SpillDecision(True, OWN_UNAVAILABLE if predicted_own_ms == inf else PREDICTED_WAIT)

    def _late(self, ratio: float, now: float, lane: str) -> bool:
        """Whether `ratio`, predicted time by target, is too high, in the light of what was before."""
        if ratio > self.enter:
            self._over_at[lane] = self._near_at[lane] = now
            return True
        over_at = self._over_at.get(lane)
        if over_at is None:
            return False
        if ratio >= self.leave:
            if abs(now - self._near_at[lane]) <= IDLE_S:
                self._near_at[lane] = now
                return True
        elif abs(now - over_at) < DWELL_S:
            return False
        del self._over_at[lane], self._near_at[lane]
        return False


def micros_of(usd: float) -> int:
    """Whole millionths of a dollar, rounded up: many small costs never add up to less than they are."""
    micros = int(usd * _MICRO)
    return micros if micros >= usd * _MICRO else micros + 1
