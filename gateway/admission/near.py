"""The limiter and the lines of this process: all there is without Redis, and the stand-in while it is away.

As a stand-in it is one of several: it charges every request as many times as there are gateways, which is this one's
share of every rate, and has that share of places, of concurrency, and of what was left of every budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from gateway.admission.rooms import FOREVER_US
from gateway.admission.visit import Visit
from gateway.store.limits import Admission, Budget, Cost, Held, Rate, Reading, Scope
from gateway.store.memory_limits import MemoryLimits
from gateway.store.memory_places import MemoryPlaces
from gateway.store.places import Entry, Room, Standing

MAX_SHARED = 1000
"""Plans whose share is kept; another is made in some microseconds."""


class Near:
    """Belongs to one worker. `shared`: there is a Redis that it stands in for. `on_grant(pool, id)`: somebody has a
    place now."""

    def __init__(self, gateway: str, *, shared: bool, on_grant: Callable[[str, str], object]) -> None:
        self._gateway = gateway
        self._is_share = shared
        self._on_grant = on_grant
        self._limits = MemoryLimits(echoes=False)
        self._places = self._no_places()
        self._shares: dict[tuple[int, int], tuple[tuple[Scope, ...], tuple[Scope, ...]]] = {}
        self._rooms: dict[tuple[Room, int], Room] = {}

    # -- limits

    def admit(self, visit: Visit, share: int) -> Admission:
        """Reserve in the visit's scopes, as one of `share` gateways."""
        visit.share = share
        if share == 1:
            admission = self._limits.admit_now(visit.id, visit.scopes, visit.reserved, FOREVER_US)
        else:
            scopes = self._shared(visit.scopes, share)
            admission = self._limits.admit_now(visit.id, scopes, times(visit.reserved, share), FOREVER_US)
        visit.admission = admission
        visit.charged_near = admission.admitted
        return admission

    def settle(self, visit: Visit, used: Cost | None) -> None:
        """Settle, or cancel if nothing was `used`, what was reserved here or carried here."""
        visit.charged_near = False
        scopes, reserved, share = visit.scopes, visit.reserved, visit.share
        if share > 1:
            scopes, reserved = self._shared(scopes, share), times(reserved, share)
            used = None if used is None else times(used, share)
        if used is None:
            self._limits.cancel_now(visit.id, scopes, reserved)
        else:
            self._limits.settle_now(visit.id, scopes, reserved, used)

    def carry(self, visit: Visit, share: int) -> None:
        """Have the leases of a running request count here, too; its rates were charged where it was admitted."""
        visit.share = share
        visit.charged_near = True
        held = Held(visit.id, self._shared(visit.scopes, share), times(visit.reserved, share))
        self._limits.renew_now([held], FOREVER_US)

    def read(self, scopes: Sequence[Scope]) -> list[Reading]:
        """How scopes stand here, for operators."""
        return self._limits.read_now(scopes)

    # -- places

    def enter(self, visit: Visit, room: Room, share: int) -> Entry:
        """Ask for a place, or for one in the line."""
        assert visit.ticket is not None
        entry = self._places.enter_now(visit.pool, visit.ticket, self._room(room, share))
        visit.place_near = True
        return entry

    def hold(self, visit: Visit, room: Room, share: int) -> None:
        """Have a place that is in use count here, too, whether there is room or not."""
        assert visit.ticket is not None
        visit.place_near = True
        self._places.renew_now(visit.pool, self._gateway, [visit.ticket], (), self._room(room, share))

    def leave(self, visit: Visit, work: int | None, room: Room, share: int) -> None:
        """Give up the place, or the place in the line; whoever is next is told."""
        assert visit.ticket is not None
        visit.place_near = False
        room = self._room(room, share)
        granted = self._places.leave_now(visit.pool, visit.ticket.id, self._gateway, work, room)
        for id in granted.ids:
            self._on_grant(visit.pool, id)

    def look(self, pool: str, waiting: list[str], room: Room, share: int) -> None:
        """Grant what has become free without anybody leaving: the pool has grown."""
        renewal = self._places.renew_now(pool, self._gateway, (), waiting, self._room(room, share))
        for id in renewal.granted:
            self._on_grant(pool, id)

    def standing(self, pool: str) -> Standing:
        return self._places.standing_now(pool)

    def forget_places(self) -> None:
        """Everybody's place is in Redis again: no line here knows anybody, and nobody is granted anything by that."""
        self._places = self._no_places()

    def _no_places(self) -> MemoryPlaces:
        return MemoryPlaces(now_us, self._granted, echoes=False)

    def _granted(self, _: str, pool: str, id: str) -> None:
        self._on_grant(pool, id)

    # -- shares

    def _room(self, room: Room, share: int) -> Room:
        if not self._is_share:
            return room
        found = self._rooms.get((room, share))
        if found is None:
            if len(self._rooms) >= MAX_SHARED:
                self._rooms.clear()
            found = self._rooms[room, share] = msgspec.structs.replace(
                room,
                requests=max(1, room.requests // share) if room.requests else 0,
                tokens=None if room.tokens is None else max(1, room.tokens // share),
                lease_us=FOREVER_US,
                grant_us=FOREVER_US,
                gateway_us=FOREVER_US,
            )
        return found

    def _shared(self, scopes: tuple[Scope, ...], share: int) -> tuple[Scope, ...]:
        """Remembered by the tuple itself, which requests of one plan have in common."""
        if share == 1:
            return scopes
        key = (id(scopes), share)
        found = self._shares.get(key)
        if found is None or found[0] is not scopes:
            if len(self._shares) >= MAX_SHARED:
                self._shares.clear()
            found = self._shares[key] = (scopes, tuple(shared(scope, share) for scope in scopes))
        return found[1]


def now_us() -> int:
    """Microseconds since 1970, by this machine's clock."""
    return time.time_ns() // 1000


def times(cost: Cost, factor: int) -> Cost:
    """What a request is charged as one of so many gateways' shares; its money counts once, see `shared`."""
    return Cost(cost.requests * factor, cost.input * factor, cost.output * factor, cost.total * factor, cost.micros)


def shared(scope: Scope, share: int) -> Scope:
    """One of `share` equal parts of a scope, for requests that are charged `share` times.

    Rates stay as they are, so that parts smaller than one request are possible: such a request passes when nothing is
    owed. Of concurrency everybody keeps at least one. Of a budget it is a part of what is left, after the spend of
    record that is known.
    """
    rates = tuple(Rate(rate.unit, rate.per_minute, rate.burst, rate.largest * share) for rate in scope.rates)
    concurrent = None if scope.concurrent is None else max(1, scope.concurrent // share)
    budgets = tuple(
        Budget(
            budget.period,
            budget.floor_micros + max(0, budget.limit_micros - budget.floor_micros) // share,
            budget.floor_micros,
            budget.ends_at_us,
        )
        for budget in scope.budgets
    )
    return Scope(scope.key, rates, concurrent, budgets, scope.shadow)
