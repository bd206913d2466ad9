"""Where reservations and places are kept: in this process, or in Redis and, while that is away, on one share of it.

`near` is the limiter and the queue of this process. Without Redis it is all there is. With Redis it stands in while
Redis does not answer: it then charges every request as many times as there were gateways when Redis was last heard of,
which is this gateway's share of every limit, and has that share of every pool's places. Starting from full bursts, all
gateways together admit at most one burst beyond the limits in an outage.

What has to be told to Redis and cannot be (settlements, cancellations of what may or may not have arrived) is kept, in
order and bounded, and told when it is back; all of it is idempotent. Places and leases that are held are put back there
by the next renewal, and whoever waits enters the line that is in force anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.admission.refusals import QueueFull
from gateway.admission.rooms import FOREVER_US
from gateway.admission.visit import Visit
from gateway.store.limits import Cost, Rate, Scope
from gateway.store.memory_limits import MemoryLimits
from gateway.store.memory_places import MemoryPlaces
from gateway.store.places import Room, State
from gateway.store.protocol import StoreError
from gateway.store.redis.limits import unpack_admission
from gateway.store.redis.places import unpack_entry, unpack_granted

if TYPE_CHECKING:  # a gateway without Redis does not load its client
    from gateway.store.redis.far import Far

logger = logging.getLogger(__name__)

LEASE_US = 30_000_000
"""How long a dead gateway's reservations and places stay taken in Redis."""
RENEW_EVERY_S = 10.0
BEAT_S = 1.0
"""How often a gateway tells Redis that it is there; those that wait at one that is silent for three are passed over."""
RENEWED_AT_ONCE = 100
"""Places in one call: about 0.4 ms of Redis' time."""
MAX_UNTOLD = 20_000
"""Settlements kept for Redis. Beyond it the oldest are dropped: their tokens stay charged, their leases run out."""


class Mode(StrEnum):
    """What decides at the moment; `x-tidegate-store` and `tidegate_store_mode` say it."""

    MEMORY = "memory"
    REDIS = "redis"
    LOCAL = "local"


class Home:
    """Belongs to one worker and its event loop. `on_grant` is told of requests that have a place now."""

    def __init__(self, gateway: str, far: Far | None, on_grant: Callable[[str, str], None]) -> None:
        self.gateway = gateway
        self.far = far
        self._on_grant = on_grant
        self.limits = MemoryLimits()
        self.places = MemoryPlaces(now_us, lambda _, pool, id: on_grant(pool, id))
        self.gateways = 1
        """Gateway processes that shared Redis when it was last heard of, this one included."""
        self.mode = Mode.MEMORY if far is None else (Mode.REDIS if far.client.available else Mode.LOCAL)
        self.mode_since = time.monotonic()
        self.dropped = 0
        """Settlements that Redis will never hear of."""
        self.subscribe_later: Callable[[], Awaitable[object]] | None = None
        """To be called when Redis answers for the first time: it did not at the start."""
        self._untold: deque[Callable[[Far], asyncio.Future[Any]]] = deque()
        self._shares: dict[tuple[int, int], tuple[tuple[Scope, ...], tuple[Scope, ...]]] = {}

    # -- letting in

    def admit_near(self, visit: Visit) -> None:
        """Reserve in this process, and ask for a place if all limits allow it."""
        visit.near = True
        visit.share = share = self.gateways if self.far is not None else 1
        if visit.scopes:
            scopes, cost = visit.scopes, visit.reserved
            if share > 1:
                cost = times(cost, share)
                scopes = self._shared(scopes, share)
            visit.admission = self.limits.admit_now(visit.id, scopes, cost, FOREVER_US)
            if not visit.admission.admitted:
                return
        if visit.ticket is not None:
            self._enter_near(visit)

    def _enter_near(self, visit: Visit) -> None:
        assert visit.ticket is not None
        assert visit.room is not None
        visit.place_near = True
        visit.entry = self.places.enter_now(visit.pool, visit.ticket, self._near_room(visit.room))
        visit.granted = visit.entry.state is State.GRANTED

    async def admit_far(self, visit: Visit) -> bool:
        """Reserve in Redis and ask for a place, in one round trip. False: it is away, and nothing is known."""
        far = self.far
        assert far is not None
        visit.near = False
        visit.share = 1
        asked: list[asyncio.Future[Any]] = []
        if visit.scopes:
            asked.append(far.admit(visit.id, visit.scopes, visit.reserved, LEASE_US))
        if visit.ticket is not None and visit.room is not None:
            visit.place_far = True
            asked.append(far.enter(visit.pool, visit.ticket, visit.room))
        visit.asked = True
        answers = await asyncio.gather(*asked, return_exceptions=True)
        visit.asked = False
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            self._forget_far(visit)
            for failure in failures:
                if not isinstance(failure, StoreError):
                    raise failure
            return False
        if visit.scopes:
            visit.admission = unpack_admission(answers[0])
        if visit.place_far:
            visit.entry = unpack_entry(answers[-1])
            visit.granted |= visit.entry.state is State.GRANTED
        return True

    def _forget_far(self, visit: Visit) -> None:
        """Whether it has arrived is unknown: have it undone, and not be done any more if it comes late."""
        visit.asked = False
        if visit.scopes:
            say = partial(_settle, id=visit.id, scopes=visit.scopes, reserved=visit.reserved, used=None)
            self._tell(say, visit.pool)
        if visit.place_far:
            self.give_up_place(visit, None)

    # -- giving back

    def give_back(self, visit: Visit, used: Cost | None, work: int | None) -> None:
        """End a visit. `used`: what it really took; None: as if it had never been. `work`: the same in VTC's units."""
        if visit.asked:
            self._forget_far(visit)
        if visit.admitted:
            if visit.near:
                self._settle_near(visit, used)
            else:
                say = partial(_settle, id=visit.id, scopes=visit.scopes, reserved=visit.reserved, used=used)
                self._tell(say, visit.pool)
        self.give_up_place(visit, work)

    def give_up_place(self, visit: Visit, work: int | None) -> None:
        """Leave the line, or the place; whoever is next and waits here is told."""
        room = visit.room
        if room is None:
            return
        if visit.place_near:
            visit.place_near = False
            granted = self.places.leave_now(visit.pool, visit.id, self.gateway, work, self._near_room(room))
            for id in granted.ids:
                self._on_grant(visit.pool, id)
        if visit.place_far:
            visit.place_far = False
            say = partial(_leave, pool=visit.pool, id=visit.id, gateway=self.gateway, used=work, room=room)
            self._tell(say, visit.pool)
        visit.granted = False

    def _settle_near(self, visit: Visit, used: Cost | None) -> None:
        scopes, reserved = visit.scopes, visit.reserved
        if visit.share > 1:
            reserved = times(reserved, visit.share)
            scopes = self._shared(scopes, visit.share)
            used = None if used is None else times(used, visit.share)
        if used is None:
            self.limits.cancel_now(visit.id, scopes, reserved)
        else:
            self.limits.settle_now(visit.id, scopes, reserved, used)

    def _tell(self, say: Callable[[Far], asyncio.Future[Any]], pool: str) -> None:
        """Tell Redis something that nobody waits for; keep it when Redis is away."""
        far = self.far
        assert far is not None
        if not far.client.available:
            self._tell_later(say)
            return
        future = say(far)
        future.add_done_callback(partial(self._told, say=say, pool=pool))

    def _told(self, future: asyncio.Future[Any], *, say: Callable[[Far], asyncio.Future[Any]], pool: str) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, StoreError):
            self._tell_later(say)
        elif error is not None:
            logger.error("a settlement failed: %s", error)
        elif isinstance(say, partial) and say.func is _leave and self.far is not None:
            for id in unpack_granted(future.result()).ids:
                self._on_grant(pool, id)

    def _tell_later(self, say: Callable[[Far], asyncio.Future[Any]]) -> None:
        if len(self._untold) >= MAX_UNTOLD:
            self._untold.popleft()
            self.dropped += 1
        self._untold.append(say)

    @property
    def untold(self) -> int:
        return len(self._untold)

    # -- keeping

    async def beat(self, visits: Sequence[Visit], now: float) -> bool:
        """Once a second: a sign of life, renewals, what was left untold. Whether Redis has heard it."""
        far = self.far
        if far is None:
            return True
        try:
            self.gateways = max(1, await far.store.beat(self.gateway, 3 * BEAT_S))
            self._now_in(Mode.REDIS)
            if self.subscribe_later is not None:
                await self.subscribe_later()
                self.subscribe_later = None
            await self._tell_untold(far)
            await self._renew(far, [visit for visit in visits if not visit.left], now)
        except StoreError as error:
            logger.debug("the sign of life did not reach Redis: %s", error)
            return False
        return True

    async def say_goodbye(self) -> None:
        """Tell Redis what it has not been told yet, if it listens."""
        if self.far is not None and self.far.client.available:
            await self._tell_untold(self.far)

    def changed(self, available: bool, visits: Sequence[Visit]) -> None:
        """Redis went away or came back; told by its client. Whoever has or wants a place is known here from now on."""
        self._now_in(Mode.REDIS if available else Mode.LOCAL)
        if available:
            return  # the next beat takes everybody back there
        for visit in visits:
            if visit.left or visit.place_near or visit.entry is None or visit.ticket is None or visit.room is None:
                continue
            room = self._near_room(visit.room)
            if visit.granted:
                visit.place_near = True
                self.places.renew_now(visit.pool, self.gateway, [visit.ticket], [], room)
            else:
                entry = visit.entry
                self._enter_near(visit)
                if visit.entry.state is State.GRANTED:
                    self._on_grant(visit.pool, visit.id)
                elif visit.entry.state is State.REFUSED and visit.waiter is not None and not visit.waiter.done():
                    visit.waiter.set_exception(QueueFull(visit.entry))
                visit.entry = entry

    def _now_in(self, mode: Mode) -> None:
        if mode is self.mode or self.far is None:
            return
        self.mode = mode
        self.mode_since = time.monotonic()
        if mode is Mode.LOCAL:
            logger.warning(
                "limits: Redis at %s is away; this process goes on with one of %d shares of every limit",
                self.far.client.address.shown,
                self.gateways,
            )
        else:
            logger.warning("limits: Redis at %s is back; limits are shared again", self.far.client.address.shown)

    async def _tell_untold(self, far: Far) -> None:
        while self._untold and far.client.available:
            batch = [self._untold.popleft() for _ in range(min(len(self._untold), 256))]
            answers = await asyncio.gather(*(say(far) for say in batch), return_exceptions=True)
            failed = [say for say, answer in zip(batch, answers, strict=True) if isinstance(answer, StoreError)]
            self._untold.extendleft(reversed(failed))
            if failed:
                return

    async def _renew(self, far: Far, visits: Sequence[Visit], now: float) -> None:
        """Renew leases that are due, and give a sign of life for every request that waits."""
        due = {visit.id for visit in visits if visit.lease_due_at <= now}
        held = [visit.held() for visit in visits if visit.id in due and visit.admitted and not visit.near]
        if held:
            await far.limits.renew(held, LEASE_US)
        by_pool: dict[str, list[Visit]] = {}
        for visit in visits:
            if visit.ticket is None or visit.room is None or visit.entry is None:
                continue
            # Whoever is here because Redis was away goes back there at once.
            if visit.place_near or not visit.granted or visit.id in due:
                by_pool.setdefault(visit.pool, []).append(visit)
        for pool, members in by_pool.items():
            await self._renew_places(far, pool, members)
        for visit in visits:
            if visit.id in due:
                visit.lease_due_at = now + RENEW_EVERY_S

    async def _renew_places(self, far: Far, pool: str, members: Sequence[Visit]) -> None:
        tickets = [visit.ticket for visit in members if visit.granted and visit.ticket is not None]
        waiting = {visit.id: visit for visit in members if not visit.granted}
        for visit in members:
            visit.place_far = True
        room = members[-1].room
        assert room is not None
        for first in range(RENEWED_AT_ONCE, len(tickets), RENEWED_AT_ONCE):
            await far.places.renew(pool, self.gateway, tickets[first : first + RENEWED_AT_ONCE], (), room)
        renewal = await far.places.renew(pool, self.gateway, tickets[:RENEWED_AT_ONCE], list(waiting), room)
        for id in renewal.granted:
            self._on_grant(pool, id)
        for id in renewal.lost:
            visit = waiting[id]
            if visit.left or visit.granted or visit.ticket is None:
                continue
            entry = await far.places.enter(pool, visit.ticket, room)
            if entry.state is State.GRANTED and not visit.left:
                self._on_grant(pool, id)
        for visit in members:
            if visit.place_near:
                visit.place_near = False
                granted = self.places.leave_now(pool, visit.id, self.gateway, None, self._near_room(room))
                for id in granted.ids:
                    self._on_grant(pool, id)

    # -- rooms and shares

    def _near_room(self, room: Room) -> Room:
        if self.far is None:
            return room
        share = self.gateways
        return msgspec.structs.replace(
            room,
            requests=max(1, room.requests // share),
            tokens=None if room.tokens is None else max(1, room.tokens // share),
            lease_us=FOREVER_US,
            grant_us=FOREVER_US,
            gateway_us=FOREVER_US,
        )

    def _shared(self, scopes: tuple[Scope, ...], share: int) -> tuple[Scope, ...]:
        """The scopes for charging every request `share` times; remembered, since plans are shared by requests."""
        key = (id(scopes), share)
        found = self._shares.get(key)
        if found is None or found[0] is not scopes:
            if len(self._shares) > 1000:
                self._shares.clear()
            found = self._shares[key] = (scopes, tuple(shared(scope, share) for scope in scopes))
        return found[1]


def now_us() -> int:
    """Microseconds since 1970, by this machine's clock."""
    return time.time_ns() // 1000


def times(cost: Cost, factor: int) -> Cost:
    return Cost(
        cost.requests * factor, cost.input * factor, cost.output * factor, cost.total * factor, cost.micros * factor
    )


def shared(scope: Scope, share: int) -> Scope:
    """One of `share` equal parts of a scope, for requests that are charged `share` times.

    Rates and budgets stay as they are, so that parts smaller than one request are possible: such a request passes when
    nothing is owed. Of concurrency everybody keeps at least one.
    """
    rates = tuple(Rate(rate.unit, rate.per_minute, rate.burst, rate.largest * share) for rate in scope.rates)
    concurrent = None if scope.concurrent is None else max(1, scope.concurrent // share)
    return Scope(scope.key, rates, concurrent, scope.budgets, scope.shadow)


def _settle(far: Far, *, id: str, scopes: tuple[Scope, ...], reserved: Cost, used: Cost | None) -> asyncio.Future[Any]:
    return far.settle(id, scopes, reserved, used)


def _leave(far: Far, *, pool: str, id: str, gateway: str, used: int | None, room: Room) -> asyncio.Future[Any]:
    return far.leave(pool, id, gateway, used, room)
