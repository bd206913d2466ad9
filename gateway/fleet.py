"""The models that can be asked for and the replicas behind them, as one immutable snapshot of the configuration.

A reload builds a new `Fleet` and swaps it in; requests under way keep the one they began with. Replicas that are in
both keep their identity, so that their in-flight counts and cool-downs stay true.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from backends.dialects import DIALECTS
from backends.dialects.protocol import Adapter, Dialect
from backends.ticker import Ticker
from backends.upstream import Upstream
from gateway.body_rules import BodyRules, body_rules
from gateway.config import Backend, Caps, ExchangeRates, Model, Price, Settings
from gateway.config import Replica as ReplicaSettings
from gateway.config.tls import tls_context
from gateway.own_keys import credentials_of, headers_with, keys_of
from gateway.reading import PromptReader
from gateway.relay import Timing
from gateway.steering.shadow import ModelShadow, model_shadow
from gateway.warmup.hot_prompts import HotPrompts
from routing.credential import Credentials
from routing.ejection import Rules
from routing.health import Health
from routing.hedging import Hedges
from routing.policies import make_policy
from routing.retry_budget import Retries
from routing.router import PoolState, Router
from routing.types import Policy, Replica

MAX_ADAPTER_ROUTES = 4096
"""Kept ready; beyond that they are made anew."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A backend at work: interchangeable replicas and the client of each."""

    name: str
    settings: Backend
    replicas: tuple[Replica, ...]
    upstreams: Mapping[Replica, Upstream]
    rules: BodyRules
    """What clients may ask of it: the rules of all its engines together."""
    credentials: Credentials | None
    """The state of the keys that its replicas share; None where they are called without."""
    by_identity: Mapping[str, Replica]
    routing: PoolState
    """What decisions about it share; the same for as long as the pool exists."""
    retries: Retries
    """How much it may be asked again; the same for as long as the pool exists."""
    alone: bool
    """No model has a spill or a fallback that leads to it or away from it."""
    configured_adapters: frozenset[str]
    """Names of the LoRA adapters that the configuration lists."""
    client: object
    """Everything that the replicas' clients were made from; equal means that they can be kept."""

    def knows_adapter(self, name: str) -> bool:
        """Whether the configuration or any replica knows a LoRA adapter of this name."""
        # On the way of every request with an adapter: no union of what a hundred replicas hold.
        return name in self.configured_adapters or any(
            replica.adapters is not None and name in replica.adapters for replica in self.replicas
        )

    def usable_adapters(self) -> frozenset[str]:
        """The LoRA adapters that some replica holds, as far as the engines say, or can be told to load."""
        known = [replica for replica in self.replicas if replica.adapters is not None]
        return frozenset[str]().union(
            *(replica.adapters or () for replica in known), *(replica.loadable for replica in known)
        )


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """One model of the configuration, resolved as far as it can be before a request comes."""

    name: str
    pool: Pool
    upstream_model: str | None
    """The name to send upstream; None sends the caller's own."""
    adapter: str | None
    """LoRA adapter that answers; None: the base model."""
    timing: Timing
    connect_s: float
    price: Price | None
    model: str
    """The configuration's name for it, which permissions and limits go by; with an adapter asked for by the client
    that of the base model."""
    router: Policy
    reader: PromptReader
    ms_per_usd: tuple[float, ...]
    """What a dollar is worth to each class, the most urgent first; zeros where no replica of the pool has a price."""
    policy: str
    """What the configuration calls its policy; one of the operator's own may call itself something else."""
    continues: bool
    """Whether an answer that breaks off is gone on with at another replica (`gateway.resumption`)."""
    hedges: Hedges | None
    """When a late prompt is sent to a second replica too; None: never."""
    shadow: ModelShadow | None = None
    """What decides beside the policy and sends nothing; None: nothing does."""
    hot: HotPrompts | None = None
    """What of it is used most, to warm new replicas with; None: none is warmed."""

    @property
    def asked_adapter(self) -> str | None:
        """The adapter that the client has asked for, in whichever way; None for one that the configuration names:
        whoever may use a model may use that."""
        return self.adapter if self.name != self.model else None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All pools and models. `models` is keyed by every name a client may use, aliases included."""

    pools: Mapping[str, Pool]
    models: Mapping[str, ModelRoute]
    created_unix_s: int
    """When this snapshot was made; OpenAI's model objects want a date."""
    _adapter_routes: dict[str, ModelRoute] = field(default_factory=dict)

    def route(self, name: str) -> ModelRoute | None:
        """What a client means by this name: a model, `<model>:<adapter>`, or the adapter of one model only, whichever
        comes first. None when it is none of these."""
        route = self.models.get(name) or self._adapter_route(name)
        if route is None:
            found = self.with_adapter(name)
            route = found[0] if len(found) == 1 else None
        return route

    def with_adapter(self, adapter: str) -> list[ModelRoute]:
        """The models, by their own names, that have a LoRA adapter of this name, each with it."""
        knowing = {pool.name for pool in self.pools.values() if pool.knows_adapter(adapter)}
        routes = (
            self._adapter_route(f"{name}:{adapter}")
            for name, route in self.models.items()
            if route.adapter is None and name == route.name and route.pool.name in knowing
        )
        return [route for route in routes if route is not None]

    def adapted(self, base: ModelRoute, adapter: str) -> ModelRoute | None:
        """A model's route with an adapter; None when the model has one of its own, or there is none of that name."""
        return self._adapter_route(f"{base.name}:{adapter}")

    def listed(self) -> Iterator[tuple[str, ModelRoute]]:
        """Every name a client can use, of adapters that can be had now too; aliases stand without them."""
        yield from self.models.items()
        alone: dict[str, ModelRoute | None] = {}
        for name, route in self.models.items():
            if route.adapter is not None or name != route.name:
                continue
            for adapter in sorted(route.pool.usable_adapters()):
                found = self._adapter_route(f"{name}:{adapter}")
                if found is not None:
                    yield f"{name}:{adapter}", found
                    alone[adapter] = None if adapter in alone else found
        for adapter, only in alone.items():
            if only is not None and self.route(adapter) is only:
                yield adapter, only

    def _adapter_route(self, name: str) -> ModelRoute | None:
        """The route for `<model>:<adapter>`, if there is such a model and its pool knows such an adapter.

        Names are checked here because engines do not: SGLang answers for an adapter it never heard of from the base
        model, without a word.
        """
        route = self._adapter_routes.get(name)
        if route is None:
            model, colon, adapter = name.rpartition(":")
            base = self.models.get(model) if colon else None
            if base is None or base.adapter is not None or not base.pool.knows_adapter(adapter):
                return None
            route = replace(
                base,
                name=f"{base.name}:{adapter}",
                upstream_model=base.upstream_model or base.name,
                adapter=adapter,
            )
            if len(self._adapter_routes) >= MAX_ADAPTER_ROUTES:  # engines come and go with adapters, for months
                self._adapter_routes.clear()
            self._adapter_routes[name] = route
        return route if route.adapter is not None and route.pool.knows_adapter(route.adapter) else None

    def upstreams(self) -> Iterable[Upstream]:
        for pool in self.pools.values():
            yield from pool.upstreams.values()


def build_fleet(
    settings: Settings,
    ticker: Ticker,
    now_unix_s: float,
    previous: Fleet | None = None,
    policy: Policy | None = None,
) -> Fleet:
    """Make the fleet that `settings` describe, taking over unchanged replicas of `previous`.

    `policy` takes the place of every model's own, for tests.
    """
    known = {} if previous is None else previous.pools
    caps = settings.caps
    linked = _linked(settings)
    pools = {
        name: _pool(name, backend, caps, ticker, known.get(name), alone=name not in linked)
        for name, backend in settings.backends.items()
    }
    models: dict[str, ModelRoute] = {}
    for name, model in settings.models.items():
        timeouts = settings.effective_timeouts(name)
        old = None if previous is None else previous.models.get(name)
        route = ModelRoute(
            name=name,
            pool=pools[model.backend],
            # An adapter's request names the base model, which the caller's own name is not.
            upstream_model=model.upstream_model or (name if model.adapter is not None else None),
            adapter=model.adapter,
            timing=Timing(
                first_token_s=timeouts.first_token_s,
                idle_s=timeouts.idle_s,
                total_s=timeouts.total_s,
                hold_s=settings.stream.hold_s,
                heartbeat_s=settings.stream.heartbeat_s,
            ),
            connect_s=timeouts.connect_s,
            price=model.price,
            model=name,
            router=policy or _router(model.policy, pools[model.backend], old),
            ms_per_usd=rates(model.ms_per_usd, pools[model.backend]),
            policy=model.policy,
            continues=model.continuation,
            reader=_reader(name, model, old),
            hedges=_hedges(model, old),
            shadow=model_shadow(model.shadow, pools[model.backend], None if old is None else old.shadow),
            hot=_hot(pools[model.backend], old),
        )
        if isinstance(route.router, Router):
            route.router.index_for_others(route.shadow is not None and route.shadow.wants_prefix)
        for key in (name, *model.aliases):
            models[key] = route
    _take_stock(pools, known)
    return Fleet(pools, models, int(now_unix_s))


def _linked(settings: Settings) -> set[str]:
    """The backends of models that can be answered at more than one."""
    linked: set[str] = set()
    for model in settings.models.values():
        others = [] if model.spill is None else [model.spill.backend]
        for entry in model.fallbacks:
            other = None if entry.model is None else settings.models.get(entry.model)
            others += [name for name in (entry.backend, None if other is None else other.backend) if name]
        if others:
            linked.update(others, [model.backend])
    return linked


def _pool(
    name: str, backend: Backend, caps: Caps, ticker: Ticker, previous: Pool | None, *, alone: bool = True
) -> Pool:
    old = {} if previous is None else {(replica.url, replica.dp_rank): replica for replica in previous.replicas}
    client = _client(backend)
    same_client = previous is not None and previous.client == client
    tls = tls_context(backend.tls.ca_file, backend.tls.cert_file, backend.tls.key_file)
    before, known = (None, None) if previous is None else (previous.settings, previous.credentials)
    credentials = credentials_of(backend, before, known)
    rules = _rules(backend)
    upstreams: dict[Replica, Upstream] = {}
    for entry in backend.replicas:
        engine = entry.engine or backend.engine
        replica = old.get((entry.url, entry.dp_rank)) or Replica(
            entry.name, name, entry.url, engine, health=Health(rules, Random())
        )
        unchanged = same_client and replica.engine == engine
        replica.name = entry.name
        replica.engine = engine
        replica.region = entry.region
        replica.weight = entry.weight
        replica.max_in_flight = entry.max_in_flight
        replica.meter.configure(entry.max_in_flight, backend.queue.max_tokens)
        replica.dp_rank = entry.dp_rank
        price = entry.price or Price()
        replica.input_usd_per_million = price.input
        replica.cached_usd_per_million = price.cached_input
        replica.output_usd_per_million = price.output
        replica.credential = credentials
        if credentials is not None:
            replica.paused_until = max(replica.paused_until, *(key.limits.latest for key in credentials.keys))
        replica.health.rules = rules
        if not backend.health.probe:
            replica.health.forget_probes()
        kept = None if previous is None or not unchanged else previous.upstreams.get(replica)
        if kept is None:
            kept = _upstream(replica, entry, backend, DIALECTS[engine], credentials, tls, ticker)
        replica.hosted = kept.hosted
        if previous is not None and replica not in previous.upstreams and not kept.hosted:
            # New to a pool at work.
            until_ready, warm_s = backend.health.probe, backend.warm_up.hold_s
            replica.health.join(time.monotonic(), until_ready=until_ready, warm_s=warm_s)
        kept.model = entry.upstream_model
        kept.configured_adapters = tuple(Adapter(each.name, each.path) for each in backend.adapters)
        _configure_adapters(kept, backend)
        upstreams[replica] = kept
    hosted = DIALECTS[backend.engine].hosted if backend.hosted is None else backend.hosted
    rented = all(upstream.hosted for upstream in upstreams.values()) if upstreams else hosted
    body = body_rules(
        backend, [each.dialect for each in upstreams.values()] or [DIALECTS[backend.engine]], rented, caps
    )
    routing = PoolState() if previous is None else previous.routing
    by_identity = {each.identity: each for each in upstreams}
    names = frozenset(each.name for each in backend.adapters)
    retries = Retries(Random()) if previous is None else previous.retries
    retries.configure(backend.retries.share, backend.retries.per_s, backend.retries.attempts)
    replicas = tuple(upstreams)
    return Pool(
        name, backend, replicas, upstreams, body, credentials, by_identity, routing, retries, alone, names, client
    )


def _take_stock(pools: Mapping[str, Pool], previous: Mapping[str, Pool]) -> None:
    """Have routing forget the replicas that are gone. Done last: a fleet that cannot be made must leave the old one
    as it was."""
    for name, pool in pools.items():
        for replica in previous[name].replicas if name in previous else ():
            if replica not in pool.upstreams:
                pool.routing.forget(replica)
            else:
                pool.routing.resize(replica)  # `queue.max_tokens` may have changed


def _configure_adapters(upstream: Upstream, backend: Backend) -> None:
    """Which adapters requests may have loaded, and how many there may be. What the engine has shown since holds on."""
    replica = upstream.replica
    loadable = frozenset[str]()
    if upstream.dialect.loads_adapters and backend.adapters_load != "always":
        loadable = frozenset(each.name for each in backend.adapters)
    if loadable != upstream.loadable:
        upstream.loadable = replica.loadable = loadable
    if backend.adapter_slots is not None:
        replica.adapter_slots = backend.adapter_slots
    elif upstream.adapter_slots is not None:
        replica.adapter_slots = None
    upstream.adapter_slots = backend.adapter_slots


def _router(policy: str, pool: Pool, previous: ModelRoute | None) -> Router:
    """The model's policy at work; one that stays the same keeps what it has learned."""
    if previous is not None and isinstance(previous.router, Router):
        router = previous.router
        if previous.policy == policy and router.state is pool.routing:
            return router
    chooser = make_policy(policy, Random())
    return Router(chooser, pool.routing, stay_where_loaded=not getattr(chooser, "weighs_adapters", False))


def _reader(name: str, model: Model, previous: ModelRoute | None) -> PromptReader:
    if previous is not None and previous.name == name:
        return previous.reader.configured(model.isolate_tenants, model.upstream_model)
    return PromptReader(name, model.isolate_tenants, model.upstream_model)


def _hedges(model: Model, previous: ModelRoute | None) -> Hedges | None:
    hedge = model.hedge
    if hedge is None:
        return None
    hedges = Hedges() if previous is None or previous.hedges is None else previous.hedges
    hedges.configure(hedge.share, hedge.max_prompt_tokens, hedge.max_busy, hedge.min_delay_ms / 1000)
    return hedges


def _hot(pool: Pool, previous: ModelRoute | None) -> HotPrompts | None:
    warm_up = pool.settings.warm_up
    rented = pool.upstreams and all(upstream.hosted for upstream in pool.upstreams.values())
    if rented or not warm_up.hold_s:
        return None
    hot = HotPrompts(Random()) if previous is None or previous.hot is None else previous.hot
    hot.configure(warm_up.prefixes > 0)
    return hot


def rates(exchange: ExchangeRates, pool: Pool) -> tuple[float, ...]:
    """What a dollar is worth to each class (`ModelRoute.ms_per_usd`) where requests of a model go to this pool."""
    if not any(entry.price is not None for entry in pool.settings.replicas):
        return (0.0, 0.0, 0.0, 0.0)
    return (exchange.critical, exchange.standard, exchange.batch, exchange.sheddable)


def _rules(backend: Backend) -> Rules:
    health = backend.health
    return Rules(
        consecutive=health.eject_after,
        ratio=health.failure_ratio,
        ejection_s=health.ejection_s,
        slow_start_s=health.slow_start_s,
        stall_s=health.stall_s,
    )


def _client(backend: Backend) -> object:
    """See `Pool.client`."""
    tls = backend.tls
    files = [each for each in (tls.ca_file, tls.cert_file, tls.key_file) if each is not None]
    return (
        keys_of(backend),
        # Renewed certificates keep their names.
        [(each, each.stat().st_mtime_ns) for each in files],
        backend.key_header,
        backend.headers,
        backend.hosted,
        backend.connections,
        backend.timeouts.connect_s,
        backend.health.timeout_s,
    )


def _upstream(
    replica: Replica,
    entry: ReplicaSettings,
    backend: Backend,
    dialect: Dialect,
    credentials: Credentials | None,
    tls: ssl.SSLContext | None,
    ticker: Ticker,
) -> Upstream:
    keys = keys_of(backend)
    return Upstream(
        replica,
        dialect,
        origin=entry.origin,
        path_prefix=entry.path_prefix,
        headers=headers_with(keys[0] if keys else None, backend, dialect),
        keys=credentials,
        key_headers=[headers_with(key, backend, dialect) for key in keys],
        hosted=dialect.hosted if backend.hosted is None else backend.hosted,
        max_connections=backend.connections.max,
        idle_s=backend.connections.idle_s,
        connect_timeout_s=backend.timeouts.connect_s,
        side_timeout_s=backend.health.timeout_s,
        ssl_context=tls,
        ticker=ticker,
    )
