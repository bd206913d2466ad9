"""One band of a pool: its tenants' queues, and the tags by which they take turns. `line` tells the rules."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import msgspec

from gateway.store.places import Ticket

UNITS = 1000.0
"""Tag units for a cost of 1 at weight 1."""
MAX_CHARGE = 2**40
"""More is taken for this much, so that tags stay exact between two trims."""
REBASE_AT = 2**51
"""A virtual time beyond this starts from 0 again."""


class Waiter(msgspec.Struct):
    ticket: Ticket
    number: int


class Head(NamedTuple):
    start: int
    number: int
    tenant: str


class BandQueue:
    """One band of a pool: its tenants' queues and tags."""

    __slots__ = (
        "finish",
        "first",
        "heads",
        "index",
        "passed",
        "queues",
        "running",
        "tokens",
        "turn",
        "virtual",
        "waiting",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.virtual = 0
        self.turn = 0
        self.passed = 0
        """Turns of others that came first within their guarantee while this band waited and had no place at all."""
        self.running = 0
        self.tokens = 0
        self.waiting = 0
        self.finish: dict[str, int] = {}
        self.queues: dict[str, dict[str, Waiter]] = {}
        self.first: dict[str, Head] = {}
        self.heads: list[Head] = []
        """The same heads in order."""

    def start(self, tenant: str) -> int:
        """The start tag of a request that becomes its tenant's first."""
        finish = self.finish.get(tenant, 0)
        return finish if finish > self.virtual else self.virtual

    def set_head(self, tenant: str, head: Head | None) -> None:
        old = self.first.get(tenant)
        if old is not None:
            del self.heads[bisect_left(self.heads, old)]
        if head is None:
            del self.first[tenant]
        else:
            self.first[tenant] = head
            insort(self.heads, head)

    def correct(self, tenant: str, by: int) -> None:
        """Charge a tenant `by` more (or less) than it was."""
        finish = self.finish.get(tenant)
        if finish is None:
            if by <= 0:
                return
            finish = self.virtual
        self.finish[tenant] = corrected = finish + by
        head = self.first.get(tenant)
        if head is not None:
            start = corrected if head.start == finish else max(head.start, corrected)
            if start != head.start:
                self.set_head(tenant, head._replace(start=start))

    def reset_if_empty(self) -> None:
        """The end of a busy period: nobody has served or owed anything."""
        if not self.running and not self.waiting:
            self.virtual = 0
            self.finish.clear()

    def trim(self) -> None:
        self.finish = {tenant: finish for tenant, finish in self.finish.items() if finish > self.virtual}
        if self.virtual > REBASE_AT:
            heads = [head._replace(start=max(0, head.start - self.virtual)) for head in self.heads]
            self.heads = sorted(heads)
            self.first = {head.tenant: head for head in heads}
            self.finish.clear()
            self.virtual = 0


def charge(cost: int, weight: float) -> int:
    """What a cost moves the tag of a tenant: 3000 for a cost of 6 at weight 2."""
    return max(1, min(MAX_CHARGE, int(cost * UNITS / weight)))
