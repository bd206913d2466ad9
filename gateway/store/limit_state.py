"""What the limiter in memory keeps of one scope, and a scope made ready for it; `memory_limits` has the rules."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from gateway.store.limits import US_PER_MINUTE, Reading, Scope

UNNAMED_END_US = 40 * 86_400 * 1_000_000
"""How long a budget without an end is remembered from its first request on: longer than any month."""


FREE = 0
"""The request was not charged in this scope: it is in shadow, and would have been refused."""
CHARGED = 1
LEASED = 2
"""Put back by a renewal after the store had lost it: a lease and money, but no rates, which time has refilled."""


class Rule(NamedTuple):
    """A scope, made ready for the hot path."""

    key: str
    rates: tuple[tuple[int, int, int, int, int], ...]
    """Unit, per minute, burst, burst in microseconds, largest."""
    concurrent: int | None
    budgets: tuple[tuple[str, str, int, int, int], ...]
    """Kind, period, limit, floor, end."""
    leased: bool
    shadow: bool


class State:
    """What is kept of one scope. A budget is its period, what was spent and its end, under its kind (`d`, `m`)."""

    __slots__ = ("budgets", "held", "lease_until_us", "leases", "marks_us", "reserved_micros")

    def __init__(self) -> None:
        self.marks_us = [0, 0, 0, 0]
        self.reserved_micros = 0
        self.lease_until_us = 0
        """No lease runs out later. From then on all of them have."""
        self.leases: list[tuple[int, str]] = []
        """When each runs out, and its request; sorted."""
        self.held: dict[str, tuple[int, int]] = {}
        """When the lease of a request runs out, and the money it reserves."""
        self.budgets: dict[str, tuple[str, int, int]] = {}

    def idle(self, now_us: int) -> bool:
        """Whether forgetting it changes no answer."""
        return (
            self.lease_until_us <= now_us
            and max(self.marks_us) <= now_us
            and all(ends_at_us <= now_us for _, _, ends_at_us in self.budgets.values())
        )

    def drop_all_expired(self, now_us: int) -> None:
        """Forget every lease, if the last of them has run out."""
        if self.lease_until_us <= now_us and self.leases:
            self.leases.clear()
            self.held.clear()
            self.reserved_micros = 0

    def prune(self, now_us: int, limit: int) -> None:
        leases = self.leases
        count = 0
        while count < limit and count < len(leases) and leases[count][0] <= now_us:
            self.reserved_micros -= self.held.pop(leases[count][1])[1]
            count += 1
        del leases[:count]

    def hold(self, id: str, micros: int, until_us: int) -> None:
        """Start a lease, or let the one that there is run until then."""
        held, leases = self.held, self.leases
        if id in held:
            del leases[bisect_left(leases, (held[id][0], id))]
        else:
            self.reserved_micros += micros
        held[id] = (until_us, micros)
        entry = (until_us, id)
        if not leases or entry > leases[-1]:
            leases.append(entry)
        else:
            insort(leases, entry)
        if until_us > self.lease_until_us:
            self.lease_until_us = until_us

    def let_go(self, id: str) -> None:
        lease = self.held.pop(id, None)
        if lease is not None:
            del self.leases[bisect_left(self.leases, (lease[0], id))]
            self.reserved_micros -= lease[1]

    def budget(self, rule: tuple[str, str, int, int, int], now_us: int) -> tuple[str, int, int]:
        """The period that is in force, what was spent in it, and when it ends."""
        kind, period, _, floor_micros, ends_at_us = rule
        current = self.budgets.get(kind)
        if current is not None and current[2] > now_us:
            if current[0] > period:
                return current
            if current[0] == period:
                return current if current[1] >= floor_micros else (period, floor_micros, current[2])
        return period, floor_micros, ends_at_us or now_us + UNNAMED_END_US


def read(state: State | None, scope: Scope, now_us: int) -> Reading:
    """How a scope stands; None: it is idle. Leases that ran out are left where they are, and not counted."""
    state = state or State()
    in_use, reserved_micros = len(state.leases), state.reserved_micros
    for until_us, id in state.leases:
        if until_us > now_us:
            break
        in_use -= 1
        reserved_micros -= state.held[id][1]
    return Reading(
        now_us,
        tuple([state.marks_us[rate.unit] for rate in scope.rates]),
        in_use,
        reserved_micros,
        tuple([state.budget(budget, now_us)[1] for budget in rule_of(scope).budgets]) if scope.budgets else (),
    )


class Plan:
    """Scopes made ready, together with what is kept of them, so that the usual request looks nothing up."""

    __slots__ = ("charged", "epoch", "leased", "rates", "rules", "scopes", "simple")

    def __init__(self, scopes: Sequence[Scope]) -> None:
        self.scopes = scopes
        self.rules = tuple([rule_of(scope) for scope in scopes])
        self.charged = (CHARGED,) * len(scopes)
        self.simple = not any(rule.budgets for rule in self.rules)
        self.epoch = -1
        """Of the limiter, when `rates` and `leased` were found: they hold until states are forgotten."""
        self.rates: tuple[tuple[list[int], int, int, int, int], ...] = ()
        """For each rate the marks it is one of, unit, per minute, burst, burst in microseconds."""
        self.leased: tuple[tuple[State, int], ...] = ()
        """The states with leases, and how many of these there may be; complete if the plan is simple."""


def rule_of(scope: Scope) -> Rule:
    rates = tuple(
        (int(rate.unit), rate.per_minute, rate.burst, burst_us(rate.burst, rate.per_minute), rate.largest)
        for rate in scope.rates
    )
    budgets = tuple(
        (budget.period[:1], budget.period, budget.limit_micros, budget.floor_micros, budget.ends_at_us)
        for budget in scope.budgets
    )
    leased = scope.concurrent is not None or bool(budgets)
    return Rule(scope.key, rates, scope.concurrent, budgets, leased, scope.shadow)


def burst_us(burst: int, per_minute: int) -> int:
    """How far a mark may lie ahead of now."""
    return int(burst * float(US_PER_MINUTE) / per_minute)
