"""One request's stay: what was reserved for it, where, and what has to be given back."""

from __future__ import annotations

import asyncio

from gateway.keys.principal import Principal
from gateway.limits.estimate import Estimate
from gateway.limits.plan import Plan
from gateway.order import Order
from gateway.record import Exchange
from gateway.store.limits import Admission, Cost, Held, Scope
from gateway.store.places import Entry, Room, Ticket


class Visit:
    """Made by `Gate.visit`; `Gate.leave` ends it, exactly once, whatever has happened in between."""

    __slots__ = (
        "admission",
        "asked",
        "entered_at",
        "entry",
        "estimate",
        "exchange",
        "granted",
        "id",
        "lease_due_at",
        "left",
        "max_wait_s",
        "near",
        "order",
        "place_far",
        "place_near",
        "plan",
        "pool",
        "principal",
        "reserved",
        "room",
        "scopes",
        "share",
        "ticket",
        "waiter",
    )

    def __init__(
        self,
        id: str,
        order: Order,
        principal: Principal,
        exchange: Exchange,
        plan: Plan,
        estimate: Estimate,
        reserved: Cost,
    ) -> None:
        self.id = id
        """What the store knows it by."""
        self.order = order
        self.principal = principal
        self.exchange = exchange
        self.plan = plan
        self.scopes: tuple[Scope, ...] = plan.scopes
        """Where it is charged; empty: nothing limits it."""
        self.estimate = estimate
        self.reserved = reserved
        self.pool = ""
        """The pool where it has or wants a place; empty: none is needed."""
        self.ticket: Ticket | None = None
        self.room: Room | None = None
        self.max_wait_s = 0.0
        self.near = True
        """Charged in this process, not in Redis."""
        self.place_near = False
        """Known to this process' line: has or wants a place there."""
        self.place_far = False
        """Known to the line in Redis, or perhaps known there."""
        self.share = 1
        """Reserved here as one of so many gateways: costs count that many times."""
        self.asked = False
        """Redis was asked, and has not answered yet."""
        self.admission: Admission | None = None
        self.entry: Entry | None = None
        self.granted = False
        self.waiter: asyncio.Future[None] | None = None
        self.entered_at = 0.0
        self.lease_due_at = 0.0
        """When its leases have to be renewed, in `time.monotonic()` seconds."""
        self.left = False

    @property
    def admitted(self) -> bool:
        """Whether something is charged that has to be settled."""
        return self.admission is not None and self.admission.admitted

    def held(self) -> Held:
        """The reservation, as a renewal tells it to the store."""
        return Held(self.id, self.scopes, self.reserved)
