"""A model's shadow inside one worker: bounded, off the path of the request, and harmless when it is broken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from random import Random
from typing import Any

import httpx2
import pytest
from prometheus_client.core import Metric

from gateway.config import Settings
from gateway.steering.shadow import merged, shadow_families
from gateway.steering.traffic import MAX_REQUESTS, Traffic, rows_of
from loadtests.engine import FakeEngine
from routing.types import InferenceRequest, Replica, View
from tests.support.serving import Serving, serving, settings_for

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello " * 400}]}


class Broken:
    """A policy of somebody's own with a defect."""

    def __init__(self, rng: Random) -> None:
        pass

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        raise KeyError("no such thing")


def shadowed(url: str, **shadow: Any) -> Settings:
    return settings_for([url], models={"m": {"backend": "pool", "policy": "least_outstanding", "shadow": shadow}})


async def chat(gateway: Serving, count: int) -> None:
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(count):
            answer = await client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
    await gateway.settled(count)


async def test_no_more_than_so_many_a_second_are_asked_about() -> None:
    async with FakeEngine() as engine, serving(shadowed(engine.url, policy="cost", per_s=0.001)) as gateway:
        await chat(gateway, 6)
        shadow = gateway.runtime.fleet.models["m"].shadow
        assert shadow is not None
        assert shadow.numbers.compared <= 1
        assert shadow.numbers.compared + shadow.numbers.passed_over == 6


async def test_a_broken_shadow_is_counted_and_no_request_feels_it(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeEngine() as engine:
        settings = shadowed(engine.url, policy=f"{__name__}:Broken", per_s=1000)
        with caplog.at_level(logging.ERROR):
            async with serving(settings) as gateway:
                await chat(gateway, 5)
                shadow = gateway.runtime.fleet.models["m"].shadow
                assert shadow is not None
                assert (shadow.numbers.failed, shadow.numbers.compared) == (5, 0)
                (replica,) = gateway.runtime.fleet.pools["pool"].replicas
                assert (replica.in_flight, replica.in_flight_bytes, replica.work.queued) == (0, 0, 0)
    assert sum("raised KeyError" in each.message for each in caplog.records) == 1


async def test_a_reload_keeps_what_an_unchanged_shadow_has_counted() -> None:
    async with FakeEngine() as engine, serving(shadowed(engine.url, policy="cost", per_s=1000)) as gateway:
        await chat(gateway, 3)
        runtime = gateway.runtime
        before = runtime.fleet.models["m"].shadow
        assert runtime.fleet.models["m"].router.wants_prefix  # for the shadow's sake
        runtime.reload(shadowed(engine.url, policy="cost", per_s=500))
        assert runtime.fleet.models["m"].shadow is before
        runtime.reload(shadowed(engine.url, policy="ttft", per_s=500))
        after = runtime.fleet.models["m"].shadow
        assert after is not None
        assert after.numbers.compared == 0
        runtime.reload(settings_for([engine.url], models={"m": {"backend": "pool", "policy": "least_outstanding"}}))
        assert runtime.fleet.models["m"].shadow is None
        assert not runtime.fleet.models["m"].router.wants_prefix


async def test_numbers_are_metrics_with_bounded_labels() -> None:
    async with FakeEngine() as engine, serving(shadowed(engine.url, policy="cost", per_s=1000)) as gateway:
        await chat(gateway, 4)
        families: list[Metric] = list(shadow_families(gateway.runtime.fleet))
    assert [each.name for each in families] == [
        "tidegate_shadow_decisions",
        "tidegate_shadow_cached_tokens",
        "tidegate_shadow_predicted_ttft_seconds",
    ]
    decisions = {sample.labels["result"]: sample.value for sample in families[0].samples}
    assert decisions == {"same": 4.0, "other": 0.0, "none": 0.0, "failed": 0.0, "passed_over": 0.0}
    for family in families:
        assert all(set(each.labels) <= {"model", "policy", "result", "choice"} for each in family.samples)


async def test_no_text_of_a_request_is_kept_for_simulations() -> None:
    secret = "a secret that nobody may keep"
    async with FakeEngine() as engine, serving(shadowed(engine.url, policy="cost", per_s=1000)) as gateway:
        async with httpx2.AsyncClient(trust_env=False) as client:
            content = {"model": "m", "messages": [{"role": "user", "content": secret * 50}], "prompt_cache_key": secret}
            await client.post(f"{gateway.url}/v1/chat/completions", json=content)
        await gateway.settled(1)
        (row,) = rows_of(gateway.runtime.traffic.kept, "m", 10)
    assert secret not in repr(row)
    assert row["prefix"]["digests"]
    assert row["output_tokens"] > 0


def test_only_so_many_requests_are_kept() -> None:
    traffic = Traffic()
    for number in range(MAX_REQUESTS + 5):
        traffic.note((float(number), "ab"[number % 2], None, 1, None, 1, 1, None, 1.0, "r"))
    assert sum(traffic.counts().values()) == len(traffic.kept) == MAX_REQUESTS
    assert [row["at"] for row in rows_of(traffic.kept, "a", 3)] == [4096.0, 4098.0, 4100.0]


def test_the_numbers_of_workers_add_up() -> None:
    def state(policy: str, same: int, other: int, began: float) -> dict[str, Any]:
        numbers = {"compared": same + other, "same": same, "other": other, "went": {"r0": same}, "would_go": {}}
        return {"policy": policy, "per_s": 20.0, "began_unix_s": began, "numbers": numbers}

    found = merged([state("cost", 3, 1, 5.0), state("cost", 1, 3, 4.0), state("ttft", 100, 0, 1.0)])
    assert found is not None
    assert (found["policy"], found["agreement"], found["began_unix_s"], found["workers"]) == ("cost", 0.5, 4.0, 2)
    assert found["numbers"]["went"] == {"r0": 4}
    assert found["ttft_ms"] == {"real": 0.0, "shadow": 0.0}
    assert found["cached_share"] == {"real": None, "shadow": None}
    assert merged([]) is None
