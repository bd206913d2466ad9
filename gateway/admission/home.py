"""Where reservations and places are kept: in this process, or in Redis and, while that is away, on one share of it.

Without Redis the limiter and the lines of this process (`near`) are all there is. With it, Redis decides, and `near`
stands in whenever it does not answer. It knows then every place and every lease that this process holds: they are
carried there before anything is decided, those of running requests first. When Redis is back, everything is carried to
it before it decides again, so nobody is granted a place by the change itself. All gateways together admit at most one
burst beyond the limits in an outage.

What has to be told to Redis and cannot be (settlements, cancellations of what may or may not have arrived) is kept, in
order and bounded, and told when it is back; all of it is idempotent. Since Redis buries the ids that were given up, a
request that comes back to it comes under another: `<id>/1`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.admission.carrier import AT_ONCE, LEASE_US, Carrier
from gateway.admission.near import Near
from gateway.admission.refusals import QueueFull
from gateway.admission.visit import Visit
from gateway.store.limits import Cost, Reading, Scope
from gateway.store.places import Entry, Room, State
from gateway.store.protocol import StoreError, StoreUnavailable
from gateway.store.redis.limits import unpack_admission
from gateway.store.redis.places import unpack_entry, unpack_granted

if TYPE_CHECKING:  # a gateway without Redis does not load its client
    from gateway.store.redis.far import Far
    from gateway.store.redis.store import Beat

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""How often a gateway tells Redis that it is there; those that wait at one that is silent for three are passed over."""
OTHERS_BACK_S = 1.0
"""How long the return waits for the other gateways that were there before: they find out within 1.6 s."""
FEWER_AFTER_S = 10.0
"""How long other gateways have to be gone before a share grows: a Redis that comes back empty counts from one again."""
MAX_UNTOLD = 20_000
"""Settlements kept for Redis. Beyond it the oldest are dropped: their tokens stay charged, their leases run out."""

READ_AT_ONCE = 256
"""Scopes of which operators are told how they stand before requests have a turn: about a millisecond."""

Say = Callable[["Far"], "asyncio.Future[Any]"]


class Mode(StrEnum):
    """What decides at the moment; `x-tidegate-store` and `tidegate_store_mode` say it."""

    MEMORY = "memory"
    REDIS = "redis"
    LOCAL = "local"


class Home:
    """Belongs to one worker and its event loop.

    `visits` are everybody inside or waiting, `room_of` a pool's room as it is now. `on_grant(pool, id)` is told of
    requests that have a place, and says which it is if it is still there. `workers`: processes of this gateway, so
    that a share is never more than that.
    """

    def __init__(
        self,
        gateway: str,
        far: Far | None,
        *,
        visits: Callable[[], Iterable[Visit]],
        room_of: Callable[[Visit], Room],
        on_grant: Callable[[str, str], Visit | None],
        workers: int = 1,
    ) -> None:
        self.gateway = gateway
        self.far = far
        self.near = Near(gateway, shared=far is not None, on_grant=on_grant)
        self.gateways = workers
        """Gateway processes that shared Redis when it was last heard of, this one included."""
        self.mode = Mode.MEMORY if far is None else Mode.REDIS
        self.mode_since = time.monotonic()
        self.dropped = 0
        """Settlements that Redis will never hear of."""
        self.subscribe_later: Callable[[], Awaitable[object]] | None = None
        """To be called when Redis answers for the first time: it did not at the start."""
        self._visits = visits
        self._room_of = room_of
        self._on_grant = on_grant
        self._workers = workers
        self._as_many_at = 0.0
        """When there were last as many gateways as `gateways`."""
        self._back_since: float | None = None
        """Since when Redis answers again, while this process still stands in."""
        self._standing_in = False
        """`near` knows everybody's places and leases."""
        self._untold: deque[Say] = deque()
        self._carrier: Carrier | None = None
        if far is not None:
            self._carrier = Carrier(
                far,
                gateway,
                visits=visits,
                room_of=room_of,
                granted=self.granted_far,
                moved=self._after_moving,
            )

    @property
    def untold(self) -> int:
        return len(self._untold)

    # -- letting in

    async def let_in(self, visit: Visit) -> None:
        """Reserve in all limits and ask for a place, or for one in the line: in one step, and one round trip.

        The visit says what came of it. Asks for no place where a limit refuses.
        """
        if self.mode is Mode.REDIS and await self._ask_far(visit):
            return
        self.let_in_near(visit)

    def let_in_near(self, visit: Visit) -> None:
        """The same in this process."""
        if self.far is not None and not self._standing_in:
            self._stand_in()
        visit.near = True
        if visit.scopes and not self.near.admit(visit, self._share).admitted:
            return
        if visit.ticket is not None:
            self._enter_near(visit)

    async def enter_again(self, visit: Visit) -> None:
        """Ask for another place after the first was given up; the reservations stay as they are."""
        assert visit.ticket is not None
        self._rename_place(visit)
        visit.granted = False
        if self.mode is Mode.REDIS and self.far is not None:
            visit.place_far = True
            try:
                self._entered(visit, unpack_entry(await self.far.enter(visit.pool, visit.ticket, self._room_of(visit))))
                return
            except StoreError:
                self._forget_place(visit)
        if self.far is not None and not self._standing_in:
            self._stand_in()
        self._enter_near(visit)

    async def _ask_far(self, visit: Visit) -> bool:
        """False: it is away, and nothing is known."""
        far = self.far
        assert far is not None
        asked: list[asyncio.Future[Any]] = []
        if visit.scopes:
            asked.append(far.admit(visit.charge_id, visit.scopes, visit.reserved, LEASE_US))
        if visit.ticket is not None:
            visit.place_far = True
            asked.append(far.enter(visit.pool, visit.ticket, self._room_of(visit)))
        visit.asked = True
        answers: list[Any] = []
        failure: Exception | None = None
        for future in asked:  # each is awaited, whatever became of the one before
            try:
                answers.append(await future)
            except asyncio.CancelledError:
                for each in asked:
                    each.cancel()
                raise
            except Exception as error:
                failure = error if failure is None or not isinstance(error, StoreError) else failure
        visit.asked = False
        if failure is not None:
            self._forget(visit)
            if not isinstance(failure, StoreError):
                raise failure
            if not isinstance(failure, StoreUnavailable):
                logger.error("limits: Redis refuses what it is asked: %s", failure)
            return False
        if visit.scopes:
            visit.admission = unpack_admission(answers[0])
            visit.charged_far = visit.admission.admitted
        if visit.ticket is not None:
            self._entered(visit, unpack_entry(answers[-1]))
        return True

    def _entered(self, visit: Visit, entry: Entry) -> None:
        """What Redis has answered; while `near` stands in, it hears of it as well."""
        visit.entry = entry
        visit.granted |= entry.state is State.GRANTED
        visit.place_far = entry.state is not State.REFUSED
        if self._standing_in:
            if visit.granted:
                self.near.hold(visit, self._room_of(visit), self._share)
            elif visit.place_far and self.mode is Mode.LOCAL:  # it went away before this answer was read
                visit.granted = self.near.enter(visit, self._room_of(visit), self._share).state is State.GRANTED
            if visit.charged_far and not visit.charged_near:
                self.near.carry(visit, self._share)

    def _enter_near(self, visit: Visit) -> None:
        visit.entry = self.near.enter(visit, self._room_of(visit), self._share)
        visit.granted = visit.entry.state is State.GRANTED
        visit.place_near = visit.entry.state is not State.REFUSED

    @property
    def _share(self) -> int:
        return 1 if self.far is None else self.gateways

    async def read(self, scopes: Sequence[Scope]) -> list[Reading]:
        """How scopes stand where it is decided at the moment; nothing is changed. Raises `StoreError`."""
        if self.mode is Mode.REDIS and self.far is not None:
            return await self.far.limits.read(scopes)
        found: list[Reading] = []
        for first in range(0, len(scopes), READ_AT_ONCE):
            found += self.near.read(scopes[first : first + READ_AT_ONCE])
            await asyncio.sleep(0)  # requests come first
        return found

    # -- giving back

    def give_back(self, visit: Visit, used: Cost | None, work: int | None) -> None:
        """End a visit. `used`: what it really took; None: as if it had never been. `work`: the same in VTC's units."""
        if visit.asked:
            self._forget(visit)
        if visit.charged_near:
            self.near.settle(visit, used)
        if visit.charged_far:
            visit.charged_far = False
            self._tell(
                partial(_settle, id=visit.charge_id, scopes=visit.scopes, reserved=visit.reserved, used=used),
                visit.pool,
            )
        if visit.ticket is not None:
            self.give_up_place(visit, work)

    def give_up_place(self, visit: Visit, work: int | None) -> None:
        """Leave the line, or the place; whoever is next and waits here is told."""
        if not visit.place_near and not visit.place_far:
            return
        room = self._room_of(visit)
        if visit.place_far and visit.ticket is not None:
            visit.place_far = False
            id = visit.ticket.id
            self._tell(partial(_leave, pool=visit.pool, id=id, gateway=self.gateway, used=work, room=room), visit.pool)
        if visit.place_near:
            self.near.leave(visit, work, room, self._share)
        visit.granted = False

    def _forget(self, visit: Visit) -> None:
        """Whether Redis was reached is unknown: have it undone, and not be done any more if it comes late."""
        visit.asked = False
        if visit.scopes:
            say = partial(_settle, id=visit.charge_id, scopes=visit.scopes, reserved=visit.reserved, used=None)
            self._tell(say, visit.pool)
            visit.charged_far = False
            visit.charge_id = _renamed(visit.charge_id)
        if visit.place_far:
            self._forget_place(visit)

    def _forget_place(self, visit: Visit) -> None:
        self.give_up_place(visit, None)
        self._rename_place(visit)

    def _rename_place(self, visit: Visit) -> None:
        if visit.ticket is not None:
            visit.ticket = msgspec.structs.replace(visit.ticket, id=_renamed(visit.ticket.id))

    def _tell(self, say: Say, pool: str) -> None:
        """Tell Redis something that nobody waits for; keep it when Redis is away."""
        far = self.far
        if far is None:
            return
        if not far.client.available:
            self._tell_later(say)
            return
        say(far).add_done_callback(partial(self._told, say=say, pool=pool))

    def _told(self, future: asyncio.Future[Any], *, say: Say, pool: str) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, StoreUnavailable):
            self._tell_later(say)
        elif error is not None:
            self.dropped += 1
            logger.error("limits: Redis refuses a settlement, which is dropped: %s", error)
        elif isinstance(say, partial) and say.func is _leave:
            for id in unpack_granted(future.result()).ids:
                self.granted_far(pool, id)

    def _tell_later(self, say: Say) -> None:
        """Money goes without: until it is told it is on record, and every admission says what is."""
        if isinstance(say, partial) and say.func is _settle and say.keywords["used"] is not None:
            say = partial(say, used=msgspec.structs.replace(say.keywords["used"], micros=0))
        if len(self._untold) >= MAX_UNTOLD:
            self._untold.popleft()
            self.dropped += 1
        self._untold.append(say)

    # -- going away, coming back

    def changed(self, available: bool) -> None:
        """Redis went away, or came back; told by its client. It decides again when everything was carried there."""
        if self.far is not None and not available:
            self._now_in(Mode.LOCAL)
            self._stand_in()

    def granted_far(self, pool: str, id: str) -> None:
        """Redis gave a waiting request its place."""
        visit = self._on_grant(pool, id)
        if visit is not None:
            visit.place_far = True
            if self._standing_in:
                self.near.hold(visit, self._room_of(visit), self._share)

    def _stand_in(self) -> None:
        """Have `near` know everybody: first those that run, so that none of their places is given away."""
        self._standing_in = True
        visits = [visit for visit in self._visits() if not visit.left and not visit.asked]
        for visit in visits:
            if visit.charged_far and not visit.charged_near:
                self.near.carry(visit, self._share)
            if visit.granted and not visit.place_near:
                self.near.hold(visit, self._room_of(visit), self._share)
        for visit in visits:
            if not visit.in_line or visit.place_near:
                continue
            entry = self.near.enter(visit, self._room_of(visit), self._share)
            visit.place_near = entry.state is not State.REFUSED
            self._after_moving(visit, entry)

    def _after_moving(self, visit: Visit, entry: Entry) -> None:
        """One that waits has been entered in another line."""
        if entry.state is State.GRANTED:
            self._on_grant(visit.pool, visit.ticket.id if visit.ticket is not None else "")
        elif entry.state is State.REFUSED and visit.waiter is not None and not visit.waiter.done():
            visit.waiter.set_exception(QueueFull(entry))

    async def beat(self, now: float) -> bool:
        """Once a second: a sign of life, renewals, what was left untold. Whether Redis has heard it, if there is one.

        Without Redis, a look at whether pools have grown.
        """
        far, carrier = self.far, self._carrier
        if far is None or carrier is None:
            self._look()
            return True
        try:
            if self._standing_in:
                await carrier.carry_running(now)  # before anybody counts this process as one that is back
                if self._back_since is None:
                    self._back_since = self._as_many_at = now
            beat = await far.store.beat(self.gateway, 3 * BEAT_S)
            self._count(beat.live, now)
            if self.subscribe_later is not None:
                await self.subscribe_later()
                self.subscribe_later = None
            await self._tell_untold(far)
            if self._standing_in:
                await self._come_back(carrier, beat, now)
            else:
                if not beat.known:
                    await carrier.carry(now)
                await carrier.renew(now)
        except StoreError as error:
            logger.debug("the sign of life did not reach Redis: %s", error)
            self._back_since = None
            if self._standing_in:
                self._look()
            return False
        return True

    def _count(self, gateways: int, now: float) -> None:
        gateways = max(gateways, self._workers)
        if gateways >= self.gateways:
            self._as_many_at = now
        if gateways >= self.gateways or now - self._as_many_at > FEWER_AFTER_S:
            self.gateways = gateways

    def _look(self) -> None:
        """Grant what has become free without anybody leaving."""
        waiting: dict[str, list[Visit]] = {}
        for visit in self._visits():
            if visit.in_line and visit.place_near:
                waiting.setdefault(visit.pool, []).append(visit)
        for pool, visits in waiting.items():
            ids = [visit.ticket.id for visit in visits if visit.ticket is not None]
            self.near.look(pool, ids, self._room_of(visits[0]), self._share)

    def _now_in(self, mode: Mode) -> None:
        if mode is self.mode or self.far is None:
            return
        self.mode = mode
        self.mode_since = time.monotonic()
        where = self.far.client.address.shown
        if mode is Mode.LOCAL:
            logger.warning(
                "limits: Redis at %s is away; this process goes on with one of %d shares of every limit",
                where,
                self.gateways,
            )
        else:
            logger.warning("limits: Redis at %s is back; limits are shared again", where)

    async def say_goodbye(self) -> None:
        """Tell Redis what it has not been told yet, if it listens."""
        if self.far is not None and self.far.client.available:
            await self._tell_untold(self.far)

    async def _tell_untold(self, far: Far) -> None:
        while self._untold and far.client.available:
            batch = [self._untold.popleft() for _ in range(min(len(self._untold), AT_ONCE))]
            answers = await asyncio.gather(*(say(far) for say in batch), return_exceptions=True)
            kept = [say for say, answer in zip(batch, answers, strict=True) if isinstance(answer, StoreUnavailable)]
            for answer in answers:
                if isinstance(answer, Exception) and not isinstance(answer, StoreUnavailable):
                    self.dropped += 1
                    logger.error("limits: Redis refuses a settlement, which is dropped: %s", answer)
            self._untold.extendleft(reversed(kept))
            if kept:
                return

    async def _come_back(self, carrier: Carrier, beat: Beat, now: float) -> None:
        """What runs is there: wait until the other gateways' is, too, then carry those who wait, have Redis decide
        again, and carry what has come in between.

        A Redis that has lost its memory knows only of places that were carried to it: whoever lets it decide before
        the others are back has their places granted once more.
        """
        if beat.live < self.gateways and self._back_since is not None and now - self._back_since < OTHERS_BACK_S:
            return
        self._back_since = None
        await carrier.carry(now)
        self._now_in(Mode.REDIS)
        while any(_not_there(visit) for visit in self._visits()):
            await carrier.carry(now)
        self._standing_in = False  # from the last look to here nothing was awaited
        self.near.forget_places()
        for visit in self._visits():
            visit.place_near = False


def _not_there(visit: Visit) -> bool:
    """Whether a visit has or wants a place that Redis does not know of, or a lease."""
    if visit.left or visit.asked:
        return False
    if visit.charged_near and not visit.charged_far:
        return True
    return visit.ticket is not None and not visit.place_far and (visit.granted or visit.in_line)


def _renamed(id: str) -> str:
    base, _, number = id.partition("/")
    return f"{base}/{int(number or 0) + 1}"


def _settle(far: Far, *, id: str, scopes: tuple[Scope, ...], reserved: Cost, used: Cost | None) -> asyncio.Future[Any]:
    return far.settle(id, scopes, reserved, used)


def _leave(far: Far, *, pool: str, id: str, gateway: str, used: int | None, room: Room) -> asyncio.Future[Any]:
    return far.leave(pool, id, gateway, used, room)
