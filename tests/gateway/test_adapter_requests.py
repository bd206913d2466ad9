"""Requests for LoRA adapters: how they may be asked for, who may, and that they are loaded where they are sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from backends.ticker import Ticker
from gateway.config import Settings
from gateway.errors import GatewayError, InvalidRequest
from gateway.fleet import Fleet, build_fleet
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.keys.records import KeyRecord
from gateway.order import CHAT as CHAT_PATH
from gateway.order import Call, Order, read_order
from gateway.watch.watcher import Watcher
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.gateway.test_operations import engines
from tests.gateway.watch.test_watcher import FAST, until
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
FILES = [{"name": name, "path": f"/adapters/{name}"} for name in ("a", "b", "c")]


# -- names


def fleet(**more: Any) -> Fleet:
    engine = {"engine": "sglang", "replicas": [{"url": "http://127.0.0.1:1"}], "adapters": FILES}
    other = {"engine": "vllm", "replicas": [{"url": "http://127.0.0.1:2"}], "adapters": [*FILES[1:2]]}
    models = {
        "m": {"backend": "pool", "aliases": ["alias"]},
        "large": {"backend": "other"},
        "support": {"backend": "pool", "upstream_model": "m", "adapter": "a"},
        **more,
    }
    return build_fleet(settings_for([], models=models, backends={"pool": engine, "other": other}), Ticker(), 0.0)


def order(fields: dict[str, Any], known: Fleet | None = None, **key: Any) -> Order:
    caller = Principal(KeyRecord("key_1", b"", "acme", **key) if key else None, ANONYMOUS)
    body = json.dumps({"messages": [], **fields}).encode()
    return read_order(Call(CHAT_PATH, [], body, 0.0), known or fleet(), "req_1", caller)


def asked(fields: dict[str, Any], **key: Any) -> tuple[str, str | None]:
    route = order(fields, **key).route
    return route.model, route.adapter


def refused(fields: dict[str, Any], **key: Any) -> tuple[int, str | None, str | None]:
    with pytest.raises(GatewayError) as caught:
        order(fields, **key)
    return caught.value.status, caught.value.code, caught.value.param


def test_an_adapter_is_asked_for_in_three_ways() -> None:
    assert asked({"model": "m:a"}) == ("m", "a")
    assert asked({"model": "a"}) == ("m", "a")
    assert asked({"model": "m", "lora_path": "a"}) == ("m", "a")
    assert asked({"model": "alias", "lora_path": "a"}) == ("m", "a")
    assert asked({"model": "m:a", "lora_path": "a"}) == ("m", "a")
    assert asked({"model": "support", "lora_path": "a"}) == ("support", "a")
    assert asked({"model": "m", "lora_path": None}) == ("m", None)


def test_a_configured_model_comes_before_an_adapter_of_its_name() -> None:
    known = fleet(a={"backend": "other"})
    assert order({"model": "a"}, known).route.adapter is None
    assert "a" in dict(known.listed())
    assert dict(known.listed())["a"].adapter is None


def test_a_name_that_could_mean_several_is_refused_with_all_of_them() -> None:
    with pytest.raises(InvalidRequest) as caught:
        order({"model": "b"})
    assert (caught.value.status, caught.value.code) == (400, "ambiguous_model")
    assert "m:b, large:b" in caught.value.message


def test_a_name_that_means_several_is_the_one_that_the_key_may_use() -> None:
    assert asked({"model": "b"}, models=("large",)) == ("large", "b")
    assert refused({"model": "b"}, models=("support",)) == (403, "model_not_allowed", "model")


@pytest.mark.parametrize("path", ["/adapters/a", "../a", "", "support", 7, ["a"], {"a": 1}, True])
def test_nothing_but_an_adapters_name_stands_in_lora_path(path: Any) -> None:
    assert refused({"model": "m", "lora_path": path}) == (400, "unknown_adapter", "lora_path")


def test_two_different_adapters_cannot_be_asked_for_at_once() -> None:
    assert refused({"model": "m:a", "lora_path": "b"}) == (400, "unknown_adapter", "lora_path")
    assert refused({"model": "support", "lora_path": "b"}) == (400, "unknown_adapter", "lora_path")


def test_a_key_without_the_adapter_cannot_have_it_in_any_way() -> None:
    for fields in ({"model": "m:a"}, {"model": "a"}, {"model": "m", "lora_path": "a"}):
        assert refused(fields, adapters=("c",)) == (403, "adapter_not_allowed", "model")
        assert refused(fields, models=("large",)) == (403, "model_not_allowed", "model")
        assert asked(fields, models=("m",), adapters=("a",)) == ("m", "a")
    # Whoever may use a model may use the adapter that its entry names; and unheard-of names tell nothing.
    assert asked({"model": "support"}, adapters=()) == ("support", "a")
    assert refused({"model": "m", "lora_path": "unheard-of"}, adapters=("c",)) == (403, "adapter_not_allowed", "model")


def test_no_name_or_path_of_a_client_is_passed_on() -> None:
    body = order({"model": "m", "lora_path": "a", "x": "/etc/passwd"}).body
    assert json.loads(body.raw)["lora_path"] is None
    assert json.loads(body.with_values({"model": b'"m:a"'})) == {
        "messages": [],
        "model": "m:a",
        "lora_path": None,
        "x": "/etc/passwd",
    }


def test_the_list_has_what_can_be_loaded_under_both_names() -> None:
    known = fleet()
    assert not any(":" in name for name, _ in known.listed())  # nothing is known of the engines yet
    for pool in known.pools.values():
        pool.replicas[0].adapters = frozenset()
    names = {name: (route.model, route.asked_adapter) for name, route in known.listed()}
    assert names == {
        "m": ("m", None),
        "alias": ("m", None),
        "large": ("large", None),
        "support": ("support", None),
        "m:a": ("m", "a"),
        "m:b": ("m", "b"),
        "m:c": ("m", "c"),
        "large:b": ("large", "b"),
        "a": ("m", "a"),
        "c": ("m", "c"),  # and no "b", which could mean two
    }


# -- loading


class Slots(dict[str, str]):
    """An engine's adapters, and how many there ever were at once."""

    most = 0

    def __setitem__(self, name: str, path: str) -> None:
        super().__setitem__(name, path)
        self.most = max(self.most, len(self))


@asynccontextmanager
async def watched(settings: Settings) -> AsyncIterator[Serving]:
    """A gateway with its watch, and with the policies that the settings name."""
    async with serving(settings, own_policies=True) as gateway:
        watcher = Watcher(gateway.runtime, Random(7))
        watcher.start()
        try:
            yield gateway
        finally:
            await watcher.aclose()


@asynccontextmanager
async def pool(count: int, slots: int = 2, **model: Any) -> AsyncIterator[tuple[Serving, Sequence[FakeEngine]]]:
    """Engines with the API of SGLang's adapters, and a gateway whose watch knows of them."""
    async with engines(count) as started:
        for engine in started:
            engine.adapters = Slots()
        backend = {
            "replicas": [{"url": engine.url} for engine in started],
            "adapters": FILES,
            "adapters_load": "on_demand",
            "adapter_slots": slots,
            "health": FAST,
        }
        models = {"m": {"backend": "pool", **model}}
        async with watched(settings_for([], engine="sglang", backend=backend, models=models)) as gateway:
            replicas = gateway.runtime.fleet.pools["pool"].replicas
            await until(lambda: all(each.adapters is not None for each in replicas))
            for replica in replicas:
                replica.speed.adapter_ms = 1.0
            yield gateway, started


def orders(engine: FakeEngine) -> list[str]:
    """What it was told to load and unload, in order."""
    verbs = {"/load_lora_adapter": "load", "/unload_lora_adapter": "unload"}
    return [f"{verbs[each.path]} {json.loads(each.body)['lora_name']}" for each in engine.probes if each.path in verbs]


async def test_an_adapter_is_loaded_where_the_first_request_for_it_goes_and_stays() -> None:
    async with pool(2) as (gateway, (first, second)):
        for name in ("m:a", "a", "m:a"):
            reply = await ask(gateway, {**CHAT, "model": name})
            assert reply.status == 200
        assert sorted(orders(first) + orders(second)) == ["load a"]
        (asked_for,) = [engine for engine in (first, second) if engine.requests]
        assert [json.loads(each.body)["model"] for each in asked_for.requests] == ["m:a"] * 3
        reply = await ask(gateway, {**CHAT, "lora_path": "a"})
        assert json.loads(asked_for.requests[-1].body)["lora_path"] is None


async def test_adapters_take_turns_within_the_slots() -> None:
    async with pool(1) as (gateway, (engine,)):
        for name in "abcabc":
            assert (await ask(gateway, {**CHAT, "model": name})).status == 200
            await asyncio.sleep(0.03)
        assert isinstance(engine.adapters, Slots)
        assert engine.adapters.most == 2
        assert orders(engine)[:3] == ["load a", "load b", "unload a"]


async def test_an_adapter_in_use_stays_while_others_come_and_go() -> None:
    async with pool(1) as (gateway, (engine,)):
        engine.queue.append(Behaviour(chunks=3, hang_mid=2))
        async with streaming(gateway, {**CHAT, "model": "a", "stream": True}) as stream:
            await stream.until(b"content")
            for name in "bcbc":
                assert (await ask(gateway, {**CHAT, "model": name})).status == 200
                await asyncio.sleep(0.03)
        assert "unload a" not in orders(engine)
        assert "unload b" in orders(engine)


async def test_a_request_waits_for_a_slot_that_is_in_use() -> None:
    async with pool(1, slots=1) as (gateway, (engine,)):
        engine.queue.append(Behaviour(chunks=3, hang_mid=2))
        async with streaming(gateway, {**CHAT, "model": "a", "stream": True}) as stream:
            await stream.until(b"content")
            waiting = asyncio.create_task(ask(gateway, {**CHAT, "model": "b"}))
            replica = gateway.runtime.fleet.pools["pool"].replicas[0]
            await until(lambda: "b" in replica.adapter_use)
            assert orders(engine) == ["load a"]
        reply = await asyncio.wait_for(waiting, 20.0)
        assert (reply.status, reply.headers["x-tidegate-route-reason"]) == (200, "adapter_slots")
        assert orders(engine) == ["load a", "unload a", "load b"]


async def test_an_adapter_that_no_engine_loads_is_an_error_without_the_engines_words() -> None:
    async with engines(3) as started:
        for engine in started:
            engine.adapters = {}
        backend = {
            "replicas": [{"url": engine.url} for engine in started],
            "adapters": [{"name": "a", "path": "/missing/a"}],
            "adapters_load": "on_demand",
            "health": FAST,
        }
        async with watched(settings_for([], engine="sglang", backend=backend)) as gateway:
            await until(lambda: gateway.runtime.fleet.pools["pool"].usable_adapters())
            replicas = gateway.runtime.fleet.pools["pool"].replicas
            await until(lambda: all(each.adapters is not None for each in replicas))
            reply = await ask(gateway, {**CHAT, "model": "a"})
            assert (reply.status, error_of(reply.body)["code"]) == (503, "adapter_unavailable")
            assert b"missing" not in reply.body
            assert [orders(engine) for engine in started] == [["load a"]] * 3
            again = await ask(gateway, {**CHAT, "model": "a"})
            assert (again.status, error_of(again.body)["code"]) == (503, "no_replica_available")
            assert [orders(engine) for engine in started] == [["load a"]] * 3
            assert (await ask(gateway, CHAT)).status == 200  # nobody is blamed
            assert not any(each.cooldown.failures for each in replicas)


async def test_an_adapter_that_somebody_has_just_unloaded_is_found_elsewhere() -> None:
    async with (
        engines(2) as (first, second),
        serving(settings_for([first.url, second.url], engine="vllm")) as gateway,
    ):
        replicas = gateway.runtime.fleet.pools["pool"].replicas
        for replica in replicas:
            replica.adapters = frozenset({"a"})
        replicas[1].in_flight += 1
        first.queue.append(Behaviour(status=404))
        reply = await ask(gateway, {**CHAT, "model": "a"})
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-1")
        assert replicas[0].adapters == frozenset()
        first.queue.append(Behaviour(status=404))
        assert (await ask(gateway, CHAT)).status == 404  # of the base model it is the engine's answer


async def test_the_time_of_loading_is_not_taken_for_a_slow_replica() -> None:
    async with engines(1) as (engine,):
        engine.adapters, engine.adapter_delay_s = {}, 1.0
        backend = {
            "replicas": [{"url": engine.url}],
            "adapters": FILES,
            "adapters_load": "on_demand",
            "health": FAST,
        }
        settings = settings_for([], engine="sglang", backend=backend)
        async with serving(settings, own_policies=True) as gateway:
            (replica,) = gateway.runtime.fleet.pools["pool"].replicas
            (upstream,) = gateway.runtime.fleet.upstreams()
            upstream.holds(())
            reply = await ask(gateway, {**CHAT, "model": "a", "stream": True})
            assert reply.status == 200
            await gateway.settled()
            assert 900.0 < replica.speed.adapter_ms < 10_000.0
            assert replica.adapter_use == {}
            seen = gateway.runtime.fleet.pools["pool"].routing.calibration.error(replica)
            assert seen is not None
            assert seen.observed_ms < 900.0


@pytest.mark.parametrize("policy", ["cost", "round_robin"])
async def test_a_hundred_requests_for_three_adapters_load_each_of_them_a_few_times(policy: str) -> None:
    rng = Random(5)
    async with pool(3, slots=1, policy=policy) as (gateway, started):
        for replica, engine in zip(gateway.runtime.fleet.pools["pool"].replicas, started, strict=True):
            replica.speed.adapter_ms = 250.0
            engine.adapter_delay_s = 0.1
        names = rng.choices("abc", (6, 3, 1), k=100)
        for name in names:
            assert (await ask(gateway, {**CHAT, "model": name})).status == 200
        told = [order for engine in started for order in orders(engine)]
        assert len(told) <= 12, told
