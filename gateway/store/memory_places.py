"""Places and the queue for them in one process; `line` has the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.store.line import Line
from gateway.store.places import Entry, Granted, Renewal, Room, Standing, Ticket

__all__ = ["Line", "MemoryPlaces"]


class MemoryPlaces:
    """The queues of one process. See `Places`; the `_now` methods are the same without a loop turn.

    `on_granted(gateway, pool, id)` is called for every grant that the answer of the call does not tell. It must not
    call back into this object. `echoes` off: nobody's messages can come late or twice, so no id is remembered.
    """

    def __init__(
        self, clock_us: Callable[[], int], on_granted: Callable[[str, str, str], None], *, echoes: bool = True
    ) -> None:
        self._echoes = echoes
        self._clock_us = clock_us
        self._on_granted = on_granted
        self._lines: dict[str, Line] = {}

    def enter_now(self, pool: str, ticket: Ticket, room: Room) -> Entry:
        line = self._lines.get(pool) or self._line(pool)
        entry = line.enter(ticket, room, self._clock_us())
        if line.told:
            self._tell(pool, line)
        return entry

    def leave_now(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> Granted:
        line = self._lines.get(pool) or self._line(pool)
        granted = line.leave(id, gateway, used, room, self._clock_us())
        if line.told:
            self._tell(pool, line)
        return granted

    def renew_now(self, pool: str, gateway: str, held: Sequence[Ticket], waiting: Sequence[str], room: Room) -> Renewal:
        line = self._lines.get(pool) or self._line(pool)
        renewal = line.renew(gateway, held, waiting, room, self._clock_us())
        if line.told:
            self._tell(pool, line)
        return renewal

    def standing_now(self, pool: str) -> Standing:
        return self._line(pool).standing(self._clock_us())

    async def enter(self, pool: str, ticket: Ticket, room: Room) -> Entry:
        return self.enter_now(pool, ticket, room)

    async def leave(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> Granted:
        return self.leave_now(pool, id, gateway, used, room)

    async def renew(
        self, pool: str, gateway: str, held: Sequence[Ticket], waiting: Sequence[str], room: Room
    ) -> Renewal:
        return self.renew_now(pool, gateway, held, waiting, room)

    async def standing(self, pool: str) -> Standing:
        return self.standing_now(pool)

    def _line(self, pool: str) -> Line:
        return self._lines.setdefault(pool, Line(echoes=self._echoes))

    def _tell(self, pool: str, line: Line) -> None:
        told, line.told = line.told, []
        for grant in told:
            self._on_granted(grant.gateway, pool, grant.id)
