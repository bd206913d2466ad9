"""What is counted, how it is exposed, and that it is documented."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from backends.gpus import Gpu
from backends.ticker import Ticker
from backends.usage import Usage
from gateway.adapters import AdapterKeeper
from gateway.admission.opening import Admission
from gateway.attempt_metrics import AttemptMetrics
from gateway.build_metrics import Reloads
from gateway.config.overload import Overload as OverloadSettings
from gateway.errors import GatewayError, Overloaded
from gateway.fallback import Fallbacks
from gateway.fleet import Fleet, build_fleet
from gateway.gpu_metrics import gpu_families
from gateway.histogram import Histogram
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.limits.plan import Plan
from gateway.limits.sets import LimitSet
from gateway.log_metrics import log_families
from gateway.metrics import (
    TTFT_BUCKETS_S,
    UNKNOWN_MODEL,
    Metrics,
    health_families,
    process_families,
    rented_of,
    replica_families,
)
from gateway.order import Call, read_order
from gateway.overload.service import Overload
from gateway.record import Attempt, Exchange, Outcome
from gateway.retry_view import retry_families
from gateway.route_metrics import route_families
from gateway.runtime import ByteBudget
from gateway.spill import Overflow
from gateway.steering.shadow import shadow_families
from gateway.store import MemoryStore
from gateway.store.limits import Admission as Answer
from gateway.store.limits import Rate, Refusal, Scope, Unit
from gateway.store.places import Band
from gateway.telemetry.counts import telemetry_families
from gateway.tenant_metrics import MAX_TENANTS, OTHER_TENANT
from gateway.verdict import Again, Verdict
from gateway.warmup.warmer import warm_up_families
from gateway.watch.witness import Witness
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.health import Change, Evidence
from routing.load import Load
from routing.types import Replica
from tests.gateway.test_route_metrics import used_pool
from tests.support.http import ask
from tests.support.serving import serving, settings_for

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
NAME = re.compile(r'"((?:tidegate|process)_[a-z_]+)"')


def settled(model: str = "m", outcome: Outcome = Outcome.COMPLETED, **fields: object) -> Exchange:
    exchange = Exchange("req_1", "/v1/chat/completions", 10.0, 0.0, model=model)
    exchange.outcome, exchange.finished_at = outcome, 12.0
    for name, value in fields.items():
        setattr(exchange, name, value)
    return exchange


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in metrics.families()}


def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    for family in metrics.families():
        for each in family.samples:
            if each.name == sample and each.labels == labels:
                return each.value
    return None


def everything() -> list[Metric]:
    """All families of a worker, with samples in them."""
    metrics = Metrics()
    metrics.observe(
        settled(
            usage=Usage(1, 2, 1), cost_usd=0.1, replica="pool-1", first_content_at=11.0, tenant="t", **failed_over()
        )
    )
    replica = Replica("pool-0", "pool", "http://x", "openai")
    replica.load = Load(0.0, running=1, waiting=2, kv_use=0.5, prefill_us_per_token=80.0)
    replica.meter.state(8, 4096)
    witness = Witness()
    witness.changed(replica, Change.EJECTED, "a test")
    witness.failed(replica, [replica], Verdict(GatewayError("no"), Evidence.FAILED, Again.NEVER))
    return [
        *metrics.families(),
        *replica_families([replica], 0.0),
        *health_families(witness),
        *process_families(1, 2, 5, 3, 4.0),
        *admission_metrics(),
        *spill_metrics(),
        *fallback_metrics(),
        *attempt_metrics(),
        *adapter_metrics(),
        *warm_up_families({("pool", "answered"): 1}),
        *overload_metrics(),
        *route_families([used_pool()]),
        *retry_families([used_pool()], 0.0),
        *Reloads().families(),
        *log_families(None, None),
        *telemetry_families(sent=1, dropped={"rate": 1}, reports={"sent": 1}),
        *gpu_metrics(),
        *shadow_families(shadowed_fleet()),
    ]


def shadowed_fleet() -> Fleet:
    """One with a model whose shadow policy has not been asked yet."""
    settings = settings_for(["http://x"], models={"m": {"backend": "pool", "shadow": {"policy": "round_robin"}}})
    return build_fleet(settings, Ticker(), 0.0)


def failed_over() -> dict[str, Any]:
    """Two attempts, at two replicas."""
    tries = (Attempt("pool", "pool-0", "cold", 10.0, code="upstream_disconnected"), Attempt("pool", "pool-1", "", 10.1))
    return {"attempts": 2, "tries": tries}


def gpu_metrics() -> list[Metric]:
    fleet = build_fleet(settings_for(["http://127.0.0.1:1"]), Ticker(), 0.0)
    for upstream in fleet.upstreams():
        upstream.gpus = (Gpu("0", 0.5, 1, 2, 300.0),)
    return list(gpu_families(fleet.upstreams()))


def attempt_metrics() -> list[Metric]:
    metrics = AttemptMetrics()
    metrics.broke_off("m", "")
    metrics.hedged("m", won=True)
    return list(metrics.families())


def overload_metrics() -> list[Metric]:
    overload = Overload(OverloadSettings(), ByteBudget(100), Random())
    overload.sample(0.0, 0.0)
    overload.level = 3
    with pytest.raises(Overloaded):
        overload.check(Band.BATCH)
    return list(overload.families())


def fallback_metrics() -> list[Metric]:
    fallbacks = Fallbacks(settings_for(["http://127.0.0.1:1"]), lambda: None, None)  # type: ignore[arg-type, return-value]
    fallbacks.counts["m", "small", "failed"] = 1
    return list(fallbacks.families())


def adapter_metrics() -> list[Metric]:
    keeper = AdapterKeeper(MemoryStore(), lambda: None)  # type: ignore[arg-type, return-value]
    keeper.loads["pool", "loaded"] = 2
    keeper.evictions["pool"] = 1
    keeper.load_ms["pool"] = 500
    return list(keeper.families())


def admission_metrics() -> list[Metric]:
    admission = Admission(settings_for(["http://127.0.0.1:1"]))
    metrics = admission.gate.metrics
    limits = LimitSet(requests_per_minute=1)
    scope = Scope("{t:t}:t", (Rate(Unit.REQUESTS, 1, 1, 1),))
    plan = Plan((scope,), ("tenant t",), (limits,), None, False, 0.0, "{t:t}")
    metrics.refusals(plan, Answer(False, 0, (0,), (), (), (Refusal(0, "requests", 1),)))
    metrics.turned_away("pool", "pool_full")
    metrics.waited("pool", Band.BATCH, 1.0)
    return list(metrics.families(admission))


def spill_metrics() -> list[Metric]:
    """One request that has left, and one that had to stay."""
    spill = {"backend": "rented", "price": {"output": 1.0}, "usd_per_hour": 1.0, "usd_per_day": 1.0}
    engine = {"engine": "openai", "replicas": [{"url": "http://127.0.0.1:1"}]}
    settings = settings_for(
        [],
        models={"m": {"backend": "pool", "spill": spill}},
        backends={"pool": engine, "rented": {**engine, "hosted": True}},
    )
    fleet = build_fleet(settings, Ticker(), 0.0)
    fleet.pools["pool"].replicas[0].draining = True
    overflow = Overflow(settings, Admission(settings).gate, lambda: fleet)
    caller = Principal(None, ANONYMOUS)
    for headers in ([], [(b"x-tidegate-region", b"eu-west")]):
        call = Call("/v1/chat/completions", headers, b'{"model":"m","messages":[]}', 0.0)
        exchange = settled(tenant="default")
        overflow.consider(read_order(call, fleet, "req_1", caller), exchange, caller, 0.0)
    return list(overflow.families())


def test_requests_are_counted_by_model_route_and_outcome() -> None:
    metrics = Metrics()
    for outcome in (Outcome.COMPLETED, Outcome.COMPLETED, Outcome.CLIENT_LEFT):
        metrics.observe(settled(outcome=outcome))
    labels = {"model": "m", "route": "/v1/chat/completions"}
    assert value(metrics, "tidegate_requests_total", **labels, outcome="completed") == 2
    assert value(metrics, "tidegate_requests_total", **labels, outcome="client_left") == 1


def test_tokens_and_cost_add_up() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.observe(settled(usage=Usage(10, 5, 4), cost_usd=0.25))
    assert value(metrics, "tidegate_tokens_total", model="m", kind="prompt", source="own") == 30
    assert value(metrics, "tidegate_tokens_total", model="m", kind="cached_prompt", source="own") == 12
    assert value(metrics, "tidegate_tokens_total", model="m", kind="completion", source="own") == 15
    assert value(metrics, "tidegate_cost_usd_total", model="m", source="own") == 0.75


def test_what_rented_replicas_use_is_counted_apart() -> None:
    metrics = Metrics()
    engine = {"engine": "openai", "replicas": [{"url": "http://127.0.0.1:1"}]}
    fleet = build_fleet(
        settings_for([], backends={"pool": engine, "rented": {**engine, "hosted": True}}), Ticker(), 0.0
    )
    metrics.rented = rented_of(fleet.upstreams())
    for pool, output in (("pool", 5), ("rented", 7), ("rented", 7)):
        metrics.observe(settled(usage=Usage(10, output), cost_usd=0.5, pool=pool, replica=f"{pool}-0", attempts=1))
    assert value(metrics, "tidegate_tokens_total", model="m", kind="completion", source="own") == 5
    assert value(metrics, "tidegate_tokens_total", model="m", kind="completion", source="rented") == 14
    assert value(metrics, "tidegate_cost_usd_total", model="m", source="own") == 0.5
    assert value(metrics, "tidegate_cost_usd_total", model="m", source="rented") == 1.0


def test_tenants_are_counted_by_name_up_to_a_hundred() -> None:
    metrics = Metrics()
    for number in range(MAX_TENANTS + 20):
        metrics.observe(settled(tenant=f"t{number}", usage=Usage(10, 5, 4), cost_usd=0.25))
    metrics.observe(settled(tenant="t0", outcome=Outcome.REJECTED))
    assert value(metrics, "tidegate_tenant_requests_total", tenant="t0", outcome="completed") == 1
    assert value(metrics, "tidegate_tenant_requests_total", tenant="t0", outcome="rejected") == 1
    assert value(metrics, "tidegate_tenant_tokens_total", tenant="t0", kind="cached_prompt") == 4
    assert value(metrics, "tidegate_tenant_tokens_total", tenant=OTHER_TENANT, kind="prompt") == 200
    assert value(metrics, "tidegate_tenant_cost_usd_total", tenant=OTHER_TENANT) == 5.0
    assert len(families(metrics)["tidegate_tenant_cost_usd"].samples) == MAX_TENANTS + 1


def test_the_time_of_a_token_is_that_between_the_first_and_the_last() -> None:
    metrics = Metrics()
    metrics.observe(settled(first_content_at=11.0, usage=Usage(10, 11)))  # ends at 12.0
    assert value(metrics, "tidegate_time_per_output_token_seconds_sum", model="m") == pytest.approx(0.1)
    for other in (
        settled(usage=Usage(10, 11)),
        settled(first_content_at=11.0, usage=Usage(10, 1)),
        settled(first_content_at=11.0, usage=Usage(10, 11), usage_estimated=True),
        settled(first_content_at=11.0, usage=Usage(10, 11), outcome=Outcome.CLIENT_LEFT),
    ):
        metrics.observe(other)
    assert value(metrics, "tidegate_time_per_output_token_seconds_count", model="m") == 1


def test_durations_are_told_apart_by_the_size_of_the_prompt() -> None:
    metrics = Metrics()
    for tokens in (1, 999, 1000):
        metrics.observe(settled(usage=Usage(tokens, 1)))
    metrics.observe(settled(outcome=Outcome.TIMEOUT, attempts=1))
    metrics.observe(settled(outcome=Outcome.REJECTED))
    name, sizes = "tidegate_request_duration_seconds_count", ("short", "long", "unknown", "refused")
    assert [value(metrics, name, model="m", prompt_size=size) for size in sizes] == [2, 1, 1, 1]


def test_a_failover_is_a_request_that_went_to_another_replica() -> None:
    metrics = Metrics()
    twice = (Attempt("pool", "pool-0", "cold", 10.0, code="upstream_disconnected"), Attempt("pool", "pool-0", "", 10.1))
    for fields, outcome in (
        (failed_over(), Outcome.COMPLETED),
        (failed_over(), Outcome.UPSTREAM_ERROR),
        ({**failed_over(), "hedged": True}, Outcome.COMPLETED),
        ({"attempts": 2, "tries": twice}, Outcome.COMPLETED),
        ({"attempts": 1, "tries": twice[:1]}, Outcome.UPSTREAM_ERROR),
    ):
        metrics.observe(settled(outcome=outcome, replica="pool-1", **fields))
    assert value(metrics, "tidegate_failovers_total", model="m", result="answered") == 1
    assert value(metrics, "tidegate_failovers_total", model="m", result="failed") == 1


def test_reloads_are_counted_and_the_last_one_is_known() -> None:
    reloads = Reloads()

    def shown() -> dict[str, float]:
        return {
            f"{each.name} {each.labels.get('result', '')}".strip(): each.value
            for family in reloads.families()
            for each in family.samples
        }

    assert shown()["tidegate_config_last_reload_successful"] == 1
    began = shown()["tidegate_config_in_force_since_timestamp_seconds"]
    reloads.refused()
    assert shown()["tidegate_config_last_reload_successful"] == 0
    assert shown()["tidegate_config_in_force_since_timestamp_seconds"] == began
    reloads.applied()
    after = shown()
    assert (after["tidegate_config_reloads_total applied"], after["tidegate_config_reloads_total refused"]) == (1, 1)
    assert after["tidegate_config_last_reload_successful"] == 1
    assert after["tidegate_config_in_force_since_timestamp_seconds"] >= began


def test_the_capacity_of_a_replica_is_shown_as_far_as_it_is_known() -> None:
    known, half = [Replica(name, "pool", "http://x", "openai") for name in ("known", "half")]
    known.meter.state(8, 4096)
    half.meter.state(None, 4096)
    shown = {family.name: family for family in replica_families([known, half, Replica("r", "p", "http://x", "")], 0.0)}
    requests = shown["tidegate_replica_capacity_requests"].samples
    tokens = shown["tidegate_replica_capacity_tokens"].samples
    assert [(each.labels["replica"], each.value) for each in requests] == [("known", 8)]
    assert [(each.labels["replica"], each.value) for each in tokens] == [("known", 4096), ("half", 4096)]


def test_time_to_first_content_is_only_counted_where_there_was_content() -> None:
    metrics = Metrics()
    metrics.observe(settled(first_content_at=10.3))
    metrics.observe(settled(outcome=Outcome.UPSTREAM_ERROR))
    assert value(metrics, "tidegate_ttft_seconds_count", model="m") == 1
    assert value(metrics, "tidegate_ttft_seconds_bucket", model="m", le="0.25") == 0
    assert value(metrics, "tidegate_ttft_seconds_bucket", model="m", le="0.5") == 1
    assert value(metrics, "tidegate_request_duration_seconds_count", model="m", prompt_size="unknown") == 2


@given(st.lists(st.floats(0, 1000), max_size=40))
def test_a_histogram_counts_each_value_once_in_cumulative_buckets(seen: list[float]) -> None:
    histogram = Histogram(TTFT_BUCKETS_S)
    for each in seen:
        histogram.observe(each)
    *finite, last = histogram.buckets()
    assert last[0] == "+Inf"
    assert last[1] == len(seen)
    for bound, count in finite:
        assert count == sum(each <= float(bound) for each in seen)
    assert histogram.total == pytest.approx(sum(seen))


def test_the_exposition_can_be_read_back() -> None:
    class Fixed(Collector):
        def collect(self) -> list[Metric]:
            return everything()

    registry = CollectorRegistry()
    registry.register(Fixed())
    read = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert {family.name for family in read} == {family.name for family in everything()}


def test_names_begin_with_tidegate_or_process_and_carry_their_unit() -> None:
    for family in everything():
        assert family.name.startswith(("tidegate_", "process_"))
        assert family.documentation.endswith(".")
        assert not re.search(r"_(ms|millis|mb|kb)\b", family.name)


def test_every_metric_and_label_in_the_source_is_on_the_page_and_the_other_way_round() -> None:
    text = PAGE.read_text()
    files = [path for path in (ROOT / "gateway").rglob("*.py") if "database" not in path.parts]  # names of tables
    source = "".join([path.read_text() for path in files])
    suffixed = {family.name + ("_total" if family.type == "counter" else "") for family in everything()}
    named = {name for name in NAME.findall(source) if name not in {family.name for family in everything()}} | suffixed
    documented = set(re.findall(r"^\| `((?:tidegate|process)_\w+)`", text, re.MULTILINE))
    assert documented == named
    for family in everything():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{family.name}"))
        for label in {label for sample in family.samples for label in sample.labels} - {"le"}:
            assert f"`{label}`" in row, f"{family.name}: {label}"


def test_every_outcome_is_on_the_page() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert set(Outcome) <= documented


async def test_what_clients_type_never_becomes_a_label() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        for number in range(20):
            body = {**CHAT, "model": f"made-up-{number}"}
            assert (await ask(gateway, body, "/v1/chat/completions", f"x-tidegate-region: r{number}")).status == 404
        assert (await ask(gateway, b"nonsense")).status == 400
        await ask(gateway, CHAT, "/v1/made/up")
        await ask(gateway, CHAT)
        await gateway.settled(22)
        samples = [sample for family in gateway.runtime.metrics.families() for sample in family.samples]
    found = {name: {sample.labels[name] for sample in samples if name in sample.labels} for name in ("model", "route")}
    assert found == {"model": {UNKNOWN_MODEL, "m"}, "route": {"/v1/chat/completions"}}


async def test_an_alias_counts_as_its_model() -> None:
    models = {"m": {"backend": "pool", "aliases": ["other"]}}
    async with FakeEngine() as engine, serving(settings_for([engine.url], models=models)) as gateway:
        await ask(gateway, {**CHAT, "model": "other"})
        await gateway.settled()
        labels = {"model": "m", "route": "/v1/chat/completions", "outcome": "completed"}
        assert value(gateway.runtime.metrics, "tidegate_requests_total", **labels) == 1


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_requests_refused_before_they_are_read_are_counted_by_status(edge: str) -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        for head, status in (
            (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 404 "),
            (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 405 "),
            (b"GET /v1/models HTTP/1.1\r\n\r\n", b" 400 "),
        ):
            reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
            writer.write(head)
            assert status in await reader.readline()
            writer.close()
        for code in ("404", "405", "400"):
            assert value(gateway.runtime.metrics, "tidegate_refused_total", status=code) == 1
        assert value(gateway.runtime.metrics, "tidegate_refused_total", status="503") is None
