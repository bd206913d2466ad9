"""Requests that wait for the first replica of a pool: in the same line as those that no replica has room for.

What differs is how long they may wait (`queue.start_wait_s`), what they are told when that was not long enough, and
that whoever has somewhere else to go goes there first. KEDA's HTTP add-on, Knative's activator and Ray Serve hold
requests as well; the first two had to learn that such a wait needs an end, and that a start may fail
(https://github.com/knative/serving/issues/13211).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from gateway.admission.metrics import AdmissionMetrics
from gateway.admission.refusals import Starting
from gateway.admission.rooms import Rooms
from gateway.admission.waits import longest_start_wait_s
from gateway.errors import GatewayError
from gateway.order import Order
from gateway.record import Exchange

if TYPE_CHECKING:
    from gateway.admission.visit import Visit
    from gateway.keys.principal import Principal
    from gateway.relay import Relay
    from gateway.starting.prospects import Prospect

OPEN_WITHIN_S = 10.0
"""How long a place is kept for a request whose gateway has not found the replica yet: others could use it."""
_LOOK_AGAIN_S = 0.05


class Holding:
    """One worker's part of the gate."""

    def __init__(self, rooms: Rooms, metrics: AdmissionMetrics) -> None:
        self._rooms = rooms
        self._metrics = metrics
        self.elsewhere: Callable[[Order, Exchange], bool] = _nowhere
        """Whether another model or pool is to be asked before a request waits for a start."""
        self.crowded: Callable[[], bool] = lambda: False
        """Whether bodies of requests take so much memory that none is to be kept for minutes."""
        self.leaves: Callable[[Order, Exchange, Principal], bool] = _stays
        """The same of a request that is in line when the last replica leaves."""

    @property
    def soon(self) -> bool:
        """A pool may open at any moment, or has just been opened, and it is for us to see it."""
        doors = self._rooms.doors
        return doors is not None and (doors.moving or (doors.some_shut and not self._rooms.shared))

    def is_shut(self, visit: Visit) -> bool:
        """Its pool has no replica now, and is to get one."""
        room = self._rooms.room(visit.order.route.pool, time.monotonic())
        return room is not None and not room.requests

    def _prospect(self, visit: Visit) -> Prospect | None:
        doors = self._rooms.doors
        return None if doors is None else doors.prospect(self._rooms.latest(visit.order.route.pool))

    def begin(self, visit: Visit) -> None:
        """It is in line. Raises `Starting` where it has somewhere else to go, starts are known to take longer than it
        may wait, or there is no room to keep it."""
        prospect = self._prospect(visit)
        if prospect is None:
            return
        exchange = visit.exchange
        exchange.predicted_wait_s = prospect.left_s
        if self.elsewhere(visit.order, exchange):
            raise Starting(prospect, others_first=True)
        late = prospect.takes_longer(visit.max_wait_s)
        if late or self.crowded():
            self._metrics.turned_away(visit.pool, "too_late" if late else "pool_full")
            raise Starting(prospect)

    def sent_away(self, visit: Visit) -> Starting | None:
        """What ends the waiting of a request that came when its pool, which is shut now, had a replica, and that has
        somewhere else to go; None: it waits on. One whose client has some of its answer does."""
        if visit.shut_out or visit.exchange.continuations:
            return None
        if not self.leaves(visit.order, visit.exchange, visit.principal):
            return None
        prospect = self._prospect(visit)
        return None if prospect is None else Starting(prospect, others_first=True)

    async def turn(self, visit: Visit) -> None:
        """Until its waiter is told that it has its place. Raises `TimeoutError`, and what its waiter is told."""
        assert visit.waiter is not None
        left_s = visit.max_wait_s
        while True:
            try:
                async with asyncio.timeout(left_s):
                    await visit.waiter
                return
            except TimeoutError:
                left_s = self._more_s(visit)
                if left_s <= 0.0 or visit.granted:
                    raise
                visit.waiter = asyncio.get_running_loop().create_future()

    def interrupt(self, waiting: Iterable[Visit], error: GatewayError) -> None:
        """End the waiting of those among these that wait for the first replica of a pool."""
        for visit in waiting:
            if visit.waiter is not None and not visit.waiter.done() and self.is_shut(visit):
                visit.waiter.set_exception(error)

    def _more_s(self, visit: Visit) -> float:
        """For how much longer it may wait, its time being over: the pool may have lost its last replica meanwhile."""
        if not self.is_shut(visit) or visit.shut_out or self.elsewhere(visit.order, visit.exchange):
            return 0.0
        began_s = visit.entered_at - visit.exchange.started_at
        longest_s = longest_start_wait_s(
            visit.order, visit.order.route.pool.settings.queue, self._metrics.ttft_s(visit.order.route.model), began_s
        )
        visit.max_wait_s = max(visit.max_wait_s, longest_s)
        return visit.entered_at + visit.max_wait_s - time.monotonic()

    def starting(self, visit: Visit) -> Starting | None:
        """What it is told that has waited in vain; None: its pool is not one that starts."""
        prospect = self._prospect(visit) if self.is_shut(visit) else None
        if prospect is None:
            return None
        return Starting(prospect, min(visit.max_wait_s, time.monotonic() - visit.entered_at))

    async def until_open(self, visit: Visit, relay: Relay) -> None:
        """It has its place, perhaps from a gateway that knows of the replica already: until this one does, too. Then
        its order is one for the pool as it is now. Raises `TimeoutError`, and what ends the request."""
        ends_at = min(visit.entered_at + visit.max_wait_s, time.monotonic() + OPEN_WITHIN_S)
        while self.is_shut(visit):
            if relay.interruption is not None:
                raise relay.interruption
            if time.monotonic() >= ends_at:
                raise TimeoutError
            await asyncio.sleep(_LOOK_AGAIN_S)
        visit.order = self.renewed(visit.order)

    def renewed(self, order: Order) -> Order:
        """The same for the pool after the last reload: a request that has waited may go to replicas that have come
        since. Raises `InvalidRequest` where the engines there now may not be asked for what it has."""
        pool = self._rooms.latest(order.route.pool)
        if pool is order.route.pool:
            return order
        pool.rules.check(order.path, order.body)
        return msgspec.structs.replace(order, route=replace(order.route, pool=pool))


def _nowhere(order: Order, exchange: Exchange) -> bool:
    return False


def _stays(order: Order, exchange: Exchange, caller: Principal) -> bool:
    return False
