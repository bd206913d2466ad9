"""What the hammer tells its worker processes, and what they tell it: one JSON document a line."""

from __future__ import annotations

import msgspec

from gateway.store.limits import Scope
from gateway.store.places import Room


class Reach(msgspec.Struct, frozen=True):
    """How a worker gets to Redis."""

    url: str
    prefix: str = "hammer"
    timeout_s: float = 2.0
    """Generous: a race is about counts, and the machine is kept busy on purpose. The gateway's own is 0.05."""
    connections: int = 2


class Tokens(msgspec.Struct, frozen=True):
    """How long answers turn out to be: log-normal around a median, cut at both ends."""

    median: int
    sigma: float = 0.0
    """0: always the median. 1: the 90th percentile is 3.6 times the median."""
    low: int = 1
    high: int = 1_000_000


class LimitJob(msgspec.Struct, frozen=True, tag="limits"):
    """Ask for admission over and over, and settle with what was really used."""

    reach: Reach
    scopes: tuple[Scope, ...]
    prompt: int = 0
    """Prompt tokens of each request, known exactly."""
    reserve: int = 0
    """Output tokens that are reserved."""
    output: Tokens | None = None
    """Output tokens that are used in the end; None: what was reserved."""
    tasks: int = 32
    seconds: float = 2.0
    calls: int = 0
    """Stop after so many calls of each task; 0: no such limit."""
    hold_ms: tuple[float, float] = (0.0, 0.0)
    """How long a request runs, from and to, evenly spread."""
    pause_ms: float = 0.0
    """Between a refusal and the next call."""
    lease_us: int = 30_000_000
    keep: bool = False
    """Each task holds its first admission until the process is killed, and renews nothing."""
    local: tuple[Scope, ...] | None = None
    """This process' share of the limits, for when Redis is away; None: such calls are only counted."""
    begin_at_s: float = 0.0
    """By the monotonic clock, which all processes of a machine share; 0: at once."""


class Tenant(msgspec.Struct, frozen=True):
    """One tenant's load on the queue, as each process makes it."""

    name: str
    weight: float
    callers: int
    """Requests that it always has under way or waiting, in each process."""
    cost: Tokens
    think_ms: float = 0.0
    """Between an answer and the caller's next request; the median of a random time."""
    only_in: int | None = None
    """Only this process makes it; None: all of them."""


class PlaceJob(msgspec.Struct, frozen=True, tag="places"):
    """Queue for places at one pool, and hold each for a time in proportion to its cost."""

    reach: Reach
    pool: str
    room: Room
    tenants: tuple[Tenant, ...]
    gateway: str
    number: int = 0
    """Of the process."""
    hold_us_per_cost: float = 100.0
    seconds: float = 5.0
    begin_at_s: float = 0.0
    estimate: float = 1.0
    """What is told as the cost, as a part of the real one."""


Job = LimitJob | PlaceJob

# What became of a call.
ADMITTED, REFUSED, UNAVAILABLE, LOCAL, LOCAL_REFUSED = range(5)


class Call(msgspec.Struct, array_like=True):
    """One call: when, how long, what came of it."""

    at_us: int
    """Monotonic."""
    took_us: int
    outcome: int


class Admitted(msgspec.Struct, array_like=True):
    """One admission of Redis."""

    now_us: int
    """By Redis' clock."""
    reserved: int
    used: int
    """Tokens; both are 1 where only requests count."""
    in_use: int
    """Leases that Redis said were live, this one included."""
    from_us: int
    """Monotonic: the answer was here. The lease had begun."""
    to_us: int
    """Monotonic: the settlement was not yet sent. The lease had not ended. 0: it was never settled."""


class LimitResult(msgspec.Struct, tag="limits"):
    calls: list[Call]
    admitted: list[Admitted]
    local: int = 0
    errors: list[str] = []
    """Whatever should never happen, as text."""
    unsettled: int = 0
    """Settlements whose outcome is unknown, since Redis was away."""
    not_found: int = 0
    """Settlements that found nothing to settle: Redis had lost its memory."""
    unknown: int = 0
    """Admissions whose outcome is unknown; each was cancelled afterwards."""


class Served(msgspec.Struct, array_like=True):
    """One request's way through the queue. Monotonic times."""

    tenant: int
    cost: int
    entered_us: int
    granted_us: int
    left_us: int


class PlaceResult(msgspec.Struct, tag="places"):
    served: list[Served]
    refused: int = 0
    errors: list[str] = []
    by_message: int = 0
    """Grants that came by PUBLISH."""
    by_renewal: int = 0
    """Grants that only `renew` told, since the message was lost or late."""
    unavailable: int = 0


Result = LimitResult | PlaceResult
