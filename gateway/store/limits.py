"""Limits as a store keeps them: what a request would take, and the whole operations that take it and give it back.

All of a request's limits are admitted together or not at all, in one operation. Rates are GCRA marks (the generic cell
rate algorithm of ATM Forum TM 4.0, in the form of `redis-cell`): one number per rate, the theoretical arrival time,
refilled continuously. Concurrency is a set of leases that run out, never an in/out counter. Money is what was spent in
a calendar period plus what is reserved by leases. `memory_limits` is the specification; the Lua scripts under `redis`
answer the same, number for number: a property test runs both side by side.

Every operation is idempotent by the request's id. Time is the store's own, in whole microseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

US_PER_MINUTE = 60_000_000


class Unit(IntEnum):
    """What a rate counts; the position of its cost in `Cost`."""

    REQUESTS = 0
    INPUT = 1
    OUTPUT = 2
    TOTAL = 3


class Cost(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a request takes: reserved before it, or used in the end. Whole numbers, 0 or more."""

    requests: int = 1
    input: int = 0
    """Prompt tokens."""
    output: int = 0
    """Generated tokens."""
    total: int = 0
    micros: int = 0
    """Millionths of a US dollar."""


class Rate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """At most `burst + per_minute * minutes` in every interval, exactly, for costs up to `burst`.

    A single cost above `burst` and up to `largest` is admitted when the mark does not lie in the future (nothing is
    owed), and what it takes beyond the burst is owed by those who come later. A cost above `largest` never is.
    """

    unit: Unit
    per_minute: int
    """Sustained rate, 1 or more."""
    burst: int
    """1 or more."""
    largest: int
    """`burst` or more."""


class Budget(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Money for one calendar period."""

    period: str
    """`d20261122` or `m202611`. One of a later period takes the place of the earlier one of the same kind."""
    limit_micros: int
    floor_micros: int = 0
    """Spend of record that the caller knows of: the store takes its own count for at least that. So a store that has
    lost its memory is put right by the first request."""
    ends_at_us: int = 0
    """End of the period, microseconds since 1970: the store may forget the count after that."""


class Scope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One holder of limits: a key, a tenant, a user, a model, or a tenant's use of a model."""

    key: str
    """Its name in the store. Scopes that one tenant's requests share begin with the same `{tag}`."""
    rates: tuple[Rate, ...] = ()
    concurrent: int | None = None
    """Leases at once; None: no limit."""
    budgets: tuple[Budget, ...] = ()
    shadow: bool = False
    """Judge and report, never refuse. What would have been refused is not charged to this scope."""


class Refusal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One limit that said no."""

    scope: int
    """Position in the scopes of the request."""
    limit: str
    """`requests`, `input`, `output`, `total`, `concurrent`, or the period of a budget."""
    wait_us: int
    """Microseconds until the same request would pass if nobody else came; -1: never (it is larger than the limit lets
    through at once, or the budget is spent). For `concurrent`, and for a budget that only reservations stand in the
    way of, until the first lease runs out, which is the latest that this can be."""
    shadow: bool = False


class Admission(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to one request. Positions follow the scopes, and within them the rates and budgets, as given."""

    admitted: bool
    now_us: int
    marks_us: tuple[int, ...]
    """Each rate's mark after this request (unchanged by a refusal): the time at which all of its burst is there."""
    in_use: tuple[int, ...]
    """Live leases of each scope with `concurrent`, this request's included if it was admitted."""
    spent_micros: tuple[int, ...]
    """Each budget: spent and reserved, this request's reservation included if it was admitted."""
    refusals: tuple[Refusal, ...] = ()
    """Every limit that said no, those of shadow scopes included."""


class Reading(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one scope stands, without anything being charged."""

    now_us: int
    """The store's own time of it."""
    marks_us: tuple[int, ...]
    """Of the scope's rates, as given; one that lies in the past is told as it is, or as 0."""
    in_use: int
    """Leases that have not run out: requests under way, where concurrency or money is limited."""
    reserved_micros: int
    """What these reserve of the money."""
    spent_micros: tuple[int, ...]
    """Of the scope's budgets: what settled requests have used in the period, the reservations left out."""


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A reservation that goes on, as its gateway knows it."""

    id: str
    scopes: tuple[Scope, ...]
    reserved: Cost


class Limits(Protocol):
    """The limiter of a store. Every operation may raise `StoreUnavailable`; its outcome is then unknown."""

    async def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int) -> Admission:
        """Reserve `cost` in every scope, and a lease where concurrency or money is limited; or nothing at all.

        The same id again gets the stored answer, as long as it is not settled, and is charged once. An id that was
        settled or cancelled within the last minute is refused with no refusals and charged nothing: it is an echo.
        """
        ...

    async def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost) -> bool:
        """Put `used` in the place of `reserved` and end the leases. False, and nothing changed, if there is none.

        Using more than was reserved leaves a debt; less gives back, never more than to a full burst. A settlement whose
        lease has run out still moves marks and spend: what was used was used. Of scopes in which the request was
        not charged (shadow, refused) nothing is moved. Call with the scopes and cost of the admission.
        """
        ...

    async def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost) -> bool:
        """As if the request had never been admitted; and if it has not been yet (a lost message), it will not be."""
        ...

    async def renew(self, held: Sequence[Held], lease_us: int) -> None:
        """Let the leases run for `lease_us` from now on. Leases and money that the store has lost are put back."""
        ...

    async def read(self, scopes: Sequence[Scope]) -> list[Reading]:
        """How each scope stands, for operators: nothing is changed by it, not even what has run out is dropped."""
        ...
