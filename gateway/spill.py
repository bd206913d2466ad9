"""Sends requests to rented replicas when the model's own would keep them waiting for too long.

Asked twice of a request whose model has a `spill`, and never without an answer at once:

    consider   before it asks for a place: are its own replicas predicted to be late?
    instead    when the place was refused, or the rented ones failed: the other pool, once

What never leaves, whatever the wait: a request with a LoRA adapter, which is not there; embeddings, since another
model's are of no use beside the own one's; `service_tier: flex`, which asks for cheap and slow; a class without a
target; tenants and keys that the configuration does not allow, or whose own note says `spill: never`; a request with
a field that steers engines; and first of all one that is locked to regions where no rented replica is.

Money is reserved before a request is sent, at the most that it can cost: each byte of the prompt as a token, and
`max_tokens`, or 4096 where it names none. Only an answer that gets longer than that, at a host that is not told to
stop, can take the sum past a ceiling, and then counts as well. Several gateways each have an equal part of both
ceilings, by the number of gateways that their store knows of.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from math import inf

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.admission.gate import Gate
from gateway.config import Settings
from gateway.config import Spill as SpillSettings
from gateway.elsewhere import route_at
from gateway.errors import GatewayError
from gateway.fleet import Fleet, ModelRoute
from gateway.keys.principal import Principal
from gateway.keys.records import PRIORITY_CLASSES
from gateway.logs import about
from gateway.order import EMBEDDINGS, Order
from gateway.reading import read_prompt
from gateway.record import Exchange, Outcome
from routing.router import PANIC
from routing.spill import ON_TARGET, Spill
from routing.types import Decision

logger = logging.getLogger(__name__)

SPILLED = "spill"
"""What `x-tidegate-route-reason` says of a request that was sent away."""
NOTE = "spill"
"""Key of a tenant's or key's metadata. Any value but `allow` keeps its requests at home."""
QUEUE_REFUSED = "queue_refused"
"""Why it left: the queue for its own replicas had no place for it."""
RESIDENCY = "residency"
HOSTED_UNAVAILABLE = "hosted_unavailable"
UNTRANSLATABLE = "reserved_field"
MAY_NOT_LEAVE = "may_not_leave"
"""Its class has no target, or it is of a kind, or from a caller, that stays whatever the wait."""

_NOTHING_USED = frozenset({Outcome.REJECTED, Outcome.UPSTREAM_REJECTED, Outcome.UNAVAILABLE, Outcome.UPSTREAM_ERROR})
_COMES_HOME = frozenset({Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_REJECTED, Outcome.UNAVAILABLE})
_THE_HOSTS = frozenset({"unsupported_parameter", "insufficient_quota"})
"""Refusals by the gateway that may be the host's alone: no words for a field, or a price that is beyond a budget."""
_MAY_BE_BILLED = frozenset({"upstream_disconnected", "upstream_truncated"})
"""The host was at work when the connection broke: what was reserved stays spent."""
_NOT_THE_POOLS = frozenset({"queue_full", "budget_unknown"})
"""Refusals that are the tenant's own, and would be the same anywhere."""


class _Away(msgspec.Struct, gc=False):
    """A request that was sent away and is not settled."""

    model: str
    home: Order
    returned: bool = False


class Prospect(msgspec.Struct, frozen=True, gc=False):
    """What would become of a request (`Overflow.would`)."""

    hosted: ModelRoute | None
    """Where it would be sent; None: it would stay."""
    reason: str
    target_ms: float | None
    own_ms: float | None = None
    """Until the first token at its own replicas, the queue included; infinity where none can serve."""
    hosted_ms: float | None = None
    """The same at the rented ones, and what their price is worth in milliseconds."""
    most_usd: float = 0.0


class _Model:
    """One model's spill: its settings, its state, and the route that takes its requests."""

    __slots__ = ("_home", "_hosted", "fleet", "settings", "state", "targets_ms")

    def __init__(self, settings: SpillSettings) -> None:
        self.state = Spill(settings.usd_per_hour, settings.usd_per_day)
        self._home: ModelRoute | None = None
        self._hosted: ModelRoute | None = None
        self.configure(settings)

    def configure(self, settings: SpillSettings) -> None:
        """What was spent, and whether requests leave, stays."""
        self.settings = settings
        self.state.enter, self.state.leave = settings.enter, settings.leave
        self.state.ceilings.change(settings.usd_per_hour, settings.usd_per_day)
        self.targets_ms: tuple[float | None, ...] = tuple(
            getattr(settings.ttft_target_ms, name) for name in PRIORITY_CLASSES
        )
        self._home = None

    def hosted(self, home: ModelRoute, fleet: Fleet, settings: Settings) -> ModelRoute | None:
        """Where the requests of this route go; None where the fleet has no such pool (any more)."""
        if self._home is not home:
            self._home, self._hosted = home, self._route(home, fleet, settings)
        return self._hosted

    def _route(self, home: ModelRoute, fleet: Fleet, settings: Settings) -> ModelRoute | None:
        pool = fleet.pools.get(self.settings.backend)
        if pool is None or pool is home.pool:
            return None
        return route_at(home, pool, settings, self.settings.upstream_model, self.settings.price, self._hosted)


class Overflow:
    """One worker's. Everything is synchronous and without I/O; belongs to the worker's event loop."""

    def __init__(
        self, settings: Settings, gate: Gate, fleet: Callable[[], Fleet], unix_s: Callable[[], float] = time.time
    ) -> None:
        self._gate = gate
        self._fleet = fleet
        self._unix_s = unix_s
        self._models: dict[str, _Model] = {}
        self._former: dict[str, _Model] = {}
        """Without a spill since a reload: what they have spent counts again when they get one back."""
        self._away: dict[str, _Away] = {}
        self._spilled: Counter[tuple[str, str]] = Counter()
        self._kept: Counter[tuple[str, str]] = Counter()
        self._usd: dict[str, float] = {}
        self._settings = settings
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Go by these settings for new requests."""
        self._settings = settings
        known = self._former | self._models
        self._models = {}
        for name, model in settings.models.items():
            if model.spill is None:
                continue
            if name in known:
                self._models[name] = known[name]
                known[name].configure(model.spill)
            else:
                self._models[name] = _Model(model.spill)
        self._former = {name: model for name, model in known.items() if name not in self._models}

    # -- the path of a request

    def consider(self, order: Order, exchange: Exchange, caller: Principal, now: float) -> Order:
        """The order as it is, or the same for rented replicas, its money reserved. `now`: monotonic seconds."""
        model = self._models.get(order.route.model)
        if model is None:
            return order
        target_ms = model.targets_ms[order.band]
        if target_ms is None or not _may_leave(order, caller, model.settings):
            return order
        read_prompt(order, exchange)  # a long one has been read in a thread: see `reads`
        route = order.route
        decision = route.router.decide(order.request, route.pool.replicas, now)
        own_ms = self._predicted_ms(order, route, decision, now)
        return self._sent(model, order, exchange, target_ms, own_ms, now) or order

    def reads(self, order: Order, caller: Principal) -> bool:
        """Whether `consider` needs the prompt of such a request. Where reading it takes long, do that before."""
        model = self._models.get(order.route.model)
        return (
            model is not None and model.targets_ms[order.band] is not None and _may_leave(order, caller, model.settings)
        )

    def may_ask(self, order: Order, exchange: Exchange, caller: Principal) -> bool:
        """Whether the rented replicas may be asked for a request whose own have gone; those decide that are then."""
        model = self._models.get(order.route.model)
        return (
            model is not None
            and exchange.request_id not in self._away
            and model.targets_ms[order.band] is not None
            and _may_leave(order, caller, model.settings)
        )

    def instead(
        self, order: Order, exchange: Exchange, caller: Principal, error: GatewayError, now: float
    ) -> Order | None:
        """Another order for a request that has failed with this error before its client saw anything of an answer.

        For the rented replicas, when the queue for its own refused it; for its own, when the rented ones failed it.
        Each at most once. None: the client gets the error.
        """
        away = self._away.get(exchange.request_id)
        if away is not None:
            its_own = error.outcome in _COMES_HOME and error.code not in _NOT_THE_POOLS
            if away.returned or not (its_own or error.code in _THE_HOSTS):
                return None
            away.returned = True
            self._count(away.model, exchange.request_id, None if error.code in _MAY_BE_BILLED else 0.0)
            id, pool = exchange.request_id, order.route.pool.name
            logger.info("request %s comes back from %s: %s", id, pool, error.code, extra=about(id))
            exchange.spill = ""
            return away.home
        model = self._models.get(order.route.model)
        if model is None or error.outcome is not Outcome.UNAVAILABLE or error.code in _NOT_THE_POOLS:
            return None
        target_ms = model.targets_ms[order.band]
        if target_ms is None or not _may_leave(order, caller, model.settings):
            return None
        read_prompt(order, exchange)
        return self._sent(model, order, exchange, target_ms, inf, now, QUEUE_REFUSED)

    def give_up(self, exchange: Exchange, error: GatewayError) -> None:
        """It has failed with this error and goes on at neither: what it may have cost at the rented ones is counted
        now, and what it will cost elsewhere is not. Others are passed over."""
        away = self._away.get(exchange.request_id)
        if away is not None and not away.returned:
            away.returned = True
            billed = error.code in _MAY_BE_BILLED or error.outcome is Outcome.TIMEOUT
            self._count(away.model, exchange.request_id, None if billed else 0.0)
            exchange.spill = ""

    def settle(self, exchange: Exchange) -> None:
        """The request is over: what it has cost takes the place of what was reserved. Others are passed over."""
        away = self._away.pop(exchange.request_id, None)
        if away is None:
            return
        cost_usd = exchange.cost_usd  # None: not known, so what was reserved stays; of an answer that broke off, say
        if cost_usd is None and (exchange.attempts == 0 or exchange.outcome in _NOTHING_USED):
            cost_usd = None if exchange.error_code in _MAY_BE_BILLED else 0.0
        self._count(away.model, exchange.request_id, cost_usd)

    def _count(self, name: str, id: str, cost_usd: float | None) -> None:
        model = self._models.get(name) or self._former.get(name)
        if model is not None:
            self._usd[name] = self._usd.get(name, 0.0) + model.state.ceilings.settle(id, cost_usd)

    # -- how it is decided

    def _sent(
        self,
        model: _Model,
        order: Order,
        exchange: Exchange,
        target_ms: float,
        own_ms: float | None,
        now: float,
        why: str = "",
    ) -> Order | None:
        """The order for the rented replicas, or None when it does not go there."""
        name, lane, state = order.route.model, PRIORITY_CLASSES[order.band], model.state
        now_unix_s, share = self._unix_s(), self._gate.home.gateways
        if own_ms is None or (own_ms <= state.leave * target_ms and not state.leaving(lane)):
            return None
        hosted = model.hosted(order.route, self._fleet(), self._settings)
        if hosted is None:
            return None
        obstacle, hosted_ms, most_usd = self._offer(order, hosted, now)
        verdict = state.decide(own_ms, hosted_ms, target_ms, most_usd, now_unix_s, lane, share)
        if obstacle or not verdict.spill:
            if verdict.reason != ON_TARGET:
                self._kept[name, obstacle or verdict.reason] += 1
            return None
        state.ceilings.reserve(exchange.request_id, most_usd, now_unix_s)
        self._away[exchange.request_id] = _Away(name, order)
        exchange.spill = why or verdict.reason
        self._spilled[name, exchange.spill] += 1
        return msgspec.structs.replace(order, route=hosted)

    def would(
        self, order: Order, caller: Principal, now: float, rehearsed: Callable[[ModelRoute], ModelRoute]
    ) -> Prospect | None:
        """What `consider` would do with an order whose prompt has been read, without a trace of the question; None for
        a model without a spill. `rehearsed` gives a route in whose place it may be asked."""
        model = self._models.get(order.route.model)
        if model is None:
            return None
        target_ms = model.targets_ms[order.band]
        if target_ms is None or not _may_leave(order, caller, model.settings):
            return Prospect(None, MAY_NOT_LEAVE, target_ms)
        home = msgspec.structs.replace(order, route=rehearsed(order.route))
        decision = home.route.router.decide(order.request, home.route.pool.replicas, now)
        own_ms = self._predicted_ms(home, home.route, decision, now)
        hosted = model.hosted(order.route, self._fleet(), self._settings)
        if own_ms is None or hosted is None:
            return Prospect(None, ON_TARGET, target_ms, own_ms)
        obstacle, hosted_ms, most_usd = self._offer(home, rehearsed(hosted), now)
        lane, share = PRIORITY_CLASSES[order.band], self._gate.home.gateways
        verdict = deepcopy(model.state).decide(own_ms, hosted_ms, target_ms, most_usd, self._unix_s(), lane, share)
        reason = verdict.reason if verdict.reason == ON_TARGET else obstacle or verdict.reason
        leaves = verdict.spill and not obstacle
        return Prospect(hosted if leaves else None, reason, target_ms, own_ms, hosted_ms, most_usd)

    def _offer(self, order: Order, hosted: ModelRoute, now: float) -> tuple[str, float | None, float]:
        """What keeps it from the rented replicas, when they would answer, price included, and the most it can cost."""
        decision = hosted.router.decide(order.request, hosted.pool.replicas, now)
        obstacle = _obstacle(order, hosted, decision)
        if obstacle:
            return obstacle, None, 0.0
        most_usd, likely_usd = self._cost_usd(order, hosted)
        hosted_ms = self._predicted_ms(order, hosted, decision, now)
        if hosted_ms is not None:
            hosted_ms += order.request.ms_per_usd * likely_usd
        return "", hosted_ms, most_usd

    def _predicted_ms(self, order: Order, route: ModelRoute, decision: Decision, now: float) -> float | None:
        """Until the first token, by what the queue and the policy say: infinity where nobody can serve, None where
        nothing is known."""
        pool = route.pool
        room = self._gate.rooms.room(pool, now)
        if room is not None and not room.requests:
            return inf  # its first replica has yet to start
        queues = room is not None
        wait_s = self._gate.told.expected_s(pool.name, order.band, now) if queues else 0.0
        ttft_ms = decision.predicted_ttft_ms
        if decision.replica is None and not (queues and any(each.reason == "full" for each in decision.excluded)):
            return inf
        if ttft_ms is None and route is not order.route:
            return None  # what is usual is only known of the model's own replicas
        if ttft_ms is None:
            usual_s = self._gate.metrics.ttft_s(route.model)
            ttft_ms = usual_s * 1000.0 if usual_s or wait_s else None
        return None if ttft_ms is None else wait_s * 1000.0 + ttft_ms

    def _cost_usd(self, order: Order, hosted: ModelRoute) -> tuple[float, float]:
        """The most that it can cost, and what it is expected to."""
        price = hosted.price
        assert price is not None
        estimator, request, choices = self._gate.estimator, order.request, order.expected_choices
        asked, raw_bytes = request.max_output_tokens, len(order.body.raw)
        most = estimator.estimate(order.body.fields, order.path, raw_bytes, asked, choices, hosted.model, "", hard=True)
        most_usd = most.input * max(price.input, price.cache_write) + most.output * price.output
        # The prompt has been counted by now; a tokenizer would take as long again.
        output = estimator.expected_output(hosted.model, "", asked, choices)
        return most_usd / 1e6, (request.prompt_tokens * price.input + output * price.output) / 1e6

    # -- what is told of it

    @property
    def spilled(self) -> int:
        """Requests sent away since the start."""
        return self._spilled.total()

    def ceilings(self) -> Iterator[tuple[str, str, float, float]]:
        """Model, window (`hour`, `day`), dollars that count in it now, and this gateway's part of its ceiling."""
        now_unix_s, share = self._unix_s(), self._gate.home.gateways
        for name, model in self._models.items():
            ceilings = model.state.ceilings
            yield name, "hour", ceilings.hour_micros(now_unix_s) / 1e6, ceilings.per_hour / 1e6 / share
            yield name, "day", ceilings.day_micros(now_unix_s) / 1e6, ceilings.per_day / 1e6 / share

    def families(self) -> Iterator[Metric]:
        """What was sent away, what was kept, and what it has cost."""
        spilled = CounterMetricFamily(
            "tidegate_spill", "Requests sent to rented replicas, by why.", labels=["model", "reason"]
        )
        kept = CounterMetricFamily(
            "tidegate_spill_kept",
            "Requests that were predicted to be late and stayed all the same, by why.",
            labels=["model", "reason"],
        )
        for family, counts in ((spilled, self._spilled), (kept, self._kept)):
            for labels, count in list(counts.items()):
                family.add_metric(labels, count)
        yield spilled
        yield kept
        usd = CounterMetricFamily("tidegate_spill_usd", "Dollars that spilled requests have cost.", labels=["model"])
        window = GaugeMetricFamily(
            "tidegate_spill_window_usd",
            "Dollars reserved and spent that count against this gateway's part of a ceiling.",
            labels=["model", "window"],
        )
        now_unix_s = self._unix_s()
        for name, model in list(self._models.items()):
            usd.add_metric([name], self._usd.get(name, 0.0))
            window.add_metric([name, "hour"], model.state.ceilings.hour_micros(now_unix_s) / 1e6)
            window.add_metric([name, "day"], model.state.ceilings.day_micros(now_unix_s) / 1e6)
        yield usd
        yield window


def _may_leave(order: Order, caller: Principal, settings: SpillSettings) -> bool:
    """Whether the request is of a kind, and its caller one, that may be sent away at all."""
    if order.route.adapter is not None or order.path == EMBEDDINGS or order.flexible:
        return False
    allow, key, tenant = settings.allow, caller.key, caller.tenant
    if allow.tenants is not None and tenant.name not in allow.tenants:
        return False
    if allow.keys is not None and (key is None or key.id not in allow.keys):
        return False
    if allow.classes is not None and PRIORITY_CLASSES[order.band] not in allow.classes:
        return False
    notes = (tenant.metadata, {} if key is None else key.metadata)
    return all(note.get(NOTE, "allow") == "allow" for note in notes)


def _obstacle(order: Order, hosted: ModelRoute, decision: Decision) -> str:
    """What keeps the request from the rented replicas; empty: nothing. Residency is looked at before all else.
    `decision`: which of them would take it."""
    request, pool = order.request, hosted.pool
    if request.regions and all(replica.region not in request.regions for replica in pool.replicas):
        return RESIDENCY
    if not pool.rules.allow(order.path, order.body):
        return UNTRANSLATABLE
    if decision.replica is None or decision.reason in PANIC:
        return HOSTED_UNAVAILABLE
    return ""
