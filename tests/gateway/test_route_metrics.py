"""What routing believes, and how right it was, in metrics, records, headers and the state of the fleet."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from backends.ticker import Ticker
from backends.usage import Usage
from gateway.fleet import Pool, build_fleet
from gateway.ledger import as_record
from gateway.metrics import MAX_REASONS, OTHER_REASON, Metrics
from gateway.record import Exchange, Outcome
from gateway.route_metrics import route_families
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from routing.policies.cost import Cost
from routing.prefix import Prefix
from routing.router import Router
from routing.types import Decision, InferenceRequest
from tests.support.http import ask
from tests.support.serving import serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "all work and no play makes a dull prompt. " * 100}],
}
ROUTE_HEADERS = ("replica", "region", "attempts", "route-reason", "predicted-cached-tokens")


def used_pool() -> Pool:
    """Two replicas; at the first one request was predicted at 50 ms, took 100, and another one waits."""
    settings = settings_for(["http://127.0.0.1:1", "http://127.0.0.1:2"])
    pool = build_fleet(settings, Ticker(), 0.0).pools["pool"]
    first = pool.replicas[0]
    router = Router(Cost(Random(1)), pool.routing)
    for number, prefix in enumerate([Prefix([11, 12], [512, 1024], 1024, [(12, 1024)]), Prefix([], [], 80, [(7, 80)])]):
        request = InferenceRequest(f"q{number}", "m", True, 1024, prompt_tokens=256, prefix=prefix)
        router.dispatched(request, first, 10.0, Decision(first, "cold", predicted_ttft_ms=50.0))
        if number == 0:
            router.first_token(request, first, 10.1)
    return pool


def samples(families: list[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Values by the labels' values."""
    return {
        tuple(each.labels.values()): each.value for family in families for each in family.samples if each.name == name
    }


def test_work_and_speed_of_each_replica_are_shown() -> None:
    pool = used_pool()
    pool.replicas[0].speed.prefill_ms = 0.5
    families = list(route_families([pool]))
    assert samples(families, "tidegate_replica_queued_tokens") == {("pool", "pool-0"): 256, ("pool", "pool-1"): 0}
    assert samples(families, "tidegate_replica_running_tokens") == {("pool", "pool-0"): 256, ("pool", "pool-1"): 0}
    assert samples(families, "tidegate_replica_queued_requests")["pool", "pool-0"] == 1
    assert samples(families, "tidegate_replica_running_requests")["pool", "pool-0"] == 1
    assert samples(families, "tidegate_replica_prefill_seconds_per_token")["pool", "pool-0"] == 0.0005


def test_predictions_are_compared_where_there_were_any() -> None:
    families = list(route_families([used_pool()]))
    assert samples(families, "tidegate_ttft_prediction_error_ratio") == {("pool", "pool-0"): pytest.approx(0.5)}
    assert samples(families, "tidegate_ttft_prediction_bias_ratio") == {("pool", "pool-0"): pytest.approx(-0.5)}
    assert samples(families, "tidegate_ttft_predicted_seconds_total") == {("pool", "pool-0"): pytest.approx(0.05)}
    assert samples(families, "tidegate_ttft_observed_seconds_total") == {("pool", "pool-0"): pytest.approx(0.1)}
    buckets = samples(families, "tidegate_ttft_prediction_ratio_bucket")
    counts = {float(labels[2]): count for labels, count in buckets.items()}
    assert counts[0.25] == 0
    assert all(count == 1 for bound, count in counts.items() if bound > 0.5)
    assert sorted(counts.values()) == [counts[bound] for bound in sorted(counts)]


def test_the_index_is_shown_with_what_it_gave_up() -> None:
    pool = used_pool()
    pool.routing.index.drop(0, [7])
    families = list(route_families([pool]))
    assert samples(families, "tidegate_prefix_index_keys") == {("pool",): 2}
    assert samples(families, "tidegate_prefix_index_max_keys")["pool",] > 1000
    evicted = samples(families, "tidegate_prefix_index_evicted_keys_total")
    assert evicted == {("pool", "budget"): 0, ("pool", "cap"): 0, ("pool", "engine"): 0, ("pool", "failed"): 1}
    assert 200 < samples(families, "tidegate_replica_prefix_tokens")["pool", "pool-0"] < 320
    assert samples(families, "tidegate_replica_prefix_budget_tokens")["pool", "pool-0"] > 1000


def test_the_exposition_can_be_read_back() -> None:
    class Fixed(Collector):
        def collect(self) -> list[Metric]:
            return list(route_families([used_pool()]))

    registry = CollectorRegistry()
    registry.register(Fixed())
    read = {family.name for family in text_string_to_metric_families(generate_latest(registry).decode())}
    assert read == {family.name for family in Fixed().collect()}


def settled(reason: str, **fields: Any) -> Exchange:
    return Exchange(
        "req_1",
        "/v1/chat/completions",
        10.0,
        0.0,
        **{
            "model": "m",
            "pool": "pool",
            "replica": "pool-0",
            "attempts": 1,
            "route_reason": reason,
            "outcome": Outcome.COMPLETED,
            **fields,
        },
    )


def test_decisions_are_counted_by_reason_and_reasons_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.observe(settled(f"reason-{number}"))
    metrics.observe(settled("reason-0"))
    metrics.observe(settled("", replica="", attempts=0))
    counted = samples(list(metrics.families()), "tidegate_route_decisions_total")
    assert len(counted) == MAX_REASONS + 1
    assert counted["m", "reason-0"] == 2
    assert counted["m", OTHER_REASON] == 1000 - MAX_REASONS


def test_cached_tokens_are_compared_where_the_engine_says() -> None:
    metrics = Metrics()
    metrics.observe(settled("warm", predicted_cached_tokens=100, usage=Usage(120, 5, 80)))
    metrics.observe(settled("warm", predicted_cached_tokens=50, usage=Usage(120, 5, 60)))
    metrics.observe(settled("warm", predicted_cached_tokens=70, usage=Usage(120, 5, None)))
    metrics.observe(settled("warm", predicted_cached_tokens=70))
    families = list(metrics.families())
    assert samples(families, "tidegate_cached_tokens_predicted_total") == {("pool", "pool-0"): 150}
    assert samples(families, "tidegate_cached_tokens_reported_total") == {("pool", "pool-0"): 140}
    assert samples(families, "tidegate_cached_tokens_prompt_total") == {("pool", "pool-0"): 240}


def test_a_record_has_what_was_predicted_beside_what_was_observed() -> None:
    record = as_record(
        settled(
            "warm",
            predicted_cached_tokens=100,
            predicted_ttft_ms=12.34567,
            usage=Usage(120, 5, 80),
            dispatched_at=10.5,
            first_content_at=10.75,
        )
    )
    assert record["route_reason"] == "warm"
    assert (record["predicted_cached_tokens"], record["cached_tokens"]) == (100, 80)
    assert (record["predicted_ttft_ms"], record["replica_ttft_ms"], record["ttft_ms"]) == (12.346, 250.0, 750.0)
    nobody = as_record(settled("", replica="", attempts=0))
    assert (nobody["predicted_cached_tokens"], nobody["predicted_ttft_ms"], nobody["replica_ttft_ms"]) == (None,) * 3


@EDGES
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_say_how_they_were_routed(edge: str, stream: bool, tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    async with FakeEngine(chunks=2) as engine:
        settings = settings_for([], edge=edge, backend={"replicas": [{"url": engine.url, "region": "eu"}]})
        async with serving(settings, usage_log=log, own_policies=True) as gateway:
            await ask(gateway, {**CHAT, "stream": stream})
            reply = await ask(gateway, {**CHAT, "stream": stream})
            assert reply.status == 200
            shown = [reply.headers[f"x-tidegate-{name}"] for name in ROUTE_HEADERS]
            assert shown[:4] == ["pool-0", "eu", "1", "warm"]
            assert int(shown[4]) > 500
            await gateway.settled(2)
        record = json.loads(log.read_text().splitlines()[-1])
    assert record["predicted_cached_tokens"] == int(shown[4])
    assert record["predicted_ttft_ms"] > 0


@EDGES
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_say_who_was_tried_and_why(edge: str, stream: bool) -> None:
    async with FakeEngine(status=400) as engine:
        settings = settings_for([], edge=edge, backend={"replicas": [{"url": engine.url, "region": "eu"}]})
        async with serving(settings, own_policies=True) as gateway:
            reply = await ask(gateway, {**CHAT, "stream": stream})
            assert reply.status == 400
            assert [reply.headers[f"x-tidegate-{name}"] for name in ROUTE_HEADERS] == ["pool-0", "eu", "1", "cold", "0"]
            reply = await ask(gateway, {**CHAT, "model": "gpt-9"})
            assert (reply.status, [name for name in reply.headers if "tidegate-r" in name]) == (404, [])


async def test_the_fleet_shows_work_speed_error_and_index() -> None:
    async with (
        FakeEngine(chunks=2) as engine,
        serving(settings_for([engine.url]), own_policies=True) as gateway,
    ):
        await ask(gateway, {**CHAT, "stream": True})
        await gateway.settled(1)
        (pool,) = (await LocalSource(gateway.runtime).fleet())["pools"]
        (replica,) = pool["replicas"]
        assert replica["work"] == {"queued": 0, "queued_tokens": 0, "running": 0, "running_tokens": 0}
        assert replica["speed"]["prefill_ms"] > 0
        assert replica["ttft_error"]["count"] == 1
        assert replica["prefix_index"]["tokens"] > 500
        assert pool["prefix_index"]["pairs"] == replica["prefix_index"]["keys"] > 3
        families = await LocalSource(gateway.runtime).metrics()
        assert samples(families, "tidegate_route_decisions_total") == {("m", "cold"): 1}
        assert samples(families, "tidegate_prefix_index_keys")["pool",] > 3
