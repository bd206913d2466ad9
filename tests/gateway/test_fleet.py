"""Building the fleet from settings, and what a reload keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from backends.ticker import Ticker
from gateway.config import Settings
from gateway.fleet import build_fleet
from routing.capacity import Capacity
from routing.types import InferenceRequest, Replica, View


def settings(*replicas: Mapping[str, Any], **backend: Any) -> Settings:
    data: dict[str, Any] = {
        "models": {"m": {"backend": "pool", "aliases": ["also"], "upstream_model": "real"}},
        "backends": {"pool": {"engine": "openai", "replicas": replicas, **backend}},
    }
    return Settings(**data)


A = {"url": "http://127.0.0.1:1"}
B = {"url": "http://127.0.0.1:2"}


async def test_every_name_of_a_model_leads_to_the_same_route() -> None:
    fleet = build_fleet(settings(A), Ticker(), 0.0)
    assert fleet.models["m"] is fleet.models["also"]
    assert fleet.models["m"].upstream_model == "real"


async def test_replicas_in_both_configurations_keep_their_identity_and_their_client() -> None:
    ticker = Ticker()
    old = build_fleet(settings(A, B), ticker, 0.0)
    kept = old.pools["pool"].replicas[0]
    kept.in_flight = 3
    new = build_fleet(settings({**A, "weight": 2.0}), ticker, 0.0, old)
    assert new.pools["pool"].replicas == (kept,)
    assert (kept.in_flight, kept.weight) == (3, 2.0)
    assert new.pools["pool"].upstreams[kept] is old.pools["pool"].upstreams[kept]


async def test_a_change_of_the_connections_makes_a_new_client_for_the_same_replica() -> None:
    ticker = Ticker()
    old = build_fleet(settings(A), ticker, 0.0)
    new = build_fleet(settings(A, connections={"max": 7}), ticker, 0.0, old)
    (replica,) = new.pools["pool"].replicas
    assert replica is old.pools["pool"].replicas[0]
    assert new.pools["pool"].upstreams[replica] is not old.pools["pool"].upstreams[replica]


async def test_two_paths_at_one_host_are_two_replicas_also_after_a_reload() -> None:
    ticker = Ticker()
    both = settings({"url": "http://127.0.0.1:1/one/v1"}, {"url": "http://127.0.0.1:1/two/v1"})
    old = build_fleet(both, ticker, 0.0)
    new = build_fleet(both, ticker, 0.0, old)
    assert new.pools["pool"].replicas == old.pools["pool"].replicas
    assert len(set(new.pools["pool"].replicas)) == 2
    sent = {
        upstream.request("/v1/embeddings", b"{}", "id")[0].split(b" ")[1]
        for upstream in new.pools["pool"].upstreams.values()
    }
    assert sent == {b"/one/v1/embeddings", b"/two/v1/embeddings"}


async def test_a_reload_changes_the_capacity_that_is_configured_and_keeps_what_was_learned() -> None:
    ticker = Ticker()
    old = build_fleet(settings({**A, "max_in_flight": 8}, queue={"max_tokens": 4096}), ticker, 0.0)
    (replica,) = old.pools["pool"].replicas
    assert replica.meter.capacity == Capacity(8, 4096, "configured")
    replica.meter.state(64, 32768)
    build_fleet(settings(A), ticker, 0.0, old)
    assert replica.meter.capacity == Capacity(64, 32768, "stated")


class Renamed:
    """A policy of the operator's own, which has a name of its own."""

    name = "mine"

    def __init__(self, rng: Random) -> None: ...

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        return candidates[0]


async def test_a_policy_of_ones_own_keeps_what_it_has_learned_over_a_reload() -> None:
    model = {"backend": "pool", "policy": f"{__name__}:Renamed"}
    given = settings(A).model_dump()
    mine = Settings(**{**given, "models": {"m": model}})
    old = build_fleet(mine, Ticker(), 0.0)
    assert build_fleet(mine, Ticker(), 0.0, old).models["m"].router is old.models["m"].router
    assert build_fleet(settings(A), Ticker(), 0.0, old).models["m"].router.wants_prefix
    assert build_fleet(settings(A), Ticker(), 0.0, old).models["m"].router is not old.models["m"].router
