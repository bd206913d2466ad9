"""Places and the queue for them in one process, and the specification of the Lua scripts: plain synchronous decisions.

Two levels, both free of starvation:

**Who within a band**: start-time fair queueing (Goyal, Vin, Cheng 1996) with VTC's cost (Sheng et al. 2024). A band has
a virtual time V, a tenant a finish tag F. A tenant's first waiting request has the start tag `S = max(V, F)`; the
lowest goes first, of equal ones the earlier; then `V = S` and `F = S + cost / weight`. The real cost corrects F,
and with it the tag of the tenant's next request, without the lift to V:
who waits cannot hoard, and was overcharged until now.

**Which band**: a band with `share` of the pool is *within its guarantee* when its requests and tokens, the next one
included, are at most that share of both. Those come first, the one with the lowest `use / share` (use: the larger of
both shares, as in dominant resource fairness, Ghodsi et al. 2011). Nobody being within, the bands borrow in turns:
each grant moves the band's turn by `dominant share / share`, the lowest turn is next. Turns count what was granted
within the guarantee too, so a band whose share is less than one place (5 % of 8) gets one for 40 % of the time.
A share of 0 guarantees nothing and takes turns as one of 1 %.

A first request that does not fit into the free tokens keeps bands of a later turn from borrowing, those within their
guarantee pass it. A band that has no place at all, and was passed by turns worth a whole pool at its own share, is
*starved*: it is next, and if its first request does not fit, the pool drains for it.

All tags and turns are whole numbers below 2^53, so that Lua's doubles hold them exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from gateway.store.band_queue import MAX_CHARGE, UNITS, BandQueue, Head, Waiter, charge
from gateway.store.places import Entry, Granted, Renewal, Room, Standing, State, Ticket

TRIM_EVERY = 1024
"""Grants between two looks for finish tags that mean nothing any more."""
TURN = 1_000_000.0
"""Turn units for a whole pool at a share of 1."""
BATCH = 64
"""Expired places and requests of dead gateways that one operation clears, so that none takes long."""
REMEMBER_US = 60_000_000
MAX_GONE = 65_536
"""Ids that have left are kept in two generations of a minute each, or of this many."""
STALE_US = 300_000_000
"""A mean time between releases is forgotten after this time without one in a full pool."""
TIDY_EVERY_US = 3_600_000_000
"""Gateways that have been silent for as long are forgotten, when nobody waits."""
NEVER = 2**62

GRANTED = Entry(State.GRANTED)
LEFT = Entry(State.REFUSED, reason="left")
NOBODY = Granted()


class Grant(NamedTuple):
    gateway: str
    id: str


class _Place(msgspec.Struct):
    ticket: Ticket
    tokens: int
    ends_us: int
    unconfirmed: bool
    """Granted to a request that waited, and its gateway has not renewed it yet."""


class Line:
    """One pool: who has a place and who waits. `now_us` never goes back. Bounded by `room` and by the places held.

    After each call `told` has the requests that were granted and that the answer does not tell; the caller takes them.
    """

    def __init__(self, *, echoes: bool = True) -> None:
        self._echoes = echoes
        """Whether a message may come late or twice, so that ids that have left are remembered."""
        self.told: list[Grant] = []
        self._bands = tuple(BandQueue(index) for index in range(4))
        self._held: dict[str, _Place] = {}
        self._queued: dict[str, Waiter] = {}
        self._by_gateway: dict[str, dict[str, Waiter]] = {}
        self._seen: dict[str, int] = {}
        self._gone: set[str] = set()
        self._gone_before: set[str] = set()
        self._gone_since_us = 0
        self._running = 0
        self._tokens = 0
        self._waiting = 0
        self._number = 0
        self._grants = 0
        self._next_end_us = NEVER
        """No place ends before this."""
        self._interval_us = 0
        self._released_us = 0
        """The last release since the pool is full; 0: it is not."""
        self._measured_us = 0
        self._tidied_us = 0

    # ---- the operations ----

    def enter(self, ticket: Ticket, room: Room, now_us: int) -> Entry:
        """See `Places.enter`. With room free and nobody waiting this is all that happens."""
        self._seen[ticket.gateway] = now_us
        if now_us >= self._next_end_us:
            self._expire(now_us)
        id = ticket.id
        if id in self._held:
            return GRANTED
        if (id in self._gone or id in self._gone_before) and self._has_left(id, now_us):
            return LEFT
        if not self._waiting and self._running < room.requests:
            limit = room.tokens
            tokens = ticket.tokens
            if limit is not None and tokens > limit:
                tokens = limit
            if limit is None or (limit > 0 and self._tokens + tokens <= limit):
                band = self._bands[ticket.band]
                self._grant(band, ticket, tokens, band.start(ticket.tenant), now_us + room.lease_us, False)
                return GRANTED
        return self._enter_line(ticket, room, now_us)

    def leave(self, id: str, gateway: str, used: int | None, room: Room, now_us: int) -> Granted:
        """See `Places.leave`."""
        self._seen[gateway] = now_us
        place = self._held.pop(id, None)
        if place is not None:
            if room.requests and (self._waiting or self._running >= room.requests):
                self._measure(now_us)
            else:
                self._released_us = 0
            self._give_back(place, used)
        elif (waiter := self._queued.get(id)) is not None:
            self._take_out(waiter, granted=False)
        if self._echoes:
            if now_us - self._gone_since_us >= REMEMBER_US or len(self._gone) >= MAX_GONE:
                self._turn_over(now_us)
            self._gone.add(id)
        if now_us >= self._next_end_us:
            self._expire(now_us)
        if self._waiting:
            self._bury(room, now_us)
            self._dispatch(room, now_us)
        if not self._waiting and self._running < room.requests:
            self._released_us = 0
        if now_us - self._tidied_us >= TIDY_EVERY_US:
            self._tidy(now_us)
        if not self.told:
            return NOBODY
        own = tuple(grant.id for grant in self.told if grant.gateway == gateway)
        self.told = [grant for grant in self.told if grant.gateway != gateway]
        return Granted(own)

    def renew(self, gateway: str, held: Sequence[Ticket], waiting: Sequence[str], room: Room, now_us: int) -> Renewal:
        """See `Places.renew`. A place that was granted to a waiting request is confirmed by being in `held`."""
        self._seen[gateway] = now_us
        if not room.requests:
            self._released_us = 0
        ends_us = now_us + room.lease_us
        for ticket in held:
            place = self._held.get(ticket.id)
            if place is not None:
                place.ends_us = ends_us
                place.unconfirmed = False
                if ends_us < self._next_end_us:
                    self._next_end_us = ends_us
            elif not self._has_left(ticket.id, now_us):
                self._put_back(ticket, room, ends_us)
        if now_us >= self._next_end_us:
            self._expire(now_us)
        if self._waiting:
            self._bury(room, now_us)
            self._dispatch(room, now_us)
        granted, lost = [], []
        for id in waiting:
            place = self._held.get(id)
            if place is not None:
                granted.append(id)
                place.ends_us = max(place.ends_us, now_us + room.grant_us)
            elif id not in self._queued:
                lost.append(id)
        if self.told:
            answered = set(granted)
            self.told = [grant for grant in self.told if grant.id not in answered]
        if now_us - self._tidied_us >= TIDY_EVERY_US:
            self._tidy(now_us)
        return Renewal(tuple(granted), tuple(lost))

    def standing(self, now_us: int) -> Standing:
        """See `Places.standing`. Gives back what has run out, but grants nothing."""
        if now_us >= self._next_end_us:
            self._expire(now_us)
        a, b, c, d = self._bands
        return Standing(
            (a.running, b.running, c.running, d.running),
            self._tokens,
            (a.waiting, b.waiting, c.waiting, d.waiting),
            self._interval(now_us),
        )

    # ---- entering when not everybody can be served ----

    def _enter_line(self, ticket: Ticket, room: Room, now_us: int) -> Entry:
        if not room.requests:  # nobody is there to be released: the time until somebody is is no pace
            self._released_us = 0
        if self._waiting:
            self._bury(room, now_us)
        waiter = self._queued.get(ticket.id)
        if waiter is not None:
            position = self._position(waiter, room)
            return Entry(State.WAITING, position, (position + 1) * self._interval(now_us))
        open_ = self._running < room.requests and (room.tokens is None or room.tokens > 0)
        if not open_ and (full := self._full(ticket, room, now_us, 0)) is not None:
            return full
        waiter = self._put_in(ticket)
        if open_:
            self._dispatch(room, now_us)
            if ticket.id in self._held:
                self.told.remove(Grant(ticket.gateway, ticket.id))
                self._held[ticket.id].ends_us = now_us + room.lease_us
                self._held[ticket.id].unconfirmed = False
                return GRANTED
            if (full := self._full(ticket, room, now_us, 1)) is not None:
                self._take_out(waiter, granted=False)
                return full
        position = self._position(waiter, room)
        wait_us = (position + 1) * self._interval(now_us)
        if ticket.max_wait_us <= 0 or wait_us > ticket.max_wait_us:
            self._take_out(waiter, granted=False)
            return Entry(State.REFUSED, position, wait_us, "too_late")
        return Entry(State.WAITING, position, wait_us)

    def _full(self, ticket: Ticket, room: Room, now_us: int, itself: int) -> Entry | None:
        """The refusal when no more may wait; `itself`: 1 when the request is counted among those that do."""
        waiting = self._waiting - itself
        own = sum(len(band.queues.get(ticket.tenant, ())) for band in self._bands) - itself
        if own >= room.max_waiting_per_tenant:
            return Entry(State.REFUSED, own, (own + 1) * self._interval(now_us), "tenant_full")
        sheddable = self._bands[3].waiting - itself
        if waiting >= room.max_waiting or (ticket.band == 3 and sheddable >= room.max_waiting // 2):
            return Entry(State.REFUSED, waiting, (waiting + 1) * self._interval(now_us), "pool_full")
        return None

    def _position(self, waiter: Waiter, room: Room) -> int:
        """Requests that are expected to be served before this one, if requests and tenants' weights are alike.

        With k of its own tenant's before it, in its band: `b = k + min(others' requests, r + m k)`, where m other
        tenants wait, r of which have a first request that is not behind this tenant's first. From every other band:
        `min(waiting, (b + 1) * its share / this one's share)`, rounded down.
        """
        ticket = waiter.ticket
        band = self._bands[ticket.band]
        queue = band.queues[ticket.tenant]
        own = len(queue) - 1
        for other in reversed(queue.values()):
            if other.number <= waiter.number:
                break
            own -= 1
        rank = bisect_right(band.heads, (band.first[ticket.tenant].start, NEVER, "")) - 1
        ahead = own + min(band.waiting - len(queue), rank + (len(band.heads) - 1) * own)
        shares = [max(1, share) for share in room.shares]
        total = ahead
        for other_band in self._bands:
            if other_band.waiting and other_band is not band:
                among = int((ahead + 1) * shares[other_band.index] / shares[ticket.band])
                total += min(other_band.waiting, among)
        return total

    # ---- granting ----

    def _dispatch(self, room: Room, now_us: int) -> None:
        """Give what is free to whoever is next, until nothing is or nobody may take it."""
        if room.tokens is not None and room.tokens <= 0:
            return
        while self._waiting and self._running < room.requests:
            chosen = self._choose(room, now_us)
            if chosen is None:
                return
            band, waiter, tokens, step, within = chosen
            band.turn += step
            if within:
                for other in self._bands:
                    if other.waiting and not other.running and other is not band:
                        other.passed += step
            band.passed = 0
            self._grant(band, waiter.ticket, tokens, band.heads[0].start, now_us + room.grant_us, True)
            self._take_out(waiter, granted=True)
            self.told.append(Grant(waiter.ticket.gateway, waiter.ticket.id))

    def _choose(self, room: Room, now_us: int) -> tuple[BandQueue, Waiter, int, int, bool] | None:
        """The band that is next: its first request, the tokens that takes, how far the turn moves, if within."""
        shares = [max(1, share) for share in room.shares]
        whole = max(100, sum(room.shares))
        places, limit = room.requests, room.tokens
        fitting: list[tuple[BandQueue, Waiter, int, int]] = []
        blocked = starved = (NEVER, 0)
        for band in self._bands:
            if (waiter := self._first(band, room, now_us)) is None:
                continue
            tokens, step = waiter.ticket.tokens, int(TURN / places)
            if limit is not None:
                tokens = min(tokens, limit)
                step = max(step, int(tokens / limit * TURN))
            step = max(1, int(step / shares[band.index]))
            if limit is None or self._tokens + tokens <= limit:
                fitting.append((band, waiter, tokens, step))
            else:
                blocked = min(blocked, (band.turn, band.index))
            if not band.running and band.passed >= TURN / shares[band.index]:
                starved = min(starved, (band.turn, band.index))
        best: tuple[BandQueue, Waiter, int, int, bool] | None = None
        best_key: tuple[int, float, int, int] | None = None
        for band, waiter, tokens, step in fitting:
            share = room.shares[band.index]
            within = (band.running + 1) * whole <= share * places
            use = band.running / places
            if limit is not None:
                within = within and (band.tokens + tokens) * whole <= share * limit
                use = max(use, band.tokens / limit)
            if starved[0] < NEVER and starved != (band.turn, band.index):
                continue
            if within:
                key = (0, use / shares[band.index], band.turn, band.index)
            elif starved[0] < NEVER or (band.turn, band.index) < blocked:
                key = (1, 0.0, band.turn, band.index)
            else:
                continue
            if best_key is None or key < best_key:
                best, best_key = (band, waiter, tokens, step, within), key
        return best

    def _first(self, band: BandQueue, room: Room, now_us: int) -> Waiter | None:
        """The band's next request; those of dead gateways before it are dropped."""
        while band.heads:
            waiter: Waiter = next(iter(band.queues[band.heads[0].tenant].values()))
            if now_us - self._seen.get(waiter.ticket.gateway, -NEVER) <= room.gateway_us:
                return waiter
            self._take_out(waiter, granted=False)
        return None

    def _grant(self, band: BandQueue, ticket: Ticket, tokens: int, start: int, ends_us: int, unconfirmed: bool) -> None:
        amount = int(ticket.cost * UNITS / ticket.weight)  # `charge`, in line: this is every request's path
        if not 0 < amount < MAX_CHARGE:
            amount = charge(ticket.cost, ticket.weight)
        band.virtual = start
        band.finish[ticket.tenant] = start + amount
        self._hold(band, ticket, tokens, ends_us, unconfirmed)
        self._grants += 1
        if not self._grants % TRIM_EVERY:
            for each in self._bands:
                each.trim()

    def _hold(self, band: BandQueue, ticket: Ticket, tokens: int, ends_us: int, unconfirmed: bool) -> None:
        band.running += 1
        band.tokens += tokens
        self._running += 1
        self._tokens += tokens
        self._held[ticket.id] = _Place(ticket, tokens, ends_us, unconfirmed)
        if ends_us < self._next_end_us:
            self._next_end_us = ends_us

    def _put_back(self, ticket: Ticket, room: Room, ends_us: int) -> None:
        """A place that is in use although the store does not know it: room or not. Its tenant is not charged again."""
        if (waiter := self._queued.get(ticket.id)) is not None:
            self._take_out(waiter, granted=False)
        tokens = ticket.tokens if room.tokens is None else min(ticket.tokens, max(0, room.tokens))
        self._hold(self._bands[ticket.band], ticket, tokens, ends_us, False)

    # ---- the queues ----

    def _put_in(self, ticket: Ticket) -> Waiter:
        band = self._bands[ticket.band]
        self._number += 1
        waiter = Waiter(ticket, self._number)
        if not band.waiting:  # an idle band has no claim to the turns it did not take
            turns = [other.turn for other in self._bands if other.waiting]
            band.turn = max(band.turn, min(turns, default=0))
        queue = band.queues.setdefault(ticket.tenant, {})
        if not queue:
            band.set_head(ticket.tenant, Head(band.start(ticket.tenant), waiter.number, ticket.tenant))
        queue[ticket.id] = waiter
        self._queued[ticket.id] = waiter
        self._by_gateway.setdefault(ticket.gateway, {})[ticket.id] = waiter
        band.waiting += 1
        self._waiting += 1
        return waiter

    def _take_out(self, waiter: Waiter, granted: bool) -> None:
        """Of one that gives up nothing stays charged: its successor takes over its start tag."""
        ticket = waiter.ticket
        band = self._bands[ticket.band]
        queue = band.queues[ticket.tenant]
        del queue[ticket.id]
        head = band.first[ticket.tenant]
        if not queue:
            del band.queues[ticket.tenant]
            band.set_head(ticket.tenant, None)
        elif head.number == waiter.number:
            start = band.start(ticket.tenant) if granted else head.start
            number = next(iter(queue.values())).number
            band.set_head(ticket.tenant, Head(start, number, ticket.tenant))
        del self._queued[ticket.id]
        siblings = self._by_gateway[ticket.gateway]
        del siblings[ticket.id]
        if not siblings:
            del self._by_gateway[ticket.gateway]
        band.waiting -= 1
        self._waiting -= 1
        if not self._waiting:
            for each in self._bands:
                each.turn = 0
        if not band.waiting:
            band.passed = 0
        band.reset_if_empty()

    # ---- what runs out ----

    def _give_back(self, place: _Place, used: int | None) -> None:
        ticket = place.ticket
        band = self._bands[ticket.band]
        band.running -= 1
        band.tokens -= place.tokens
        self._running -= 1
        self._tokens -= place.tokens
        if used is not None and used != ticket.cost:
            band.correct(ticket.tenant, charge(used, ticket.weight) - charge(ticket.cost, ticket.weight))
        if not band.running and not band.waiting:
            band.reset_if_empty()

    def _expire(self, now_us: int) -> None:
        """Take back the places that were not renewed. One that was never confirmed is not charged."""
        due = sorted((place.ends_us, id) for id, place in self._held.items() if place.ends_us <= now_us)
        for _, id in due[:BATCH]:
            place = self._held.pop(id)
            self._give_back(place, 0 if place.unconfirmed else None)
        self._next_end_us = min((place.ends_us for place in self._held.values()), default=NEVER)

    def _bury(self, room: Room, now_us: int) -> None:
        """Drop waiting requests of the gateway that has been silent longest, if it has been for too long."""
        silent = [(seen, gateway) for gateway, seen in self._seen.items() if now_us - seen > room.gateway_us]
        if not silent:
            return
        gateway = min(silent)[1]
        for waiter in list(self._by_gateway.get(gateway, {}).values())[:BATCH]:
            self._take_out(waiter, granted=False)
        if gateway not in self._by_gateway:
            del self._seen[gateway]

    def _tidy(self, now_us: int) -> None:
        """Every process that ever served is in `_seen`. With somebody waiting `_bury` removes the silent ones."""
        self._tidied_us = now_us
        if not self._waiting:
            self._seen = {gateway: seen for gateway, seen in self._seen.items() if now_us - seen <= TIDY_EVERY_US}

    def _has_left(self, id: str, now_us: int) -> bool:
        if now_us - self._gone_since_us >= REMEMBER_US:
            self._turn_over(now_us)
        return id in self._gone or id in self._gone_before

    def _turn_over(self, now_us: int) -> None:
        """A new generation of ids that have left; the one before the last is forgotten."""
        young = now_us - self._gone_since_us < 2 * REMEMBER_US
        self._gone_before = self._gone if young else set()
        self._gone = set()
        self._gone_since_us = now_us

    # ---- the pace ----

    def _measure(self, now_us: int) -> None:
        """Note a release of a full pool: mean over about 16 of them, of the time since the one before."""
        if self._released_us:
            sample = now_us - self._released_us
            if self._interval_us and now_us - self._measured_us <= STALE_US:
                sample = self._interval_us + (sample - self._interval_us) // 16
            self._interval_us = max(1, sample)
            self._measured_us = now_us
        self._released_us = now_us

    def _interval(self, now_us: int) -> int:
        """Mean time between releases, in microseconds; more when none has come for four times as long."""
        if not self._interval_us:
            return 0
        if not self._released_us:
            return 0 if now_us - self._measured_us > STALE_US else self._interval_us
        return max(self._interval_us, (now_us - self._released_us) // 4)
