"""Tells Redis again what it should know of a worker's visits: leases and places that go on, and who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from gateway.admission.visit import Visit
from gateway.store.limits import Held
from gateway.store.places import Entry, Room, State
from gateway.store.redis.places import unpack_entry

if TYPE_CHECKING:
    from gateway.store.redis.far import Far

LEASE_US = 30_000_000
"""How long a dead gateway's reservations and places stay taken in Redis."""
RENEW_EVERY_S = 10.0
AT_ONCE = 100
"""Leases, places or settlements told in one go: less than a millisecond of Redis' time."""


class Carrier:
    """One worker's. Its methods may raise `StoreError` at any point, and may be called again then.

    `granted(pool, id)` is told of places that Redis gave, `moved(visit, entry)` what Redis said to one that waits and
    was entered there anew.
    """

    def __init__(
        self,
        far: Far,
        gateway: str,
        *,
        visits: Callable[[], Iterable[Visit]],
        room_of: Callable[[Visit], Room],
        granted: Callable[[str, str], None],
        moved: Callable[[Visit, Entry], None],
    ) -> None:
        self._far = far
        self._gateway = gateway
        self._visits = visits
        self._room_of = room_of
        self._granted = granted
        self._moved = moved

    async def carry_running(self, now: float) -> None:
        """Have Redis know every lease and every place that is held."""
        visits = [visit for visit in self._visits() if not visit.left and not visit.asked]
        await self._renew_leases([visit for visit in visits if visit.charged_near or visit.charged_far])
        await self._renew_places([visit for visit in visits if visit.granted])
        for visit in visits:
            visit.lease_due_at = now + RENEW_EVERY_S

    async def carry(self, now: float) -> None:
        """And everybody who waits, in their order."""
        await self.carry_running(now)
        by_pool: dict[str, list[Visit]] = {}
        for visit in self._visits():
            if visit.in_line and visit.place_far:
                by_pool.setdefault(visit.pool, []).append(visit)
        for pool, members in by_pool.items():  # all of the lost first, so that everybody is entered in order
            for visit in await self._lost(pool, members):
                visit.place_far = False
        waiting = [visit for visit in self._visits() if visit.in_line and not visit.place_far and not visit.asked]
        for some in chunks(waiting, AT_ONCE):
            asked = []
            for visit in some:
                assert visit.ticket is not None
                visit.place_far = True
                asked.append(self._far.enter(visit.pool, visit.ticket, self._room_of(visit)))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for visit, answer in zip(some, answers, strict=True):
                if isinstance(answer, BaseException) or visit.left or visit.granted:
                    continue  # one that was not heard is found lost by the next round, and one that left has said so
                entry = unpack_entry(answer)
                visit.place_far = entry.state is not State.REFUSED
                self._moved(visit, entry)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer

    async def renew(self, now: float) -> None:
        """Renew leases that are due, and give a sign of life for every request that waits."""
        due: list[Visit] = []
        waiting: dict[str, list[Visit]] = {}
        for visit in self._visits():
            if visit.lease_due_at <= now and not visit.asked:
                due.append(visit)
            if visit.in_line and visit.place_far:
                waiting.setdefault(visit.pool, []).append(visit)
        await self._renew_leases([visit for visit in due if visit.charged_far])
        await self._renew_places([visit for visit in due if visit.granted])
        for visit in due:
            visit.lease_due_at = now + RENEW_EVERY_S
        for pool, members in waiting.items():
            await self._renew_waiting(pool, members)

    async def _renew_leases(self, visits: Sequence[Visit]) -> None:
        for some in chunks([visit for visit in visits if visit.scopes], AT_ONCE):
            live = [visit for visit in some if not visit.left]
            for visit in live:
                visit.charged_far = True  # so that leaving is told, also when the answer is lost
            await self._far.limits.renew(
                [Held(visit.charge_id, visit.scopes, visit.reserved) for visit in live], LEASE_US
            )

    async def _renew_places(self, visits: Sequence[Visit]) -> None:
        by_pool: dict[str, list[Visit]] = {}
        for visit in visits:
            if visit.ticket is not None:
                by_pool.setdefault(visit.pool, []).append(visit)
        for pool, members in by_pool.items():
            for some in chunks(members, AT_ONCE):
                live = [visit for visit in some if visit.granted and not visit.left]
                tickets = [visit.ticket for visit in live if visit.ticket is not None]
                if not live:
                    continue
                for visit in live:
                    visit.place_far = True  # so that leaving meanwhile is told
                await self._far.places.renew(pool, self._gateway, tickets, (), self._room_of(live[0]))

    async def _lost(self, pool: str, members: Sequence[Visit]) -> list[Visit]:
        """Give a sign of life for requests that wait; those that Redis knows nothing of."""
        by_id = {visit.ticket.id: visit for visit in members if visit.ticket is not None}
        renewal = await self._far.places.renew(pool, self._gateway, (), list(by_id), self._room_of(members[0]))
        for id in renewal.granted:
            self._granted(pool, id)
        return [by_id[id] for id in renewal.lost]

    async def _renew_waiting(self, pool: str, members: Sequence[Visit]) -> None:
        lost = await self._lost(pool, members)
        if lost:  # with them, perhaps what runs
            await self._renew_places([each for each in self._visits() if each.granted and each.pool == pool])
        for visit in lost:
            if visit.left or visit.granted or visit.ticket is None:
                continue
            entry = unpack_entry(await self._far.enter(pool, visit.ticket, self._room_of(visit)))
            if not visit.left:
                self._moved(visit, entry)


def chunks(visits: Sequence[Visit], size: int) -> Iterable[Sequence[Visit]]:
    return (visits[first : first + size] for first in range(0, len(visits), size))
