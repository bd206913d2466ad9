"""Tables that others than the operator can make grow have an end."""

from __future__ import annotations

import asyncio
import time

from uvicorn.server import ServerState

from backends.ticker import Ticker
from gateway import fleet as module
from gateway.edges.guards import Sweep
from gateway.fleet import build_fleet
from gateway.metrics import MAX_MODELS, Metrics
from gateway.record import Exchange, Outcome
from tests.support.serving import settings_for


async def test_adapters_that_engines_load_over_the_years_are_counted_together_beyond_a_thousand() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_MODELS):
        exchange = Exchange("req_1", "/v1/chat/completions", 10.0, 0.0, model=f"m:adapter-{number}")
        exchange.outcome, exchange.finished_at = Outcome.COMPLETED, 11.0
        metrics.observe(exchange)
    families = {family.name: family for family in metrics.families()}
    requests = families["tidegate_requests"].samples
    labels = {sample.labels["model"] for sample in requests}
    assert len(labels) == MAX_MODELS + 1
    assert sum(sample.value for sample in requests) == 3 * MAX_MODELS
    assert next(sample.value for sample in requests if sample.labels["model"] == "other") == 2 * MAX_MODELS
    durations = families["tidegate_request_duration_seconds"].samples
    assert {sample.labels["model"] for sample in durations} == labels


async def test_routes_to_adapters_are_kept_for_so_many_names() -> None:
    fleet = build_fleet(settings_for(["http://127.0.0.1:1"], engine="vllm"), Ticker(), 0.0)
    (replica,) = fleet.pools["pool"].replicas
    most = 0
    for number in range(2 * module.MAX_ADAPTER_ROUTES):
        name = f"adapter-{number}"
        replica.adapters = frozenset({name})
        route = fleet.route(f"m:{name}")
        assert route is not None
        assert route.adapter == name
        most = max(most, len(fleet._adapter_routes))
    assert most == module.MAX_ADAPTER_ROUTES


class Client:
    """A connection that has not read so much; None: it has read everything and is not watched."""

    def __init__(self, unsent_bytes: int | None) -> None:
        self.transport: asyncio.Transport = self  # type: ignore[assignment]
        self.expires_at = float("inf")
        self.stalled_since = None if unsent_bytes is None else time.monotonic()
        self.unsent_bytes = unsent_bytes or 0

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def expire(self) -> None: ...


def test_the_sweep_knows_what_slow_clients_have_not_fetched() -> None:
    state = ServerState()
    state.connections |= {Client(300_000), Client(None), Client(70_000)}  # type: ignore[arg-type]
    sweep = Sweep(state, 30.0)
    sweep.tick(0.0)
    assert sweep.unsent_bytes == 370_000
