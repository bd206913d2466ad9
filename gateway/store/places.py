"""Places at a pool and the queue for them: what a request asks for, and the whole operations that order and grant.

A pool has places for so many requests and so many KV-cache tokens. When one is free, it goes to the class ("band")
that is furthest below its guaranteed share among those that wait; within a band tenants take turns by start-time fair
queueing (Goyal, Vin, Cheng, 1996) with the token cost of VTC (Sheng et al., 2024): a tenant's are served in order, and
the tenant whose next request has the lowest start tag goes first. A place is a lease: a gateway that dies gives its
places back by running out of time, and its waiting requests are passed over.

`memory_places` is the specification; the Lua scripts under `redis` answer the same. Time is the store's own, in whole
microseconds. Every operation is idempotent by the request's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import Protocol

import msgspec


class Band(IntEnum):
    """Priority class, the most urgent first. Guarantees, not strict priority: none can starve another."""

    CRITICAL = 0
    STANDARD = 1
    BATCH = 2
    SHEDDABLE = 3


class Room(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a pool is run just now, as the asking gateway sees it. The last one told is in force."""

    requests: int
    """Requests that may have a place at once; 0: none, everybody waits."""
    tokens: int | None = None
    """KV-cache tokens that places may take together; None: not known, not limited."""
    shares: tuple[int, int, int, int] = (50, 30, 15, 5)
    """Guaranteed share of each band, in percent. What a band does not use, others borrow."""
    max_waiting: int = 1024
    """Requests that may wait, all together. `SHEDDABLE` ones may only take half of that."""
    max_waiting_per_tenant: int = 256
    lease_us: int = 30_000_000
    """How long a place is held without a renewal."""
    grant_us: int = 2_000_000
    """How long a place granted to a waiting request is held until its gateway renews it. Then it goes to the next."""
    gateway_us: int = 3_000_000
    """How long after its gateway's last sign of life (`enter`, `leave`, `renew`) a waiting request may be granted."""


class Ticket(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request for a place."""

    id: str
    gateway: str
    """The process that asks, one life of it: grants are told to it."""
    tenant: str
    weight: float
    """Share of the tenant relative to the others', above 0."""
    band: Band
    cost: int
    """Estimated work in VTC's units: prompt tokens + 2 * output tokens, 1 or more."""
    tokens: int
    """KV-cache tokens: prompt and reserved output. More than the pool has is taken for all it has."""
    max_wait_us: int = 0
    """Refuse at once when the predicted wait is longer than this. 0: a place now or none."""


def work_of(input_tokens: int, output_tokens: int) -> int:
    """Work in VTC's units: what a token of output costs an engine is about twice a token of the prompt."""
    return input_tokens + 2 * output_tokens


class State(StrEnum):
    GRANTED = "granted"
    WAITING = "waiting"
    REFUSED = "refused"


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to `enter`."""

    state: State
    position: int = 0
    """Requests that are expected to be served before this one, its own tenant's and other tenants'; 0 when granted."""
    wait_us: int = 0
    """Predicted wait: position + 1 times the mean time between releases lately; 0 while nothing was released yet."""
    reason: str = ""
    """Of a refusal: `tenant_full`, `pool_full`, `too_late` (the predicted wait is beyond `max_wait_us`),
    `left` (it has left already: an echo)."""


class Granted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Requests of the calling gateway that have a place since it was last told. Others' are told theirs."""

    ids: tuple[str, ...] = ()


class Renewal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    granted: tuple[str, ...] = ()
    """Of the `waiting` given: those that have a place."""
    lost: tuple[str, ...] = ()
    """Of the `waiting` given: those that the store knows nothing of; enter them anew."""


class Standing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a pool looks like, for metrics and the dashboard."""

    running: tuple[int, int, int, int]
    """Places taken, by band."""
    tokens: int
    waiting: tuple[int, int, int, int]
    release_interval_us: int
    """Mean time between releases lately; 0: unknown."""


class Places(Protocol):
    """The queues of a store, one per pool. Each operation may raise `StoreUnavailable`; its outcome is then unknown."""

    async def enter(self, pool: str, ticket: Ticket, room: Room) -> Entry:
        """A place now, or one in the queue, or a refusal, which leaves nothing behind.

        The same id again gets what it has. An id that has left within the last minute is refused (`left`): an echo.
        A request is granted at once only if nobody waits who would come before it.
        """
        ...

    async def leave(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> Granted:
        """Give up a place, or stop waiting for one; grants what is free now to whoever is next.

        `used`: the real cost, which corrects what the tenant was charged with; None: as estimated. Of one that waited,
        nothing stays charged. An id that is not known is noted as having left, so that a late `enter` is an echo.
        """
        ...

    async def renew(
        self, pool: str, gateway: str, held: Sequence[Ticket], waiting: Sequence[str], room: Room
    ) -> Renewal:
        """A sign of life: places go on for `lease_us`, lost ones are put back, what is free is granted."""
        ...

    async def standing(self, pool: str) -> Standing:
        """How many run and wait."""
        ...
