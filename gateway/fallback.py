"""Asks other pools and models, in the operator's order, when a model's own replicas cannot answer a request.

    spill      the model's own rented replicas first, and home again (`gateway.spill`)
    fallbacks  then each entry of the model that was asked for, once; an entry's own list or spill plays no part

Nothing goes elsewhere of which the client has seen any content, which is out of time, or whose error it would meet
anywhere: its own mistake, its limits. What a *fallback* refuses says nothing of the request, which was made for another
model: then the next is asked, and in the end the client is told why the model that it asked for could not answer.

An entry is passed over where it cannot be right: the key may not use that model (`OBSTACLES` has them all). Of a
request that two pools broke off in the middle of, neither is to blame perhaps: it goes no further, so that a request
that kills engines is not carried through all of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from gateway.admission.refusals import QueueFull, QueueTimeout, Starting
from gateway.config import Settings
from gateway.config.fallbacks import Fallback
from gateway.elsewhere import route_at
from gateway.errors import GatewayError, NoReplicaAvailable
from gateway.fleet import Fleet, ModelRoute, Pool
from gateway.keys.principal import Principal, may_use
from gateway.logs import about
from gateway.order import EMBEDDINGS, Order
from gateway.record import Exchange, Outcome
from gateway.spill import NOTE, Overflow

logger = logging.getLogger(__name__)

GONE = "gone"
"""A reload has taken the pool or the model away."""
NOT_ALLOWED = "not_allowed"
"""The key may not use that model, or the adapter with it."""
NO_ADAPTER = "no_adapter"
OTHER_EMBEDDINGS = "other_embeddings"
"""Another model's vectors are of no use beside those of the one asked for."""
RESIDENCY = "residency"
"""No replica there is in a region that the request may be served in."""
BODY = "body"
"""A field of the request may not be asked of that pool."""
STAYS = "stays"
"""The key's or tenant's own note keeps it from rented replicas."""
ASKED = "asked"
"""The same model at the same pool has failed already, or the pool has no place for anybody."""
OBSTACLES = (GONE, NOT_ALLOWED, NO_ADAPTER, OTHER_EMBEDDINGS, RESIDENCY, BODY, STAYS, ASKED)

_ANOTHER_MAY_ANSWER = frozenset(
    {Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_INTERRUPTED, Outcome.UNAVAILABLE, Outcome.TIMEOUT}
)
_REFUSALS = frozenset({Outcome.REJECTED, Outcome.UPSTREAM_REJECTED})
_THE_CLIENTS = frozenset({400, 401, 403, 404, 413, 422})
_THE_TENANTS = frozenset({"queue_full", "budget_unknown"})
"""Refusals that are the tenant's own, and would be the same anywhere."""
_BROKEN_OFF = frozenset({"upstream_disconnected", "upstream_truncated"})
_MOST_BROKEN_OFF = 2

_Place = tuple[str, str, str | None]
"""Pool, the name that it knows the model by, adapter."""


class _Chain(msgspec.Struct, gc=False):
    """What has become of one request whose model has fallbacks, since its first failure."""

    asked_for: Order
    first: GatewayError
    """Why the model that was asked for could not answer."""
    left: list[Fallback]
    places: set[_Place]
    """Where it has been."""
    broken_off: int = 0
    fallen: bool = False
    starting: Order | None = None
    """The first order whose pool had no replica and was to get one: it waits there when nobody else can answer."""
    waits: bool = False
    """It has come to that."""


class Fallbacks:
    """One worker's. Everything is synchronous and without I/O; belongs to the worker's event loop."""

    def __init__(self, settings: Settings, fleet: Callable[[], Fleet], overflow: Overflow) -> None:
        self._fleet = fleet
        self._overflow = overflow
        self._chains: dict[str, _Chain] = {}
        self._routes: dict[tuple[str, str, str | None], ModelRoute] = {}
        """Models at other pools, for what their routers have learned."""
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """Requests by model asked for, who was asked instead, and why."""
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Go by these settings for requests that fail from now on."""
        self._settings = settings
        self._lists = {name: model.fallbacks for name, model in settings.models.items() if model.fallbacks}
        kept = {(name, each.backend, each.upstream_model) for name, list_ in self._lists.items() for each in list_}
        self._routes = {key: route for key, route in self._routes.items() if key in kept}

    # -- the path of a request

    def may_ask(self, order: Order, exchange: Exchange) -> bool:
        """Whether others are to be asked before a request waits for the first replica of a pool."""
        chain = self._chains.get(exchange.request_id)
        return order.route.model in self._lists if chain is None else not chain.waits

    def may_leave(self, order: Order, exchange: Exchange, caller: Principal) -> bool:
        """The same of one that has waited for a place when the last replica leaves; rented ones may be asked then."""
        chain = self._chains.get(exchange.request_id)
        if chain is not None:
            return not chain.waits
        return order.route.model in self._lists or self._overflow.may_ask(order, exchange, caller)

    def keep(self, order: Order, exchange: Exchange) -> None:
        """This one is not to be answered by others: it waits where its replicas start."""
        self._chains[exchange.request_id] = _Chain(order, NoReplicaAvailable(""), [], set(), waits=True)

    def instead(
        self, order: Order, exchange: Exchange, caller: Principal, error: GatewayError, now: float
    ) -> Order | None:
        """Another order for a request that has failed with this error before its client saw any content of an answer.

        `now`: monotonic seconds. None: the client gets the error. Raises the error of the model that was asked for
        when this one is only a fallback's refusal.
        """
        chain = self._chains.get(exchange.request_id)
        if chain is None:
            entries = self._lists.get(order.route.model)
            if entries is None and not (isinstance(error, Starting) and error.others_first):
                return self._overflow.instead(order, exchange, caller, error, now)
            chain = self._chains[exchange.request_id] = _Chain(order, error, list(entries or ()), set())
        if isinstance(error, Starting) and chain.starting is None and not chain.waits:
            chain.starting = order
        chain.places.add(_place(order.route))
        if not chain.fallen:
            spilled = self._overflow.instead(order, exchange, caller, error, now)
            if spilled is not None:
                chain.places.add(_place(spilled.route))
                return spilled
            chain.first = error
        chain.broken_off += error.code in _BROKEN_OFF
        in_time = now - exchange.started_at < order.total_s
        if in_time and chain.broken_off < _MOST_BROKEN_OFF:
            other: Order | None = None
            another = _another_may_answer(error, chain.fallen)
            if another:
                other = self._next(chain, order, exchange, caller, error)
            if other is None and (another or error.code == "queue_full"):  # another pool's line is, where it fell back
                other = self._waiting(chain, order, exchange, error)
            if other is not None:
                return other
        if chain.fallen and error.outcome in _REFUSALS:
            raise chain.first
        return None

    def settle(self, exchange: Exchange) -> None:
        """The request is over."""
        self._chains.pop(exchange.request_id, None)

    def prospects(self, order: Order, caller: Principal) -> list[dict[str, str | None]]:
        """What would be asked if the model's own replicas failed now, in order; what would be passed over says why."""
        found: list[dict[str, str | None]] = []
        for entry in self._lists.get(order.route.model, ()):
            route, obstacle = self._route(entry, order, caller)
            if route is not None and _place(route) == _place(order.route):
                obstacle = ASKED
            found.append(
                {
                    "model": order.route.name if entry.model is None else entry.model,
                    "pool": entry.backend if route is None else route.pool.name,
                    "passed_over": obstacle or None,
                }
            )
        return found

    def families(self) -> Iterator[Metric]:
        """What was sent where."""
        family = CounterMetricFamily(
            "tidegate_fallbacks",
            "Requests sent to a fallback of the model asked for, by what had failed.",
            labels=["model", "to", "reason"],
        )
        for labels, count in list(self.counts.items()):
            family.add_metric(labels, count)
        yield family

    # -- how it is decided

    def _next(
        self, chain: _Chain, order: Order, exchange: Exchange, caller: Principal, error: GatewayError
    ) -> Order | None:
        asked_for, id = chain.asked_for, exchange.request_id
        while chain.left:
            entry = chain.left.pop(0)
            to = entry.model or entry.backend or ""
            route, obstacle = self._route(entry, asked_for, caller)
            if route is not None and not obstacle:
                no_place = error.outcome is Outcome.UNAVAILABLE and route.pool.name == order.route.pool.name
                obstacle = ASKED if no_place or _place(route) in chain.places else ""
            if route is None or obstacle:
                logger.info("request %s passes over its fallback %s: %s", id, to, obstacle, extra=about(id))
                continue
            reason = _reason(error)
            logger.info(
                "request %s for %s falls back to %s: %s", id, asked_for.route.name, to, error.code, extra=about(id)
            )
            self.counts[asked_for.route.model, to, reason] += 1
            self._leave(order, exchange, error)
            chain.fallen = True
            chain.places.add(_place(route))
            exchange.fallback_from = asked_for.route.name
            return _order(asked_for, route)
        return None

    def _waiting(self, chain: _Chain, order: Order, exchange: Exchange, error: GatewayError) -> Order | None:
        """Nobody else is left: back to where a replica starts."""
        back = chain.starting
        if back is None:
            return None
        chain.starting, chain.waits = None, True
        if back.route.pool is not order.route.pool:
            self._leave(order, exchange, error)
        chain.fallen = back is not chain.asked_for
        exchange.fallback_from = chain.asked_for.route.name if chain.fallen else ""
        return back

    def _leave(self, order: Order, exchange: Exchange, error: GatewayError) -> None:
        """Nothing of what has failed is to be charged as if it were the next one's."""
        self._overflow.give_up(exchange, error)
        exchange.usage = None
        if _rented(order.route.pool) and (error.code in _BROKEN_OFF or error.outcome is Outcome.TIMEOUT):
            exchange.possible_duplicate = True

    def _route(self, entry: Fallback, order: Order, caller: Principal) -> tuple[ModelRoute | None, str]:
        """Where an entry leads to, and what is in the way; empty: nothing."""
        fleet = self._fleet()
        home = fleet.route(order.route.name)  # the order may be one for rented replicas
        if home is None or home.model not in self._settings.models:
            return None, GONE
        route, obstacle = (
            self._other_model(entry.model, home, order, fleet, caller)
            if entry.model is not None
            else self._other_pool(entry, home, fleet)
        )
        if route is None:
            return None, obstacle
        regions, pool = order.request.regions, route.pool
        if regions and all(replica.region not in regions for replica in pool.replicas):
            return route, RESIDENCY
        if not pool.rules.allow(order.path, order.body):
            return route, BODY
        if _some_rented(pool) and not _rented(home.pool) and not _may_leave(caller):
            return route, STAYS
        return route, ""

    def _other_model(
        self, name: str, home: ModelRoute, order: Order, fleet: Fleet, caller: Principal
    ) -> tuple[ModelRoute | None, str]:
        if order.path == EMBEDDINGS:
            return None, OTHER_EMBEDDINGS
        found, adapter = fleet.models.get(name), home.asked_adapter
        if not may_use(caller, name, adapter):
            return None, NOT_ALLOWED
        if found is None:
            return None, GONE
        if adapter is not None:
            found = fleet.adapted(found, adapter)
            if found is None:
                return None, NO_ADAPTER
        # The caller's own name for the model, which the body has, is another model's.
        return (found if found.upstream_model is not None else replace(found, upstream_model=found.name)), ""

    def _other_pool(self, entry: Fallback, home: ModelRoute, fleet: Fleet) -> tuple[ModelRoute | None, str]:
        pool = fleet.pools.get(entry.backend or "")
        if pool is None:
            return None, GONE
        if home.adapter is not None and not pool.knows_adapter(home.adapter):
            return None, NO_ADAPTER
        key = (home.model, pool.name, entry.upstream_model)
        before = self._routes.get(key)
        route = self._routes[key] = route_at(home, pool, self._settings, entry.upstream_model, entry.price, before)
        return route, ""


def _order(asked_for: Order, route: ModelRoute) -> Order:
    """The same request for another route. Its deadline stays; so do its regions, and what its key allows."""
    request = replace(asked_for.request, ms_per_usd=route.ms_per_usd[asked_for.band])
    if route.model != asked_for.route.model:
        # Read anew, with the other model's tokens and keys.
        request = replace(request, model=route.name, adapter=route.adapter, prefix=None, prompt_tokens=0)
    return msgspec.structs.replace(asked_for, route=route, request=request)


def _place(route: ModelRoute) -> _Place:
    return route.pool.name, route.upstream_model or route.model, route.adapter


def _another_may_answer(error: GatewayError, fallen: bool) -> bool:
    """Whether another pool or model may not have this error. `fallen`: it is a fallback's."""
    if error.code in _THE_TENANTS or error.status == 401:
        return False
    if fallen and error.outcome in _REFUSALS:
        return True
    return error.outcome in _ANOTHER_MAY_ANSWER and error.status not in _THE_CLIENTS


def _reason(error: GatewayError) -> str:
    """What has failed, in few words: a label of metrics."""
    if isinstance(error, QueueFull | QueueTimeout):
        return "queue_refused"
    if isinstance(error, NoReplicaAvailable):
        return "no_replica"
    if error.outcome is Outcome.TIMEOUT:
        return "timeout"
    if error.outcome in _REFUSALS:
        return "refused"
    if error.code in ("upstream_auth_failed", "upstream_no_funds"):
        return "credential_refused"
    if error.status == 429:
        return "rate_limited"
    return "overloaded" if error.status == 503 else "failed"


def _rented(pool: Pool) -> bool:
    return all(replica.hosted for replica in pool.replicas)


def _some_rented(pool: Pool) -> bool:
    return any(replica.hosted for replica in pool.replicas)


def _may_leave(caller: Principal) -> bool:
    """Whether the caller's prompts may leave for rented replicas: `spill: never` is meant for these as well."""
    notes = (caller.tenant.metadata, {} if caller.key is None else caller.key.metadata)
    return all(note.get(NOTE, "allow") == "allow" for note in notes)
