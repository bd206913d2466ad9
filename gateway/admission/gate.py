"""Who may come in, what is reserved for them, and when it is their turn: the part of the path between the body and the
choice of a replica, and its settlement at the end.

    identify   who calls                                         memory only
    visit      what limits apply, what the request will take     memory only
    enter      reserve and get a place, or wait for one          memory, or one round trip to Redis
    leave      settle with what was really used                  memory, or told to Redis with nobody waiting

A request without limits, keys or a queue in its way has no visit at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from gateway.admission.carrier import RENEW_EVERY_S
from gateway.admission.holding import Holding
from gateway.admission.home import Home, Mode
from gateway.admission.metrics import AdmissionMetrics
from gateway.admission.refusals import PriceUnknown, QueueFull, QueueTimeout
from gateway.admission.rooms import FOREVER_US, Rooms
from gateway.admission.settlement import Settlement, settlement
from gateway.admission.spend import SpendKeeper
from gateway.admission.visit import Visit
from gateway.admission.waits import ToldWaits, longest_start_wait_s, longest_wait_s
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.keys.directory import Directory
from gateway.keys.errors import TooManyFailedKeys, Unauthenticated
from gateway.keys.failures import FailedKeys
from gateway.keys.principal import Principal
from gateway.limits.errors import refusal_error
from gateway.limits.estimate import Estimate, Estimator
from gateway.limits.headers import ratelimit_headers
from gateway.limits.plan import Plan, Planner
from gateway.logs import about
from gateway.order import EMBEDDINGS, Order
from gateway.record import Exchange
from gateway.relay import Relay
from gateway.reply import Headers
from gateway.store.limits import Cost
from gateway.store.places import Room, State, Ticket, work_of

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.02
_AFTER_FAILURE_S = 0.1


class Gate:
    """One worker's. `directory` is None where nobody has to show a key."""

    def __init__(
        self,
        settings: Settings,
        home: Home,
        *,
        directory: Directory | None,
        anonymous: Principal,
        planner: Planner,
        estimator: Estimator,
        spend: SpendKeeper,
        metrics: AdmissionMetrics,
        queues: bool,
        workers: int = 1,
    ) -> None:
        self.directory = directory
        self.home = home
        self.planner = planner
        self.estimator = estimator
        self.spend = spend
        self.metrics = metrics
        self.rooms = Rooms(queues=queues, shared=home.far is not None, workers=workers)
        self.holding = Holding(self.rooms, metrics)
        self.told = ToldWaits()
        self.visits: dict[str, Visit] = {}
        """Everybody inside or waiting, by request id."""
        self.waiting = 0
        self._wake = asyncio.Event()
        self.settings = settings
        self._anonymous = anonymous
        self._failed_keys = FailedKeys()
        self._standing: dict[Mode, Headers] = {
            mode: [(b"x-tidegate-queue-ms", b"0"), (b"x-tidegate-store", mode.value.encode())] for mode in Mode
        }

    @property
    def standing(self) -> Headers:
        """What every reply says of admission when nothing applied to its request."""
        return self._standing[self.home.mode]

    def identify(self, headers: list[tuple[bytes, bytes]], client: tuple[str, int] | None = None) -> Principal:
        """Who sends a request from this address. Raises `Unauthenticated`, `TooManyFailedKeys`, `KeysUnavailable`."""
        if self.directory is None:
            return self._anonymous
        try:
            return self.directory.authenticate(headers, time.time())
        except Unauthenticated:
            wait_s = 0.0 if client is None else self._failed_keys.take(client[0], time.monotonic())
            if not wait_s:
                raise
            raise TooManyFailedKeys(
                "Too many requests from this address came without a valid API key.", retry_after_s=wait_s
            ) from None

    def cache_salt(self, tenant: str, fields: Mapping[str, Any]) -> str | None:
        """What engines keep a tenant's cache apart by, where the model isolates tenants. None: there is but one."""
        if self.directory is None:
            return None
        own = fields.get("cache_salt")
        return self.directory.cache_salt(tenant, own if isinstance(own, str) else "" if own is None else repr(own))

    def counts_long(self, order: Order) -> bool:
        """Whether counting the prompt's tokens would hold up the event loop: an exact tokeniser and a long prompt."""
        return self.estimator.needs_thread(order.route.model, len(order.body.raw))

    async def count(self, principal: Principal, order: Order) -> Estimate:
        """The estimate of a long prompt, made in a thread."""
        return await asyncio.to_thread(self._estimate, principal, order, self._plan(principal, order))

    def _plan(self, principal: Principal, order: Order) -> Plan:
        """The limits of this request, its end user's included."""
        now_unix_s = time.time()
        plan = self.planner.plan(principal, order.route.model, now_unix_s)
        if plan.user is not None and order.user:
            plan = self.planner.with_user(plan, order.user, now_unix_s)
        return plan

    def _estimate(self, principal: Principal, order: Order, plan: Plan) -> Estimate:
        key = principal.key
        return self.estimator.estimate(
            order.body.fields,
            order.path,
            len(order.body.raw),
            order.request.max_output_tokens,
            order.expected_choices,
            order.route.model,
            principal.key_id,
            plan.hard,
            None if key is None else key.max_output_tokens,
        )

    def visit(
        self,
        principal: Principal,
        order: Order,
        exchange: Exchange,
        estimate: Estimate | None = None,
        id: str = "",
    ) -> Visit | None:
        """What this request has to reserve; None when nothing limits it and nobody queues for its pool.

        `estimate`: what `count` has found, if it was asked. `id` is what the store knows the request by, its own unless
        it is given.
        """
        route = order.route
        room = self.rooms.room(route.pool, time.monotonic())
        plan = self._plan(principal, order)
        key = principal.key
        if key is not None and order.request.max_output_tokens is None and order.path != EMBEDDINGS:
            exchange.max_tokens_set = key.max_output_tokens
        if plan.has_budgets and route.price is None and _enforced_budget(plan):
            raise PriceUnknown(
                f"The model {route.model!r} has no price, so that a budget cannot count it.", param="model"
            )
        if not plan.scopes and room is None and not (route.price is not None and self.spend.recording):
            return None
        if estimate is None:
            estimate = self._estimate(principal, order, plan)
        micros = 0
        price = route.price
        if price is not None:
            micros = round(estimate.input * price.input + estimate.output * price.output)
        if estimate.max_tokens is not None:
            exchange.max_tokens_set = estimate.max_tokens
        reserved = Cost(1, estimate.input, estimate.output, estimate.total, micros)
        id = id or order.request.id
        visit = Visit(id, order, principal, exchange, plan, estimate, reserved, plan.scopes, charge_id=id)
        if room is not None:
            visit.pool = route.pool.name
            visit.room = room
            longest = longest_wait_s if room.requests else longest_start_wait_s
            visit.max_wait_s = longest(
                order,
                route.pool.settings.queue,
                self.metrics.ttft_s(route.model),
                time.monotonic() - exchange.started_at,
            )
            visit.ticket = Ticket(
                visit.id,
                self.home.gateway,
                principal.tenant.name,
                principal.tenant.weight,
                order.band,
                max(1, work_of(estimate.input, estimate.output)),
                estimate.input + estimate.output,
                # While there is no replica, the pace of former ones says nothing of the wait.
                int(visit.max_wait_s * 1_000_000) if room.requests else FOREVER_US,
            )
        return visit

    async def enter(self, visit: Visit, relay: Relay) -> None:
        """Reserve and get a place; waits for one if it must. Raises `RateLimited` and the like, having kept nothing."""
        exchange = visit.exchange
        visit.entered_at = now = time.monotonic()
        visit.lease_due_at = now + RENEW_EVERY_S
        self.visits[visit.id] = visit
        if visit.plan.has_budgets and self.spend.book.unknown(visit.scopes):
            await self._learn_budgets(visit)
        home = self.home
        if home.mode is Mode.REDIS:
            await home.let_in(visit)
        else:
            home.let_in_near(visit)
        exchange.admission_headers = standing = self._standing[
            Mode.LOCAL if visit.near and home.far is not None else home.mode
        ]
        admission = visit.admission
        if admission is not None:
            headers = [*standing, *ratelimit_headers(visit.plan, admission, visit.share)]
            if exchange.max_tokens_set is not None:
                headers.append((b"x-tidegate-max-tokens", b"%d" % exchange.max_tokens_set))
            exchange.admission_headers = headers
            if admission.refusals:
                self.metrics.refusals(visit.plan, admission)
            if not admission.admitted:
                error = refusal_error(visit.plan, admission, visit.reserved)
                if visit.share > 1:
                    error.message += (
                        f" (The store of limits is away: this gateway keeps to one of {visit.share} shares.)"
                    )
                raise error
        entry = visit.entry
        if entry is None:
            return
        self.told.note(visit.pool, visit.order.band, 0.0 if visit.granted else entry.wait_us / 1e6, now)
        if visit.granted:
            return
        exchange.queue_position = entry.position
        exchange.predicted_wait_s = entry.wait_us / 1e6
        if entry.state is State.REFUSED:
            exchange.admission_headers = self._headers_after_wait(exchange)
            self.metrics.turned_away(visit.pool, entry.reason)
            raise QueueFull(entry)
        if visit.shut_out:
            self.holding.begin(visit)
        await self._wait(visit, relay)

    async def move(self, visit: Visit, order: Order, relay: Relay) -> Visit | None:
        """Go on at another pool or model: the first place and reservation are given back as if they had never been, and
        others taken within what is left of the same deadline and at the other model's price.

        Raises what `enter` does, holding nothing.
        """
        self._undo(visit)
        visit.moves += 1  # kept here too: after a failure it is this visit that is moved again
        estimate: Estimate | None = visit.estimate
        if order.route.model != visit.order.route.model:  # which has other limits, hard ones perhaps, and tokens
            visit.exchange.max_tokens_set = None
            estimate = await self.count(visit.principal, order) if self.counts_long(order) else None
        id = f"{visit.id.partition('~')[0]}~{visit.moves + 1}"
        other = self.visit(visit.principal, order, visit.exchange, estimate, id)
        if other is not None:
            other.moves = visit.moves
            try:
                await self.enter(other, relay)
            except BaseException:
                self._undo(other)
                raise
        return other

    def _undo(self, visit: Visit) -> None:
        """As if it had never been."""
        visit.left = True
        self.visits.pop(visit.id, None)
        self.home.give_back(visit, None, None)

    async def wait_for_replica(self, visit: Visit, relay: Relay, fits: Callable[[Order], bool]) -> bool:
        """Wait until a replica that this request may use has room: those that have room now are not for it.

        The pool has a place, but in another region, say, or without its adapter. It goes to others meanwhile, and this
        request takes another one when `fits` says so. False: it has waited long enough. (These requests are not in
        any line while they wait, so among themselves they are served in no order.)
        """
        exchange = visit.exchange
        ends_at = visit.entered_at + visit.max_wait_s
        if visit.ticket is None or time.monotonic() >= ends_at:
            return False
        self.home.give_up_place(visit, None)
        while True:
            visit.order = self.holding.renewed(visit.order)
            if fits(visit.order):
                break
            if time.monotonic() >= ends_at:
                return False
            await asyncio.sleep(_LOOK_AGAIN_S)
        await self.home.enter_again(visit)
        if not visit.granted:
            if visit.entry is not None and visit.entry.state is State.REFUSED:
                raise QueueFull(visit.entry)
            visit.max_wait_s = max(0.0, ends_at - visit.entered_at)
            await self._wait(visit, relay)
        if not relay.started_content:
            exchange.queued_at, exchange.queue_s = visit.entered_at, time.monotonic() - visit.entered_at
        exchange.admission_headers = self._headers_after_wait(exchange)
        return True

    async def _learn_budgets(self, visit: Visit) -> None:
        """The first request that a budget meets here goes on from the spend of record."""
        await self.spend.learn(visit.scopes)
        visit.plan = self._plan(visit.principal, visit.order)
        visit.scopes = visit.plan.scopes

    async def _wait(self, visit: Visit, relay: Relay) -> None:
        """Stand in line. Whoever grants the place resolves the future; the client's leaving cancels this."""
        exchange = visit.exchange
        if exchange.stream:
            relay.headers = self._headers_of_waiting(exchange)
        visit.waiter = asyncio.get_running_loop().create_future()
        self.waiting += 1
        try:
            await self.holding.turn(visit)
            await self.holding.until_open(visit, relay)
        except TimeoutError:
            self.metrics.turned_away(visit.pool, "timeout")
            raise self.holding.starting(visit) or QueueTimeout(visit.max_wait_s) from None
        finally:
            self.waiting -= 1
            visit.waiter = None
            waited_s = time.monotonic() - visit.entered_at
            if not relay.started_content:  # else it is a continuation's, which no first token waits for
                exchange.queued_at, exchange.queue_s = visit.entered_at, waited_s
            self.metrics.waited(visit.pool, visit.order.band, waited_s)
            exchange.admission_headers = self._headers_after_wait(exchange)
        if self.directory is not None and not self.directory.still_valid(visit.principal, time.time()):
            raise Unauthenticated("The API key has ended while its request waited.")

    def _headers_of_waiting(self, exchange: Exchange) -> Headers:
        """The head of a stream that has to begin, to be kept open, while its request still waits."""
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-request-id", exchange.request_id.encode()),
            *(() if exchange.traced is None else exchange.traced.reply_headers()),
            *(pair for pair in exchange.admission_headers if pair[0] != b"x-tidegate-queue-ms"),
            (b"x-tidegate-queue-position", b"%d" % exchange.queue_position),
            (b"x-tidegate-predicted-wait-ms", b"%d" % (exchange.predicted_wait_s * 1000)),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    def _headers_after_wait(self, exchange: Exchange) -> Headers:
        headers = [pair for pair in exchange.admission_headers if pair[0] != b"x-tidegate-queue-ms"]
        headers.append((b"x-tidegate-queue-ms", b"%d" % (exchange.queue_s * 1000)))
        headers.append((b"x-tidegate-queue-position", b"%d" % exchange.queue_position))
        headers.append((b"x-tidegate-predicted-wait-ms", b"%d" % (exchange.predicted_wait_s * 1000)))
        return headers

    def granted(self, pool: str, id: str) -> Visit | None:
        """A request has its place: one of ours that waited; or, and then None, one that is gone or wants another."""
        visit = self.visits.get(id.partition("/")[0])
        if visit is None or visit.ticket is None or visit.pool != pool or visit.ticket.id != id:
            return None
        visit.granted = True
        visit.lease_due_at = 0.0  # a place for one that waited has to be confirmed
        if visit.waiter is not None and not visit.waiter.done():
            visit.waiter.set_result(None)
        return visit

    def leave(self, visit: Visit, exchange: Exchange) -> None:
        """Settle with what was used, and make room. Synchronous; nothing waits for Redis. A defect here costs a
        settlement, and never the record that is written after it."""
        if visit.left:
            return
        visit.left = True
        self.visits.pop(visit.id, None)
        settled: Settlement | None = None
        try:
            settled = settlement(visit, exchange, self.estimator)
        except Exception:
            id = exchange.request_id
            logger.exception("request %s could not be settled; what it had reserved is charged", id, extra=about(id))
            settled = Settlement(visit.reserved, work_of(visit.estimate.input, visit.estimate.output))
        finally:
            self.home.give_back(
                visit, None if settled is None else settled.used, None if settled is None else settled.work
            )
        if settled is not None:
            self._learn(visit, exchange, settled)

    def _learn(self, visit: Visit, exchange: Exchange, settled: Settlement) -> None:
        usage = exchange.usage
        if usage is not None and not exchange.usage_estimated and visit.order.path != EMBEDDINGS:
            self.estimator.learn(
                visit.order.route.model, exchange.key_id, visit.estimate.chars, usage, visit.order.expected_choices
            )
            self.estimator.learn_stream(visit.order.route.model, exchange.content_bytes, usage.completion_tokens)
        if exchange.ttft_s is not None and not exchange.spill and not exchange.fallback_from:
            self.metrics.answered(visit.order.route.model, exchange.ttft_s - exchange.queue_s)
        self.metrics.estimated += exchange.usage_estimated
        if settled.used.micros:
            self.spend.spent(visit.plan, settled.used.micros, time.time())

    def reload(self, settings: Settings, anonymous: Principal) -> None:
        """Go by these limits for new requests; those inside are settled by what they were admitted with."""
        self.settings = settings
        self._anonymous = anonymous
        self.planner.reload(settings)

    def everybody(self) -> list[Visit]:
        """Who is inside or waiting at this moment."""
        return list(self.visits.values())

    def room_of(self, visit: Visit) -> Room:
        """The room of its pool as it is now; as it was when it came, where nobody can say any more."""
        room = self.rooms.room(visit.order.route.pool, time.monotonic()) or visit.room
        assert room is not None
        return room

    def interrupt_all(self, error: GatewayError) -> None:
        """End the waiting of everybody in line."""
        for visit in self.visits.values():
            if visit.waiter is not None and not visit.waiter.done():
                visit.waiter.set_exception(error)

    def interrupt(self, request_id: str, error: GatewayError) -> None:
        """End the waiting of one request, if it stands in line."""
        for visit in self.in_line():
            waiter = visit.waiter
            if visit.exchange.request_id == request_id and waiter is not None and not waiter.done():
                waiter.set_exception(error)

    def store_changed(self, available: bool) -> None:
        """Redis went away, or came back."""
        self.home.changed(available)
        self._wake.set()

    def look_now(self) -> None:
        """Pools may have grown."""
        self._wake.set()

    async def keep(self, stop: asyncio.Event, every_s: float = 1.0) -> None:
        """Signs of life and renewals, until stopped. One that fails is soon followed by another: those that wait are to
        know quickly whether Redis is away."""
        while not stop.is_set():
            heard = True
            try:
                heard = await self.home.beat(time.monotonic())
            except Exception:
                logger.exception("the gate's housekeeping failed; it goes on in a second")
            self._let_go_the_unserved()
            self._wake.clear()
            with suppress(TimeoutError):
                # Away for sure, or all well: once a second. In between, on the way there or back: sooner.
                settled = heard is (self.home.mode is not Mode.LOCAL) and not (self.waiting and self.holding.soon)
                async with asyncio.timeout(every_s if settled else _AFTER_FAILURE_S):
                    await self._wake.wait()

    def _let_go_the_unserved(self) -> None:
        """There is nothing to wait for at a pool that nobody serves any more: routing tells its requests why. Where
        another replica is to come, those that have somewhere else to go go there first."""
        now = time.monotonic()
        for visit in self.in_line():
            if visit.waiter is None or visit.waiter.done():
                continue
            room = self.rooms.room(visit.order.route.pool, now)
            if room is None:
                visit.waiter.set_result(None)
            elif not room.requests and (error := self.holding.sent_away(visit)) is not None:
                visit.waiter.set_exception(error)

    def in_line(self) -> Iterable[Visit]:
        """Those that wait, for the dashboard."""
        return [visit for visit in self.visits.values() if visit.waiter is not None]


def _enforced_budget(plan: Plan) -> bool:
    return any(scope.budgets and not scope.shadow for scope in plan.scopes)
