"""Everything one worker shares between its requests, built once and passed in."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Collection, Coroutine, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from backends.kvevents.view import Summary
from backends.ticker import Ticker
from backends.upstream import Upstream
from gateway import usage
from gateway.accounts.counts import UseCounts
from gateway.adapters import AdapterKeeper
from gateway.admission.doors import Doors
from gateway.admission.opening import Admission
from gateway.attempt_metrics import AttemptMetrics
from gateway.build_metrics import Reloads
from gateway.config import Settings, keep_restart_only
from gateway.edges.hosts import HostList, hosts_of
from gateway.errors import GatewayError
from gateway.fallback import Fallbacks
from gateway.fleet import Fleet, build_fleet
from gateway.inspection.explaining import Explaining
from gateway.ledger import Ledger
from gateway.metrics import Metrics, rented_of
from gateway.notices import Notices
from gateway.order import Call
from gateway.overload.service import Overload
from gateway.record import Exchange, Outcome
from gateway.regions import Regions
from gateway.relay import Relay
from gateway.request_log import RequestLog
from gateway.spill import Overflow
from gateway.starting.prospects import Starts
from gateway.steering.traffic import Traffic
from gateway.store import Store
from gateway.warmup.warmer import Warmer
from gateway.watch.witness import Witness
from routing.types import Policy, Replica

if TYPE_CHECKING:
    from gateway.scaling.demand import DemandBook
    from gateway.telemetry.service import Service

MAX_BACKGROUND_TASKS = 1000
_RETIRE_POLL_S = 0.25


class ByteBudget:
    """Bounds the request bytes held in memory at once, over all requests of a worker."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    @property
    def scarce(self) -> bool:
        """A quarter is taken: from now on only callers who are known may take more."""
        return self.used_bytes * 4 > self.limit_bytes

    @property
    def crowded(self) -> bool:
        """Half is taken: what may have to be kept for minutes would leave too little for what is answered at once."""
        return self.used_bytes * 2 > self.limit_bytes

    def take(self, size_bytes: int) -> bool:
        """Reserve; False, and nothing reserved, when the limit would be passed."""
        if self.used_bytes + size_bytes > self.limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        self.used_bytes -= size_bytes


class KvSource(Protocol):
    """What follows the KV cache of one replica."""

    def summary(self) -> Summary: ...


class Runtime:
    """One worker's shared state. Create it inside the event loop that will use it."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy | None,
        metrics: Metrics,
        ledger: Ledger,
        *,
        admission: Admission | None = None,
        worker: int = 0,
    ) -> None:
        """`policy` takes the place of what the models' settings say, for tests. `worker`: which of several it is."""
        self.settings = settings
        self._policy = policy
        self.metrics = metrics
        self.ledger = ledger
        self.admission = admission or Admission(settings)
        """What lets requests in. Made here, it shares what it knows with nobody but a Redis."""
        self.gate = self.admission.gate
        self.store: Store = self.admission.store
        """What this worker shares with the others."""
        self.notices = Notices()
        """What workers tell each other beside the health of replicas."""
        self.demand: DemandBook | None = None
        """What pools are asked for; None where none has a `scaling`."""
        self.witness = Witness()
        self.traffic = Traffic()
        """The requests that were answered last, for simulations."""
        self.uses = UseCounts()
        """What tenants have used, for the view of costs."""
        self.attempt_metrics = AttemptMetrics()
        self.reloads = Reloads()
        self.request_log: RequestLog | None = None
        """Where each settled request gets a line; None: nowhere."""
        self.adapters = AdapterKeeper(self.store, lambda: self.fleet)
        self.warmer = Warmer(self)
        """Gives new replicas what they will be asked for."""
        self.kv_listeners: Mapping[Replica, KvSource] = {}
        """Where KV-cache events are followed; kept up by the watch."""
        self.loop = asyncio.get_running_loop()
        """Kept, because asking for it costs a system call per request on CPython 3.11 (a check of the process id)."""
        self.ticker = Ticker(self.loop)
        self.fleet: Fleet = build_fleet(settings, self.ticker, time.time(), policy=policy)
        self.metrics.rented = rented_of(self.fleet.upstreams())
        self.regions = Regions(settings)
        self.regions.watch(settings, self.fleet)
        self.overflow = Overflow(settings, self.gate, lambda: self.fleet)
        self.fallbacks = Fallbacks(settings, lambda: self.fleet, self.overflow)
        self.gate.rooms.doors = Doors(Starts(self.notices), lambda name: name in self.fleet.pools)
        self.gate.rooms.latest = lambda pool: self.fleet.pools.get(pool.name, pool)
        self.gate.holding.elsewhere = self.fallbacks.may_ask
        self.gate.holding.leaves = self.fallbacks.may_leave
        self.body_budget = ByteBudget(settings.server.max_in_flight_bytes)
        self.gate.holding.crowded = lambda: self.body_budget.crowded
        self.connections_of: Counter[str] = Counter()
        """Clients' connections by address, where those of one are limited."""
        self.overload = Overload(settings.overload, self.body_budget, Random())
        """What is refused so that the worker does not run out of something; samples once it is started."""
        self.hosts: HostList | None = hosts_of(settings)
        """Which names the listener answers to; None: any."""
        self.explaining = Explaining(settings.admin.explained_per_s if settings.admin.enabled else 0.0)
        """Why requests went where they went, of some of them."""
        self.trial_secret = ""
        """What a request of the gateway's own playground shows; empty: there is none."""
        self.telemetry: Service | None = None
        """None where nothing goes to a collector: its libraries are not even loaded then."""
        if settings.telemetry.endpoint is not None:
            from gateway.telemetry.service import service_of

            self.telemetry = service_of(settings.telemetry, lambda: self.fleet, worker)
        self.tracing = None if self.telemetry is None else self.telemetry.tracing
        self.draining = False
        """Set by shutdown: `/readyz` fails and replies close their connections."""
        self._relays: set[Relay] = set()
        self._live: dict[str, Exchange] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._id_prefix = f"req_{secrets.token_hex(8)}"
        self._ids = itertools.count(1)

    @property
    def in_flight(self) -> int:
        """Exchanges that have begun and are not settled."""
        return len(self._live)

    @property
    def relays(self) -> Collection[Relay]:
        """Of the requests that are past the choice of their model and not over."""
        return self._relays

    def new_request_id(self) -> str:
        """Unique over workers and restarts: 64 random bits for the process, then a counter."""
        return f"{self._id_prefix}{next(self._ids):08x}"

    def begin(self, call: Call) -> Exchange:
        """Open the record of a call. Every opened record must be given to `settle`."""
        now = time.monotonic()
        received_at = call.received_at
        request_id = self.new_request_id()
        exchange = Exchange(
            request_id=request_id,
            route=call.path,
            started_at=received_at,
            started_unix_s=time.time() - (now - received_at),
            read_at=now,
            request_bytes=len(call.body),
        )
        if self.tracing is not None:
            exchange.traced = self.tracing.begin(call.headers)
        self._live[request_id] = exchange
        return exchange

    def settle(self, exchange: Exchange) -> None:
        """Close the record: price it, count it, write it down. Synchronous, so that nothing can come in between."""
        exchange.finished_at = time.monotonic()
        if exchange.outcome is None:
            exchange.outcome = Outcome.INTERNAL
        if exchange.price is not None and exchange.usage is not None and exchange.cost_usd is None:
            exchange.cost_usd = usage.cost_usd(exchange.usage, exchange.price)
        self.overflow.settle(exchange)
        self.fallbacks.settle(exchange)
        exchange.admission_headers = ()  # sent; the record waits for the ledger, and should not hold on to memory
        self._live.pop(exchange.request_id, None)
        if not exchange.tenant:  # nobody knows who that was: no line in the log that anybody could fill
            self.metrics.refused(exchange.status)
            return
        self.metrics.observe(exchange)
        rented = self.metrics.rented
        self.uses.observe(exchange, bool(rented) and (exchange.pool, exchange.replica) in rented)
        if self.demand is not None:
            self.demand.settled(exchange)
        self.ledger.record(exchange)
        if self.request_log is not None:
            self.request_log.record(exchange)
        if self.telemetry is not None:
            self.telemetry.settled(exchange)

    async def learn_prompts(self) -> None:
        """Load the tokenizers and templates of models that have some; a second for each, in a thread."""
        settings, fleet = self.settings, self.fleet
        if all(model.tokenizer is None for model in settings.models.values()):
            for route in fleet.models.values():
                route.reader.exact = None
            return
        from gateway.templates import load_templates

        exact = await asyncio.to_thread(load_templates, settings)
        for route in fleet.models.values():
            route.reader.exact = exact if route.model in exact else None

    def open_relay(self, relay: Relay) -> None:
        """Start the relay's deadlines, and let shutdown reach it, until `close_relay`."""
        self._relays.add(relay)
        relay.open()

    def close_relay(self, relay: Relay) -> None:
        """Its request is over, or about to be refused. Twice is as good as once."""
        relay.close()
        self._relays.discard(relay)

    def interrupt_all(self, error: GatewayError) -> None:
        """End every exchange under way with this error."""
        self.gate.interrupt_all(error)
        for relay in list(self._relays):
            relay.interrupt(error)

    def under_way(self) -> list[tuple[Exchange, Relay | None]]:
        """Every exchange that has begun and is not settled, the oldest first, and its way back where it has one."""
        relays = {relay.exchange.request_id: relay for relay in self._relays}
        return [(exchange, relays.get(id)) for id, exchange in list(self._live.items())]

    def interrupt(self, request_id: str, error: GatewayError) -> bool:
        """End one exchange with this error; whether there was one that could be ended.

        One that waits for a connection, or for an engine to load an adapter, ends when that has come.
        """
        found = [relay for relay in self._relays if relay.exchange.request_id == request_id]
        for relay in found:
            relay.interrupt(error)
        self.gate.interrupt(request_id, error)
        return bool(found)

    def abandon(self, replica: Replica) -> None:
        """Move the requests without content away from a replica that has stopped without telling them."""
        for relay in list(self._relays):
            relay.abandon(replica)

    def abort(self, upstream: Upstream, request_id: str) -> None:
        """Have the engine told, in the background, that nobody waits for this request any more."""
        if upstream.dialect.abort_request(request_id) is not None:
            self.spawn(upstream.abort(request_id))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run best-effort work that no request waits for. Bounded: beyond the limit it is dropped."""
        if len(self._background) >= MAX_BACKGROUND_TASKS:
            work.close()
        else:
            self._keep(work)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def reload(self, settings: Settings) -> None:
        """Serve new requests by `settings`; those under way end as they began.

        The sections that need a restart stay as they were, so that what is reported is what is in force.
        """
        settings = keep_restart_only(self.settings, settings)
        old = self.fleet
        self.fleet = build_fleet(settings, self.ticker, time.time(), old, self._policy)
        self.metrics.rented |= rented_of(self.fleet.upstreams())  # those that are gone may still answer
        self.settings = settings
        self.admission.reload(settings)
        self.regions.watch(settings, self.fleet)
        self.overflow.reload(settings)
        self.fallbacks.reload(settings)
        self.overload.reload(settings.overload)
        self.explaining.configure(settings.admin.explained_per_s if settings.admin.enabled else 0.0)
        self.gate.look_now()
        self._keep(self._retire(old))
        self._keep(self.learn_prompts())

    async def _retire(self, old: Fleet) -> None:
        """Close what only the old fleet used, once every exchange that may still come for it has ended."""
        before = set(self._live)
        while before & self._live.keys():  # noqa: ASYNC110 - an event would have to be set on the hot path
            await asyncio.sleep(_RETIRE_POLL_S)
        kept = set(self.fleet.upstreams())
        self.metrics.rented = rented_of(kept)
        self.regions.leave(old, self.fleet)
        for upstream in old.upstreams():
            if upstream not in kept:
                upstream.close_when_idle()

    async def aclose(self) -> None:
        """Close every connection and file. Requests under way are cut."""
        self.overload.close()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.adapters.aclose()
        for upstream in self.fleet.upstreams():
            await upstream.aclose()
        self.ticker.close()
        await self.admission.aclose()
        await self.store.aclose()
        if self.telemetry is not None:
            await self.telemetry.aclose()
        await self.ledger.aclose()
