"""One request's stay: what was reserved for it, where, and what has to be given back."""

from __future__ import annotations

import asyncio

import msgspec

from gateway.keys.principal import Principal
from gateway.limits.estimate import Estimate
from gateway.limits.plan import Plan
from gateway.order import Order
from gateway.record import Exchange
from gateway.store.limits import Admission, Cost, Scope
from gateway.store.places import Entry, Room, Ticket


class Visit(msgspec.Struct, eq=False):
    """Made by `Gate.visit`; `Gate.leave` ends it, exactly once, whatever has happened in between."""

    id: str
    """What the store knows it by."""
    order: Order
    principal: Principal
    exchange: Exchange
    plan: Plan
    estimate: Estimate
    reserved: Cost
    scopes: tuple[Scope, ...]
    """Where it is charged; empty: nothing limits it."""
    pool: str = ""
    """The pool where it has or wants a place; empty: none is needed."""
    ticket: Ticket | None = None
    room: Room | None = None
    max_wait_s: float = 0.0
    near: bool = False
    """Decided in this process, not by Redis."""
    charge_id: str = ""
    """What Redis knows its reservations by."""
    charged_near: bool = False
    """Reserved in this process, or carried here, so that there is something to settle."""
    charged_far: bool = False
    """The same in Redis."""
    place_near: bool = False
    """Known to this process' line: has or wants a place there."""
    place_far: bool = False
    """Known to the line in Redis, or perhaps known there."""
    share: int = 1
    """Reserved here as one of so many gateways: costs count that many times."""
    asked: bool = False
    """Redis was asked, and has not answered yet."""
    admission: Admission | None = None
    entry: Entry | None = None
    granted: bool = False
    waiter: asyncio.Future[None] | None = None
    entered_at: float = 0.0
    lease_due_at: float = 0.0
    """When its leases have to be renewed, in `time.monotonic()` seconds."""
    left: bool = False
    moves: int = 0
    """How often its request has gone on elsewhere."""

    def broke_off(self, now: float, deadline: float) -> None:
        """Its answer has broken off and is to be gone on with: it may wait for a replica once more, as long as any."""
        self.entered_at = now
        self.max_wait_s = max(0.0, min(self.order.route.pool.settings.queue.max_wait_s, deadline - now))

    @property
    def shut_out(self) -> bool:
        """Its pool had no replica when it came, and was to get one."""
        return self.room is not None and not self.room.requests

    @property
    def in_line(self) -> bool:
        """It waits for its place."""
        return self.waiter is not None and not self.waiter.done() and not self.granted
