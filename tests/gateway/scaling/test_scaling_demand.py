"""What is told of a pool's demand: each request once, wherever it is when it is looked at."""

from __future__ import annotations

import asyncio
import time

import httpx2

from gateway.scaling.combining import PoolView, by_pool
from gateway.scaling.demand import DemandBook
from gateway.scaling.notes import PoolDemand, ReplicaRow
from gateway.scaling.teller import DemandTeller
from gateway.store.protocol import START
from loadtests.engine import FakeEngine
from tests.support.serving import Serving, serving, settings_for

CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
SCALED = {"scaling": {"max": 4}}


async def _ask(client: httpx2.AsyncClient, gateway: Serving) -> int:
    answer = await client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
    return answer.status_code


def _counting(gateway: Serving) -> bool:
    return gateway.runtime.demand is not None


async def test_each_request_counts_once_whether_it_was_seen_under_way_or_not() -> None:
    async with (
        FakeEngine(models=("m",), chunks=8, interval_s=0.04) as engine,
        serving(settings_for(engine.urls, backend=SCALED)) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
    ):
        book = gateway.runtime.demand = DemandBook(gateway.runtime, time.monotonic())
        tasks = []
        looks = []
        for _ in range(12):
            tasks += [asyncio.create_task(_ask(client, gateway)) for _ in range(3)]
            await asyncio.sleep(0.05)
            looks.append(book.told(time.monotonic())["pool"].arrivals)
        assert set(await asyncio.gather(*tasks)) == {200}
        await gateway.settled(36)
        told = book.told(time.monotonic())["pool"]
        assert told.arrivals == 36
        assert told.served == 36
        used = [each.usage for each in gateway.records if each.usage is not None]
        assert told.served_tokens == sum(each.prompt_tokens + each.completion_tokens for each in used) > 0
        assert looks == sorted(looks)
        assert 0 < looks[0] < 36
        assert sum(told.ttfts.values()) == 36
        assert told.replicas[0].in_flight == 0
        assert book.told(time.monotonic())["pool"].arrivals == 36


async def test_those_that_are_refused_for_want_of_room_count_and_those_with_a_fault_of_their_own_do_not() -> None:
    backend = {**SCALED, "queue": {"max_waiting": 1, "max_wait_s": 1, "headroom": 0}}
    async with (
        FakeEngine(models=("m",), chunks=30, interval_s=0.05) as engine,
        serving(
            settings_for([], backend={**backend, "replicas": [{"url": engine.url, "max_in_flight": 1}]})
        ) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
    ):
        book = gateway.runtime.demand = DemandBook(gateway.runtime, time.monotonic())
        statuses = await asyncio.gather(*(_ask(client, gateway) for _ in range(6)))
        bad = await client.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "chat_template": "{{ 1 }}"})
        unknown = await client.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "model": "x"})
        assert (bad.status_code, unknown.status_code) == (400, 404)
        await gateway.settled(8)
        assert 503 in statuses
        told = book.told(time.monotonic())["pool"]
        assert told.arrivals == 6
        assert told.served == statuses.count(200)
        assert told.replicas[0].capacity == 1


async def test_nothing_is_counted_or_told_while_no_pool_has_a_scaling() -> None:
    async with FakeEngine(models=("m",)) as engine, serving(settings_for(engine.urls)) as gateway:
        teller = DemandTeller(gateway.runtime)
        teller.start()
        assert not _counting(gateway)
        await teller.tell()
        assert not [each for each in (await gateway.runtime.store.read_since(START)).changes if "demand" in each.key]
        gateway.runtime.reload(settings_for(engine.urls, backend=SCALED))
        teller.refresh()
        assert _counting(gateway)
        await teller.tell()
        (fact,) = [each for each in (await gateway.runtime.store.read_since(START)).changes if "demand" in each.key]
        assert fact.value is not None
        (note,) = by_pool({fact.key: fact.value})["pool"].values()
        assert [row.name for row in note.replicas] == ["pool-0"]
        await teller.aclose()
        assert not [each for each in (await gateway.runtime.store.read_since(START)).changes if each.value is not None]


def _note(age_s: float, arrivals: int, life: str = "a", **more: object) -> PoolDemand:
    rows = [ReplicaRow("r0", "i0", 2, kv_use=0.5, capacity=8), ReplicaRow("r1", "i1", 1, "draining", True)]
    return PoolDemand(life, age_s, arrivals, **{"replicas": rows, **more})  # type: ignore[arg-type]


def test_rates_are_differences_so_that_reading_often_or_seldom_changes_nothing() -> None:
    view, seldom = PoolView(), PoolView()
    seen = 0.0
    for second in range(0, 60, 2):
        notes = {"w0": _note(second + 1.0, 10 * second), "w1": _note(second + 1.0, 5 * second)}
        for _ in range(3):
            view.read(notes, second)
        found = view.demand(0, 2, second)
        assert found is not None
        seen += found.arrivals_per_s * (1.0 if second == 0 else 2.0)
    assert round(seen) == 15 * 58
    seldom.read({"w0": _note(1.0, 0)}, 0.0)
    seldom.read({"w0": _note(59.0, 580)}, 58.0)
    found = seldom.demand(0, 1, 58.0)
    assert found is not None
    assert found.arrivals_per_s == 10.0


def test_workers_are_added_up_and_what_drains_is_left_out() -> None:
    view = PoolView()
    view.read({"w0": _note(5.0, 10, waiting=3), "w1": _note(5.0, 20, waiting=1, predicted_ttft_ms=50.0)}, 0.0)
    found = view.demand(2, 2, 0.0)
    assert found is not None
    assert (found.arrivals_per_s, found.waiting, found.in_flight) == (6.0, 4, 4)
    assert (found.replicas_ready, found.replicas_starting, found.replicas_unhealthy) == (1, 2, 0)
    assert (found.kv_use, found.capacity_requests, found.predicted_ttft_ms) == (0.5, 8.0, 50.0)
    assert found.complete
    assert not view.replicas["r1"].empty
    assert view.replicas["r1"].in_flight == 2


def test_a_worker_that_began_anew_counts_from_its_start_and_one_that_is_gone_is_missed_for_a_while() -> None:
    view = PoolView()
    view.read({"w0": _note(100.0, 1000)}, 0.0)
    met = view.demand(0, 1, 0.0)
    assert met is not None
    assert met.arrivals_per_s == 0.0  # what came before we looked is nobody's news
    view.read({"w1": _note(4.0, 20, "b")}, 5.0)
    found = view.demand(0, 1, 5.0)
    assert found is not None
    assert (found.arrivals_per_s, found.complete) == (5.0, False)
    view.read({"w1": _note(40.0, 20, "b")}, 41.0)
    later = view.demand(0, 1, 41.0)
    assert later is not None
    assert (later.arrivals_per_s, later.complete) == (0.0, True)
    few = view.demand(0, 2, 41.0)
    assert few is not None
    assert not few.complete
    view.read({}, 42.0)
    assert view.demand(0, 1, 42.0) is None


def test_a_replica_that_is_being_warmed_is_on_its_way_and_not_ill() -> None:
    rows = [ReplicaRow("r0", "i0", 2), ReplicaRow("r1", "i1", 0, "joining"), ReplicaRow("r2", "i2", 0, "warming")]
    view = PoolView()
    view.read(
        {"w0": _note(5.0, 10, replicas=rows), "w1": _note(5.0, 10, replicas=[*rows[:2], ReplicaRow("r2", "i2", 1)])},
        0.0,
    )
    found = view.demand(1, 2, 0.0)
    assert found is not None
    assert (found.replicas_ready, found.replicas_starting, found.replicas_unhealthy) == (
        2,
        2,
        0,
    )  # who warms it uses it last


async def test_a_gateway_whose_pool_sleeps_is_ready_so_that_somebody_can_wake_it_up() -> None:
    launch = {"launch": {"model": "/models/m.gguf"}}
    async with httpx2.AsyncClient(trust_env=False, timeout=20.0) as client:
        for least, status in ((0, 200), (1, 503)):
            backend = {**launch, "scaling": {"max": 2, "min": least, "provider": "local"}}
            async with serving(settings_for([], engine="llamacpp", backend=backend)) as gateway:
                answer = await client.get(f"{gateway.url}/readyz")
                assert (answer.status_code, answer.json()["pools_without_replica"]) == (status, ["pool"])


async def test_a_gateway_all_of_whose_replicas_are_new_is_ready() -> None:
    async with (
        FakeEngine(models=("m",)) as engine,
        serving(settings_for(engine.urls)) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
    ):
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        replica.health.join(time.monotonic(), until_ready=True, warm_s=30.0)
        assert (await client.get(f"{gateway.url}/readyz")).status_code == 200
        assert await _ask(client, gateway) == 200
