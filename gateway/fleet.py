"""The models that can be asked for and the replicas behind them, as one immutable snapshot of the configuration.

A reload builds a new `Fleet` and swaps it in; requests under way keep the one they began with. Replicas that are in
both keep their identity, so that their in-flight counts and cool-downs stay true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from backends.dialects import DIALECTS
from backends.ticker import Ticker
from backends.upstream import Upstream
from gateway.config import Backend, Price, Settings
from gateway.config import Replica as ReplicaSettings
from gateway.relay import Timing
from routing.types import Replica


@dataclass(frozen=True, slots=True)
class Pool:
    """A backend at work: interchangeable replicas and the client of each."""

    name: str
    settings: Backend
    replicas: tuple[Replica, ...]
    upstreams: Mapping[Replica, Upstream]


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """One model of the configuration, resolved as far as it can be before a request comes."""

    name: str
    pool: Pool
    upstream_model: bytes | None
    """The name to send upstream, as JSON text; None sends the caller's own."""
    timing: Timing
    connect_s: float
    price: Price | None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All pools and models. `models` is keyed by every name a client may use, aliases included."""

    pools: Mapping[str, Pool]
    models: Mapping[str, ModelRoute]
    created_unix_s: int
    """When this snapshot was made; OpenAI's model objects want a date."""

    def upstreams(self) -> Iterable[Upstream]:
        for pool in self.pools.values():
            yield from pool.upstreams.values()


def build_fleet(settings: Settings, ticker: Ticker, now_unix_s: float, previous: Fleet | None = None) -> Fleet:
    """Make the fleet that `settings` describe, taking over unchanged replicas of `previous`."""
    known = {} if previous is None else previous.pools
    pools = {name: _pool(name, backend, ticker, known.get(name)) for name, backend in settings.backends.items()}
    models: dict[str, ModelRoute] = {}
    for name, model in settings.models.items():
        timeouts = settings.effective_timeouts(name)
        route = ModelRoute(
            name=name,
            pool=pools[model.backend],
            upstream_model=None if model.upstream_model is None else msgspec.json.encode(model.upstream_model),
            timing=Timing(
                first_token_s=timeouts.first_token_s,
                idle_s=timeouts.idle_s,
                total_s=timeouts.total_s,
                hold_s=settings.stream.hold_s,
                heartbeat_s=settings.stream.heartbeat_s,
            ),
            connect_s=timeouts.connect_s,
            price=model.price,
        )
        for key in (name, *model.aliases):
            models[key] = route
    return Fleet(pools, models, int(now_unix_s))


def _pool(name: str, backend: Backend, ticker: Ticker, previous: Pool | None) -> Pool:
    old = {} if previous is None else {replica.url: replica for replica in previous.replicas}
    upstreams: dict[Replica, Upstream] = {}
    for entry in backend.replicas:
        replica = old.get(entry.url) or Replica(entry.name, name, entry.url, backend.engine)
        replica.name = entry.name
        replica.engine = backend.engine
        replica.region = entry.region
        replica.weight = entry.weight
        replica.max_in_flight = entry.max_in_flight
        if previous is not None and replica in previous.upstreams and _same_client(previous.settings, backend):
            upstreams[replica] = previous.upstreams[replica]
        else:
            upstreams[replica] = _upstream(replica, entry, backend, ticker)
    return Pool(name, backend, tuple(upstreams), upstreams)


def _same_client(old: Backend, new: Backend) -> bool:
    """Whether a client made for `old` serves `new` as well."""
    return (
        old.engine == new.engine
        and old.api_key == new.api_key
        and old.connections == new.connections
        and old.timeouts.connect_s == new.timeouts.connect_s
    )


def _upstream(replica: Replica, entry: ReplicaSettings, backend: Backend, ticker: Ticker) -> Upstream:
    return Upstream(
        replica,
        DIALECTS[backend.engine],
        origin=entry.origin,
        path_prefix=entry.path_prefix,
        api_key=None if backend.api_key is None else backend.api_key.get_secret_value(),
        max_connections=backend.connections.max,
        idle_s=backend.connections.idle_s,
        connect_timeout_s=backend.timeouts.connect_s,
        ticker=ticker,
    )
