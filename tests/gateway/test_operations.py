"""Operators' orders on the admin listener: draining replicas, loading adapters; one process and several workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from backends.dialects.protocol import Adapter, AdapterRefused
from backends.side import SideChannelError, Trouble
from gateway.admin.app import admin_app, private_app
from gateway.config import Settings
from gateway.sources import AdapterChange, Refused, RemoteSource, Silent, Source
from gateway.state import LocalSource
from gateway.watch.watcher import Watcher
from loadtests.engine import FakeEngine
from tests.gateway.test_admin import BEARER, TOKEN, served
from tests.gateway.test_workers import CHAT, ask, client, streams_under_way, workers_until
from tests.gateway.watch.engines import Scripted
from tests.gateway.watch.test_watcher import until
from tests.support.command import PATIENCE_S, ServeProcess, serve_process, write_config
from tests.support.serving import Serving, serving, settings_for

FAST = {"probe_interval_s": 0.1, "load_interval_s": 0.1}
DRAIN = "/admin/replicas/pool/pool-{}/drain"
UNDRAIN = "/admin/replicas/pool/pool-{}/undrain"
LOAD = {"pool": "pool", "name": "support", "path": "/adapters/support"}

__all__ = ["client"]  # the fixture


@asynccontextmanager
async def watched(settings: Settings) -> AsyncIterator[tuple[Serving, httpx2.AsyncClient]]:
    """A gateway with its watch, and a client of its admin listener that has the token."""
    async with serving(settings) as gateway:
        watcher = Watcher(gateway.runtime, Random(7))
        watcher.start()
        try:
            app = admin_app([LocalSource(gateway.runtime)], host="127.0.0.1", token=SecretStr(TOKEN))
            async with served(app) as admin:
                admin.headers.update(BEARER)
                yield gateway, admin
        finally:
            await watcher.aclose()


def configured(urls: Sequence[str], **backend: Any) -> Settings:
    return settings_for(urls, backend={"health": FAST, **backend})


@asynccontextmanager
async def engines(count: int, **behaviour: Any) -> AsyncIterator[list[FakeEngine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeEngine(**behaviour)) for _ in range(count)]


# -- draining, in one process


async def test_a_drained_replica_finishes_its_streams_and_gets_nothing_new(client: httpx2.AsyncClient) -> None:
    async with (
        engines(2, chunks=3, hang_mid=2) as (first, second),
        watched(configured([first.url, second.url])) as (gateway, admin),
    ):
        hanging = await streams_under_way(client, gateway.url, 2)
        assert (first.running, second.running) == (1, 1)
        reply = (await admin.post(DRAIN.format(0))).json()
        assert reply == {
            "pool": "pool",
            "replica": "pool-0",
            "draining": True,
            "in_flight": 1,
            "empty": False,
            "silent_workers": [],
        }
        for engine in (first, second):
            engine.script = engine.script.updated({"hang_mid": None})
        await ask(client, gateway.url, 10)
        assert (len(first.requests), len(second.requests)) == (1, 11)
        shown = (await admin.get("/admin/replicas/pool/pool-0")).json()
        assert (shown["in_flight"], shown["empty"], shown["unavailable_reason"]) == (1, False, "draining")
        first.drop_connections()  # the end of its stream
        await asyncio.gather(hanging[0], return_exceptions=True)
        await until(lambda: gateway.runtime.in_flight == 1)
        assert (await admin.get("/admin/replicas/pool/pool-0")).json()["empty"]
        assert (await admin.post(UNDRAIN.format(0))).json()["draining"] is False
        second.drop_connections()
        await asyncio.gather(*hanging, return_exceptions=True)
        await ask(client, gateway.url, 10)
        assert len(first.requests) > 1


async def test_draining_twice_is_as_once() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (_, admin):
        replies = [await admin.post(path.format(0)) for path in (DRAIN, DRAIN, UNDRAIN, UNDRAIN)]
        assert [reply.status_code for reply in replies] == [200] * 4
        assert [reply.json()["draining"] for reply in replies] == [True, True, False, False]


async def test_the_last_replica_is_only_drained_by_force() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (gateway, admin):
        assert (await admin.post(DRAIN.format(1))).status_code == 200
        refused = await admin.post(DRAIN.format(0))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_replica")
        assert "force=true" in refused.json()["error"]["message"]
        assert not gateway.runtime.fleet.pools["pool"].replicas[0].draining
        assert (await admin.post(DRAIN.format(1))).status_code == 200  # which changes nothing
        assert (await admin.post(DRAIN.format(0) + "?force=yes")).status_code == 400
        assert (await admin.post(DRAIN.format(0) + "?force=true")).json()["draining"] is True


async def test_two_drains_at_once_do_not_take_both_halves() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (_, admin):
        replies = await asyncio.gather(admin.post(DRAIN.format(0)), admin.post(DRAIN.format(1)))
        assert sorted(reply.status_code for reply in replies) == [200, 409]


async def test_unknown_names_are_answered_with_the_known() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (_, admin):
        for method, path in [
            ("POST", "/admin/replicas/pool/pool-7/drain"),
            ("POST", "/admin/replicas/pool/pool-7/undrain"),
            ("GET", "/admin/replicas/pool/pool-7"),
            ("DELETE", "/admin/adapters/pool/a?replica=pool-7"),
        ]:
            answer = await admin.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_replica")
            assert "There are: pool-0, pool-1" in answer.json()["error"]["message"]
        for path in ("/admin/replicas/x/pool-0", "/admin/adapters?pool=x"):
            answer = await admin.get(path)
            assert (answer.status_code, "there are: pool" in answer.json()["error"]["message"]) == (404, True)


async def test_the_state_of_replicas_has_what_engines_say() -> None:
    async with FakeEngine() as engine, watched(configured([engine.url], engine="sglang")) as (gateway, admin):
        await until(lambda: gateway.runtime.fleet.pools["pool"].replicas[0].epoch)
        (shown,) = (await admin.get("/admin/replicas")).json()["replicas"]
    assert (shown["pool"], shown["replica"], shown["engine"], shown["url"]) == ("pool", "pool-0", "sglang", engine.url)
    assert shown["info"]["models"] == ["fake-model"]
    assert "load" in shown["lacking"]
    assert (shown["available"], shown["workers"], shown["load"]) == (True, [], None)


async def test_a_store_that_is_away_is_said() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (gateway, admin):
        await gateway.runtime.store.aclose()
        answer = await admin.post(DRAIN.format(0))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")


async def test_orders_reach_a_worker_behind_its_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    uds = str(tmp_path_factory.mktemp("s") / "w.sock")
    async with (
        engines(2) as (first, second),
        watched(configured([first.url, second.url], engine="sglang")) as (
            gateway,
            _,
        ),
    ):
        first.adapters = {}
        async with served(private_app([LocalSource(gateway.runtime)]), uds):
            remote: Source = RemoteSource(0, uds)
            await remote.drain("pool", "pool-0", True)
            await remote.drain("pool", "pool-1", True)  # whoever asks knows whether it is the last
            assert all(each.draining for each in gateway.runtime.fleet.pools["pool"].replicas)
            await remote.drain("pool", "pool-0", False)
            with pytest.raises(Refused, match="no replica 'pool-9'") as refused:
                await remote.drain("pool", "pool-9", True)
            assert (refused.value.status, refused.value.code) == (404, "unknown_replica")
            load = AdapterChange("pool", "team/a", "/a")
            assert [(each.ok, each.status) for each in await remote.change_adapter(load)] == [(True, 200), (False, 501)]
            assert [each.ok for each in await remote.change_adapter(AdapterChange("pool", "b", "/b", "pool-1"))] == [
                False
            ]
            unload = AdapterChange("pool", "team/a", None, "pool-0")
            assert [each.ok for each in await remote.change_adapter(unload)] == [True]
            assert first.adapters == {}
        with pytest.raises(Silent):
            await remote.drain("pool", "pool-0", True)


async def test_without_a_worker_that_answers_nothing_is_ordered(tmp_path_factory: pytest.TempPathFactory) -> None:
    gone = RemoteSource(0, str(tmp_path_factory.mktemp("s") / "none.sock"))
    async with served(private_app([gone])) as admin:
        for answer in (await admin.post(DRAIN.format(0)), await admin.get("/admin/replicas")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker_answers")


# -- adapters, in one process


async def names(client: httpx2.AsyncClient, url: str) -> list[str]:
    return [each["id"] for each in (await client.get(f"{url}/v1/models")).json()["data"]]


async def test_an_adapter_is_loaded_everywhere_and_usable_at_once(client: httpx2.AsyncClient) -> None:
    async with (
        engines(2) as both,
        watched(configured([each.url for each in both], engine="sglang")) as (gateway, admin),
    ):
        for engine in both:
            engine.adapters = {}
        body = {**CHAT, "model": "m:support"}
        assert (await client.post(f"{gateway.url}/v1/chat/completions", json=body)).status_code == 404
        reply = await admin.post("/admin/adapters", json=LOAD)
        assert reply.status_code == 200
        assert reply.json()["ok"]
        assert [(each["replica"], each["ok"], each["changed"]) for each in reply.json()["replicas"]] == [
            ("pool-0", True, True),
            ("pool-1", True, True),
        ]
        assert "m:support" in await names(client, gateway.url)
        assert (await client.post(f"{gateway.url}/v1/chat/completions", json=body)).status_code == 200
        assert [request.json()["model"] for engine in both for request in engine.requests] == ["m:support"]
        (listed,) = (await admin.get("/admin/adapters?pool=pool")).json()["adapters"]
        assert listed == {
            "pool": "pool",
            "name": "support",
            "path": "/adapters/support",
            "replicas": ["pool-0", "pool-1"],
            "configured": False,
        }
        reply = await admin.delete("/admin/adapters/pool/support")
        assert (reply.status_code, reply.json()["ok"], "note" in reply.json()) == (200, True, False)
        assert "m:support" not in await names(client, gateway.url)
        assert (await client.post(f"{gateway.url}/v1/chat/completions", json=body)).status_code == 404
        assert [engine.adapters for engine in both] == [{}, {}]


async def test_an_adapter_at_one_replica_is_served_there(client: httpx2.AsyncClient) -> None:
    async with (
        engines(2) as both,
        watched(configured([each.url for each in both], engine="sglang")) as (gateway, admin),
    ):
        for engine in both:
            engine.adapters = {}
        reply = await admin.post("/admin/adapters", json={**LOAD, "replica": "pool-1"})
        assert [each["replica"] for each in reply.json()["replicas"]] == ["pool-1"]
        await until(lambda: all(each.adapters is not None for each in gateway.runtime.fleet.pools["pool"].replicas))
        for _ in range(6):
            answer = await client.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "model": "m:support"})
            assert answer.status_code == 200
        assert (len(both[0].requests), len(both[1].requests)) == (0, 6)


async def test_loading_twice_at_once_and_again_loads_once() -> None:
    async with FakeEngine() as engine, watched(configured([engine.url], engine="sglang")) as (_, admin):
        engine.adapters, engine.adapter_delay_s = {}, 0.1
        replies = await asyncio.gather(*(admin.post("/admin/adapters", json=LOAD) for _ in range(3)))
        assert [reply.json()["ok"] for reply in replies] == [True] * 3
        assert sorted(reply.json()["replicas"][0]["changed"] for reply in replies) == [False, False, True]
        assert sum(each.path == "/load_lora_adapter" for each in engine.probes) == 1
        other = (await admin.post("/admin/adapters", json={**LOAD, "path": "/elsewhere"})).json()
        assert other["replicas"][0]["reason"] == (
            "it holds another adapter of that name, from /adapters/support; unload that first"
        )


async def test_what_somebody_else_loaded_meanwhile_counts_as_loaded() -> None:
    """Two gateways may be told the same: the engine's refusal is no failure then."""
    async with (
        FakeEngine() as engine,
        watched(configured([engine.url], engine="sglang")) as (_, one),
        watched(configured([engine.url], engine="sglang")) as (_, other),
    ):
        engine.adapters, engine.adapter_delay_s = {}, 0.2
        replies = await asyncio.gather(*(admin.post("/admin/adapters", json=LOAD) for admin in (one, other)))
        assert [reply.json()["ok"] for reply in replies] == [True, True]
        assert sorted(reply.json()["replicas"][0]["changed"] for reply in replies) == [False, True]
        replies = await asyncio.gather(*(admin.delete("/admin/adapters/pool/support") for admin in (one, other)))
        assert sorted(reply.status_code for reply in replies) in ([200, 200], [200, 404])
        assert engine.adapters == {}


async def test_an_adapter_is_loaded_under_load(client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine(chunks=20, interval_s=0.02) as engine,
        watched(configured([engine.url], engine="sglang")) as (gateway, admin),
    ):
        engine.adapters, engine.adapter_delay_s = {}, 0.2
        tasks = await streams_under_way(client, gateway.url, 20)
        assert (await admin.post("/admin/adapters", json=LOAD)).json()["ok"]
        assert all(answer.endswith("data: [DONE]\n\n") for answer in await asyncio.gather(*tasks))


async def test_refusals_are_told_by_replica() -> None:
    async with engines(2) as both, watched(configured([each.url for each in both], engine="sglang")) as (_, admin):
        both[0].adapters = {}
        partly = await admin.post("/admin/adapters", json=LOAD)
        assert (partly.status_code, partly.json()["ok"]) == (200, False)
        assert [(each["ok"], each["status"]) for each in partly.json()["replicas"]] == [(True, 200), (False, 501)]
        assert "has no /load_lora_adapter" in partly.json()["replicas"][1]["reason"]
        none = await admin.post("/admin/adapters", json={**LOAD, "replica": "pool-1"})
        assert (none.status_code, none.json()["error"]["code"]) == (501, "adapter_unchanged")
        missing = await admin.post("/admin/adapters", json={**LOAD, "name": "other", "path": "/missing/one"})
        assert missing.status_code == 409  # what one refuses is graver than what the other cannot
        assert [each["status"] for each in missing.json()["replicas"]] == [409, 501]
        assert "pool-0: /missing/one does not exist" in missing.json()["error"]["message"]
        await both[1].stop()
        away = await admin.post("/admin/adapters", json={**LOAD, "replica": "pool-1"})
        assert (away.status_code, away.json()["replicas"][0]["status"]) == (502, 502)
        unknown = await admin.delete("/admin/adapters/pool/suport?replica=pool-0")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_adapter")
        assert "did you mean support?" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**LOAD, "name": "a:b"}, "name"),
        ({**LOAD, "name": ""}, "name"),
        ({**LOAD, "path": ""}, "path"),
        ({**LOAD, "path": "a\nb"}, "path"),
        ({**LOAD, "path": None}, "path"),
        ({"pool": "pool", "name": "a"}, None),
        ({**LOAD, "paths": "x"}, None),
        ([], None),
    ],
)
async def test_an_order_that_cannot_be_meant_is_refused(body: Any, param: str | None) -> None:
    async with served(private_app([])) as admin:
        answer = await admin.post("/admin/adapters", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await admin.post("/admin/adapters", content=b"x" * 70_000)).status_code == 413


async def test_removing_what_the_configuration_lists_says_that_it_comes_back() -> None:
    settings = configured(["http://127.0.0.1:1"], adapters=[{"name": "support", "path": "/adapters/support"}])
    async with serving(settings) as gateway:
        engine = _Dropping(held=[])
        for upstream in gateway.runtime.fleet.upstreams():
            upstream.dialect = engine
        async with served(private_app([LocalSource(gateway.runtime)])) as admin:
            assert (await admin.post("/admin/adapters", json=LOAD)).json()["ok"]
            reply = await admin.delete("/admin/adapters/pool/support")
        assert "configuration lists it" in reply.json()["note"]


class _Dropping(Scripted):
    async def unload_adapter(self, side: Any, name: str) -> None:
        assert self.held is not None
        if name not in {each.name for each in self.held}:
            raise AdapterRefused(f"{name} is not loaded")
        self.held = [each for each in self.held if each.name != name]


class _Silent(Scripted):
    def __init__(self) -> None:
        super().__init__(held=[])
        self.given_up = asyncio.Event()

    async def unload_adapter(self, side: Any, name: str) -> None:
        await self.given_up.wait()
        raise SideChannelError(Trouble.TIMEOUT, "it did not answer within 120 s")


async def test_no_request_is_sent_for_an_adapter_that_is_being_dropped() -> None:
    """Workers forget it first; if the engine then does not answer, the watch finds out what is true."""
    async with watched(configured(["http://127.0.0.1:1"])) as (gateway, admin):
        engine = _Silent()
        (upstream,) = gateway.runtime.fleet.upstreams()
        upstream.dialect = engine
        await admin.post("/admin/adapters", json=LOAD)
        await until(lambda: gateway.runtime.fleet.route("m:support"))
        answer = asyncio.create_task(admin.delete("/admin/adapters/pool/support"))
        await until(lambda: gateway.runtime.fleet.route("m:support") is None)
        upstream.holds((Adapter("support"),))  # as the watch may find it meanwhile
        assert gateway.runtime.fleet.route("m:support") is None
        engine.given_up.set()
        assert (await answer).status_code == 502


# -- several workers


async def order(gateway: ServeProcess, client: httpx2.AsyncClient, method: str, path: str, body: Any = None) -> Any:
    url = await gateway.admin_url() + path
    return (await client.request(method, url, json=body, headers={"authorization": f"Bearer {gateway.token}"})).json()


BY_LOAD = {"m": {"backend": "pool", "policy": "least_outstanding"}}
"""All prompts here are alike: the default policy may well keep them where they are cached."""


def _draining(workers: list[dict[str, Any]]) -> list[bool | None]:
    return [worker["pools"][0]["replicas"][0]["draining"] if worker["up"] else None for worker in workers]


async def test_all_workers_drain_a_replica_and_go_on_with_it(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        engines(2, chunks=15, interval_s=0.1) as (first, second),
        serve_process(tmp_path, [first.url, second.url], "--workers", "3", models=BY_LOAD) as gateway,
    ):
        url = await gateway.url()
        tasks = await streams_under_way(client, url, 12)
        running = first.running
        assert running > 0
        reply = await order(gateway, client, "POST", DRAIN.format(0))
        assert (reply["draining"], reply["empty"], reply["silent_workers"]) == (True, False, [])
        assert reply["in_flight"] == first.running
        before = len(first.requests)
        await asyncio.gather(*await streams_under_way(client, url, 12))
        assert len(first.requests) == before
        answers = await asyncio.gather(*tasks)
        assert all(answer.endswith("data: [DONE]\n\n") and '"error"' not in answer for answer in answers)
        shown = await order(gateway, client, "GET", "/admin/replicas/pool/pool-0")
        assert (shown["in_flight"], shown["empty"]) == (0, True)
        refused = await order(gateway, client, "POST", DRAIN.format(1))
        assert refused["error"]["code"] == "last_replica"
        assert (await order(gateway, client, "POST", UNDRAIN.format(0)))["draining"] is False
        await asyncio.gather(*await streams_under_way(client, url, 12))
        assert len(first.requests) > before


async def test_a_drain_outlasts_a_reload_and_a_worker(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        engines(2) as (first, second),
        serve_process(tmp_path, [first.url, second.url], "--workers", "3") as gateway,
    ):
        url = await gateway.url()
        await order(gateway, client, "POST", DRAIN.format(0))
        write_config(gateway.config, [first.url, second.url], models={"m": {"backend": "pool", "aliases": ["new"]}})
        gateway.signal(signal.SIGHUP)
        workers = await workers_until(
            gateway, client, lambda found: all(worker["models"]["m"]["aliases"] == ["new"] for worker in found)
        )
        workers = await workers_until(gateway, client, lambda found: _draining(found) == [True] * 3)
        os.kill(workers[1]["pid"], signal.SIGKILL)
        await gateway.logged("worker 1 .* starting another")
        await workers_until(gateway, client, lambda found: _draining(found) == [True] * 3)
        await ask(client, url, 30)
        assert len(first.requests) == 0
        assert len(second.requests) == 30


async def test_a_worker_that_hangs_keeps_a_replica_from_counting_as_empty(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    async with (
        engines(2) as (first, second),
        serve_process(tmp_path, [first.url, second.url], "--workers", "2") as gateway,
    ):
        await gateway.url()
        pid = int((await gateway.fleet(client))[0]["pid"])
        os.kill(pid, signal.SIGSTOP)
        reply = await order(gateway, client, "POST", DRAIN.format(0))
        assert (reply["draining"], reply["empty"], reply["silent_workers"]) == (True, False, [0])
        os.kill(pid, signal.SIGCONT)
        await workers_until(gateway, client, lambda found: _draining(found) == [True, True])
        assert (await order(gateway, client, "GET", "/admin/replicas/pool/pool-0"))["empty"]


async def test_all_workers_serve_an_adapter_loaded_at_run_time(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine:
        engine.adapters, engine.adapter_delay_s = {}, 1.5  # longer than a worker has to answer a scrape
        pool = {"engine": "sglang", "replicas": [{"url": engine.url}]}
        async with serve_process(tmp_path, [], "--workers", "3", backends={"pool": pool}) as gateway:
            url = await gateway.url()
            reply = await order(gateway, client, "POST", "/admin/adapters", LOAD)
            assert reply["ok"], reply
            body = {**CHAT, "model": "m:support"}
            async with asyncio.timeout(PATIENCE_S):
                answers = await asyncio.gather(
                    *(client.post(f"{url}/v1/chat/completions", json=body) for _ in range(20))
                )
            assert [answer.status_code for answer in answers] == [200] * 20
            reply = await order(gateway, client, "DELETE", "/admin/adapters/pool/support")
            assert reply["ok"], reply
            answers = await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=body) for _ in range(20)))
            assert [answer.status_code for answer in answers] == [404] * 20
