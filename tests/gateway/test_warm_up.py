"""A replica that joins a pool at work reads what is most used before its first request."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import msgspec
import pytest

from gateway.config import Settings
from gateway.state import LocalSource
from gateway.store.memory import MemoryStore
from gateway.warmup.hot_prompts import HotPrompts
from gateway.warmup.warmer import short
from gateway.watch import notes
from gateway.watch.watcher import Watcher
from loadtests.engine import FakeEngine
from loadtests.pacing import Pace, Speed
from routing.types import Replica
from tests.gateway.test_workers import client, workers_until
from tests.gateway.watch.test_watcher import until
from tests.support.command import serve_process, write_config
from tests.support.serving import Serving, serving, settings_for

__all__ = ["client"]  # the fixture

FAST = {"probe_interval_s": 0.1, "load_interval_s": 0.1, "slow_start_s": 0}
SYSTEM = "The keeper of the gate counts every ship, names its flag, and writes down the hour of the tide. " * 40


def chat(question: str, system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"model": "m", "messages": messages, "max_tokens": 4, **more}


def paced(speed: Speed | None = None) -> FakeEngine:
    """An engine with a prefix cache, which is quick."""
    engine = FakeEngine(models=("m",))
    engine.pace = Pace(speed or Speed(prefill_us=1.0, token_ms=0.1, base_ms=0.1))
    engine.reports = {"/server_info": lambda: {"version": "0.5.23", "enable_cache_report": True}, "/ready": dict}
    return engine


def configured(urls: list[str], warm_up: dict[str, Any] | None = None, **backend: Any) -> Settings:
    pool = {"engine": "sglang", "health": FAST, "warm_up": warm_up or {}, **backend}
    return settings_for(urls, backend=pool)


class Gateway:
    """A gateway with its watch, to which replicas can be added."""

    def __init__(self, serving: Serving, watcher: Watcher, client: httpx2.AsyncClient) -> None:
        self.serving = serving
        self.runtime = serving.runtime
        self._watcher = watcher
        self._client = client

    def reload(self, settings: Settings) -> None:
        self.runtime.reload(settings)
        self._watcher.refresh()

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return self.runtime.fleet.pools["pool"].replicas

    async def ask(self, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        answer = await self._client.post(f"{self.serving.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return {"replica": answer.headers["x-tidegate-replica"], **told["usage"]}

    async def work(self, count: int, first: int = 0, **more: Any) -> None:
        for number in range(first, first + count):
            await self.ask(chat(f"question {number}", **more))

    def outcomes(self) -> dict[tuple[str, str], int]:
        return dict(self.runtime.warmer.requests)


@asynccontextmanager
async def at_work(settings: Settings, client: httpx2.AsyncClient) -> AsyncIterator[Gateway]:
    async with serving(settings, own_policies=True) as served:
        watcher = Watcher(served.runtime, Random(7))
        watcher.start()
        try:
            yield Gateway(served, watcher, client)
        finally:
            await watcher.aclose()


def cached(answer: dict[str, Any]) -> int:
    return int(answer["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("prefixes", [8, 0])
async def test_the_first_request_at_a_new_replica_finds_the_common_prompt_there(
    client: httpx2.AsyncClient, prefixes: int
) -> None:
    async with paced() as old, paced() as new:
        before = configured([old.url], {"prefixes": prefixes, "adapters": 0})
        async with at_work(before, client) as gateway:
            await gateway.work(12)
            gateway.reload(configured([old.url, new.url], {"prefixes": prefixes, "adapters": 0}))
            _, joined = gateway.replicas
            assert joined.unavailable_reason(0.0) is not None
            await until(lambda: joined.unavailable_reason(time.monotonic()) is None)
            gateway.replicas[0].draining = True
            answer = await gateway.ask(chat("something else"))
            assert answer["replica"] == "pool-1"
            assert (cached(answer) > 800) == (prefixes > 0)
            assert len(new.requests) == (2 if prefixes else 1)
            assert len(gateway.serving.records) == 13  # what it was warmed with is nobody's request


async def test_what_is_sent_is_a_clients_prompt_with_one_token_to_answer(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new, at_work(configured([old.url]), client) as gateway:
        tools = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
        await gateway.work(12, stream=False, tools=tools, n=1, temperature=0.5)
        gateway.reload(configured([old.url, new.url]))
        await until(lambda: gateway.outcomes() == {("pool", "answered"): 1})
        sent = json.loads((await new.received(1)).body)
        assert sent["messages"][0] == {"role": "system", "content": SYSTEM}
        assert (sent["max_tokens"], sent["stream"], sent["tools"]) == (1, False, tools)
        assert "n" not in sent
        page = "".join(
            f"{sample.name} {sample.value}"
            for family in await LocalSource(gateway.runtime).metrics()
            for sample in family.samples
        )
        assert "tidegate_warm_up_requests_total 1" in page


async def test_routing_knows_what_it_has_read(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new, at_work(configured([old.url]), client) as gateway:
        await gateway.work(12)
        gateway.reload(configured([old.url, new.url]))
        joined = gateway.replicas[1]
        await until(lambda: joined.unavailable_reason(time.monotonic()) is None)
        gateway.replicas[0].draining = True
        await gateway.ask(chat("what now"))
        record = (await gateway.serving.settled(13))[-1]
        assert (record.replica, record.predicted_cached_tokens > 500) == ("pool-1", True)


async def test_it_gets_no_request_before_it_is_warm(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new, at_work(configured([old.url]), client) as gateway:
        await gateway.work(12)
        new.pace = Pace(Speed(prefill_us=500.0, base_ms=500.0))
        gateway.reload(configured([old.url, new.url]))
        joined = gateway.replicas[1]
        during = 0
        while True:
            answer = await gateway.ask(chat(f"meanwhile {during}"))
            if joined.unavailable_reason(time.monotonic()) is None:  # perhaps since before this answer
                break
            assert answer["replica"] == "pool-0"
            during += 1
        assert during > 3
        assert json.loads(new.requests[0].body)["max_tokens"] == 1
        assert len(new.requests) <= 2


async def test_an_engine_that_refuses_is_used_all_the_same(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new, at_work(configured([old.url]), client) as gateway:
        await gateway.work(12)
        new.queue.append(new.script.updated({"status": 500}))
        gateway.reload(configured([old.url, new.url]))
        joined = gateway.replicas[1]
        await until(lambda: joined.unavailable_reason(time.monotonic()) is None)
        assert gateway.outcomes() == {("pool", "refused"): 1}


async def test_one_that_hangs_is_given_work_when_the_time_is_over(client: httpx2.AsyncClient) -> None:
    warm_up = {"within_s": 1}
    async with paced() as old, paced() as new, at_work(configured([old.url], warm_up), client) as gateway:
        await gateway.work(12)
        new.queue.append(new.script.updated({"hang": True}))
        gateway.reload(configured([old.url, new.url], warm_up))
        joined = gateway.replicas[1]
        await until(lambda: joined.unavailable_reason(time.monotonic()) is None)
        await until(lambda: gateway.outcomes() == {("pool", "failed"): 1})


async def several_applications(gateway: Gateway) -> None:
    for name in ("ferry", "pilot", "crane", "quay", "light"):
        await gateway.work(6, system=f"You answer for the {name}, in its own words. " * 40)


async def test_one_that_answers_nonsense_is_left_alone_after_two(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new, at_work(configured([old.url]), client) as gateway:
        await several_applications(gateway)
        new.script = new.script.updated({"raw": "nonsense\r\n\r\n"})
        gateway.reload(configured([old.url, new.url]))
        await until(lambda: gateway.replicas[1].unavailable_reason(time.monotonic()) is None)
        assert gateway.outcomes() == {("pool", "failed"): 2}


async def test_a_llamacpp_reads_no_more_prompts_than_it_has_slots(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new:
        replicas = [{"url": each.url, "max_in_flight": 2} for each in (old, new)]
        async with at_work(configured([], engine="llamacpp", replicas=replicas[:1]), client) as gateway:
            await several_applications(gateway)
            gateway.reload(configured([], engine="llamacpp", replicas=replicas))
            await until(lambda: gateway.replicas[1].unavailable_reason(time.monotonic()) is None)
            assert gateway.outcomes() == {("pool", "answered"): 2}


async def test_prompts_bound_to_a_region_stay_in_it(client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as abroad, paced() as near:
        urls = [
            {"url": old.url, "region": "eu"},
            {"url": abroad.url, "region": "us"},
            {"url": near.url, "region": "eu"},
        ]
        async with at_work(configured([], replicas=urls[:1]), client) as gateway:
            for number in range(12):
                await gateway.ask(chat(f"secret {number}"), **{"x-tidegate-region": "eu"})
            gateway.reload(configured([], replicas=urls))
            now = time.monotonic
            await until(lambda: all(each.unavailable_reason(now()) is None for each in gateway.replicas))
            assert (len(abroad.requests), len(near.requests)) == (0, 1)


async def test_a_restarted_engine_is_warmed_again(client: httpx2.AsyncClient) -> None:
    async with paced() as first, paced() as second, at_work(configured([first.url, second.url]), client) as gateway:
        await until(lambda: all(each.epoch for each in gateway.replicas))
        await gateway.work(24)
        await until(lambda: gateway.serving.runtime.in_flight == 0)
        replica = gateway.replicas[1]
        info = gateway.runtime.fleet.pools["pool"].upstreams[replica].info
        assert info is not None
        count = len(second.requests)
        # What a worker reads in the store when the engine has come back.
        note = notes.InfoNote(info, "another life")
        await gateway.runtime.store.post(notes.key(notes.INFO, replica), msgspec.json.encode(note))
        await until(lambda: len(second.requests) > count)
        assert json.loads(second.requests[-1].body)["max_tokens"] == 1
        await until(lambda: replica.unavailable_reason(time.monotonic()) is None)


async def test_at_a_start_nothing_is_held_back(client: httpx2.AsyncClient) -> None:
    async with paced() as first, paced() as second, at_work(configured([first.url, second.url]), client) as gateway:
        now = time.monotonic()
        assert [each.unavailable_reason(now) for each in gateway.replicas] == [None, None]


async def test_without_prefixes_nothing_is_kept(client: httpx2.AsyncClient) -> None:
    async with paced() as engine, at_work(configured([engine.url], {"prefixes": 0}), client) as gateway:
        await gateway.work(12)
        hot = gateway.runtime.fleet.models["m"].hot
        assert hot is not None
        assert hot.held == (0, 0)
        gateway.reload(configured([engine.url], {"prefixes": 8}))
        await gateway.work(48, first=12)
        assert hot.held[0] > 0
        gateway.reload(configured([engine.url], {"prefixes": 0}))
        assert hot.held == (0, 0)
        gateway.reload(configured([engine.url], {"prefixes": 0, "adapters": 0}))
        assert gateway.runtime.fleet.models["m"].hot is None


async def test_the_most_used_adapters_are_loaded_first(client: httpx2.AsyncClient) -> None:
    adapters = [{"name": name, "path": f"/adapters/{name}"} for name in ("a", "b", "c")]
    more = {"adapters": adapters, "adapters_load": "on_demand"}
    warm_up = {"adapters": 1}
    async with paced() as old, paced() as new:
        old.adapters, new.adapters = {}, {}
        for engine in (old, new):
            reports = engine.reports["/server_info"]
            engine.reports["/server_info"] = lambda reports=reports: {**reports(), "enable_lora": True}  # type: ignore[misc]
        async with at_work(configured([old.url], warm_up, **more), client) as gateway:
            await until(lambda: gateway.replicas[0].adapters is not None)
            for name, count in (("a", 3), ("b", 6)):
                for number in range(count):
                    await gateway.ask(chat(f"{name} {number}", model=f"m:{name}"))
            gateway.reload(configured([old.url, new.url], warm_up, **more))
            joined = gateway.replicas[1]
            await until(lambda: joined.unavailable_reason(time.monotonic()) is None)
            assert set(new.adapters) == {"b"}
            read = [json.loads(each.body) for each in new.requests]
            assert [each["model"] for each in read] == ["m:b"]


async def test_one_worker_warms_it_and_all_use_it_under_load(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with paced() as old, paced() as new:
        before, after = ({"pool": shape([{"url": each.url} for each in several])} for several in ([old], [old, new]))
        async with serve_process(tmp_path, [], "--workers", "2", backends=before) as gateway:
            url = await gateway.url()
            failed: list[int] = []

            async def keep_asking() -> None:
                number = 0
                while True:
                    number += 1
                    answer = await client.post(f"{url}/v1/chat/completions", json=chat(f"question {number}"))
                    failed.extend([answer.status_code] if answer.status_code != 200 else [])

            load = [asyncio.create_task(keep_asking()) for _ in range(4)]
            try:
                await until(lambda: len(old.requests) > 60, within_s=30)
                write_config(gateway.config, [], backends=after)
                gateway.signal(signal.SIGHUP)
                await workers_until(gateway, client, lambda found: all(all_used(each) for each in found))
                await until(lambda: len(new.requests) > 10, within_s=30)
            finally:
                for task in load:
                    task.cancel()
                await asyncio.gather(*load, return_exceptions=True)
            assert failed == []
            bounds = [json.loads(each.body)["max_tokens"] for each in new.requests]
            assert (bounds[0], bounds.count(1)) == (1, 1)


def shape(replicas: list[dict[str, Any]]) -> dict[str, Any]:
    return {"engine": "sglang", "replicas": replicas, "health": FAST}


def all_used(worker: dict[str, Any]) -> bool:
    replicas = worker["pools"][0]["replicas"]
    return len(replicas) == 2 and all(each["available"] for each in replicas)


def test_a_shortened_request_has_the_same_prompt() -> None:
    asked = chat("q", stream=True, stream_options={"include_usage": True}, n=3, max_completion_tokens=900, min_tokens=5)
    asked |= {"echo": True, "prompt_logprobs": 20}  # the prompt once more, and a list for each of its tokens
    fields = short("/v1/chat/completions", json.dumps(asked).encode(), "vllm").fields
    assert fields == {"model": "m", "messages": asked["messages"], "stream": False, "max_tokens": 1}


def test_an_idle_count_costs_one_subtraction_and_chance_decides_who_is_counted() -> None:
    hot = HotPrompts(Random(1))
    order: Any = type("Order", (), {})()
    order.request = type("Request", (), {"adapter": "a", "prefix": None})()
    for _ in range(10_000):
        hot.note(order, "t")
    [counted] = hot.adapters(time.monotonic()).values()
    assert 300 < counted < 1200  # each of the first, and then about one in 32


async def test_orders_about_replicas_that_are_gone_are_forgotten() -> None:
    store = MemoryStore()
    gone, stays = (Replica(name, "pool", f"http://{name}", "sglang") for name in ("gone", "stays"))
    for replica in (gone, stays):
        await store.post(notes.key(notes.DRAIN, replica), b"{}")
        await store.post(notes.key(notes.CORDON, replica), b"{}")
        await store.post(notes.key(notes.INFO, replica), b"{}")
    await notes.forget_orders(store, [gone])
    held = {fact.key for fact in (await store.read_since("")).changes if fact.value is not None}
    assert held == {
        *(notes.key(kind, stays) for kind in (notes.DRAIN, notes.CORDON, notes.INFO)),
        notes.key(notes.INFO, gone),
    }
