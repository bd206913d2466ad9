"""Who waits for a full pool, and what they see of it, through a whole gateway in front of a fake engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.errors import Draining
from gateway.order import CHAT
from gateway.record import Outcome
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import OTHER, admitting, bearer, body, keyed, static
from tests.support.client import connect, post, until
from tests.support.http import ask, streaming
from tests.support.serving import Serving, settings_for


def one_place(url: str, queue: dict[str, Any] | None = None, places: int = 1, **sections: Any) -> Settings:
    """One replica that takes so many requests at once."""
    backend = {"replicas": [{"url": url, "max_in_flight": places}], "queue": queue or {}}
    return settings_for([url], backend=backend, **sections)


async def in_line(gate: Serving, count: int) -> None:
    await until(lambda: gate.runtime.gate.waiting == count)


async def test_a_request_waits_for_a_place_and_its_reply_says_so() -> None:
    async with FakeEngine(ttft_s=0.2) as engine, admitting(one_place(engine.url)) as gate:
        first, second = await asyncio.gather(ask(gate, body()), ask(gate, body()))
        assert [first.status, second.status] == [200, 200]
        waits_ms = sorted(int(reply.headers["x-tidegate-queue-ms"]) for reply in (first, second))
        assert waits_ms[0] < 100 <= waits_ms[1]
        waited = max((first, second), key=lambda reply: int(reply.headers["x-tidegate-queue-ms"]))
        assert waited.headers["x-tidegate-queue-position"] == "0"
        assert max(record.queue_s for record in gate.records) >= 0.1


async def test_never_more_than_the_places_run_and_all_are_served() -> None:
    async with FakeEngine(ttft_s=0.02) as engine, admitting(one_place(engine.url, places=3)) as gate:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, engine.running)
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        replies = await asyncio.gather(*(ask(gate, body()) for _ in range(40)))
        watching.cancel()
        assert {reply.status for reply in replies} == {200}
        assert most == 3
        assert not gate.runtime.gate.visits


async def test_a_stream_that_waits_is_kept_open_and_goes_on_with_its_answer() -> None:
    async with (
        FakeEngine(hang=True) as engine,
        admitting(one_place(engine.url, stream={"hold_s": 0.1, "heartbeat_s": 0.1})) as gate,
        connect(gate.host, gate.port) as holder,
    ):
        await holder.send(post(CHAT, body()))
        await engine.received(1)
        engine.script = FakeEngine(chunks=2).script
        async with streaming(gate, body(stream=True)) as stream:
            assert stream.status == 200
            assert stream.headers["x-tidegate-queue-position"] == "0"
            await stream.until(b": ping\n\n: ping\n\n")
            assert len(engine.requests) == 1
            holder.leave("reset")
            text = await stream.rest()
        assert text.endswith(b"data: [DONE]\n\n")
        assert (await gate.settled(2))[-1].outcome is Outcome.COMPLETED


async def test_a_client_that_leaves_the_line_makes_room_in_it() -> None:
    async with (
        FakeEngine(hang=True) as engine,
        admitting(one_place(engine.url, {"max_waiting": 1})) as gate,
        connect(gate.host, gate.port) as holder,
    ):
        await holder.send(post(CHAT, body()))
        await engine.received(1)
        async with connect(gate.host, gate.port) as waiter:
            await waiter.send(post(CHAT, body()))
            await in_line(gate, 1)
            refused = await ask(gate, body())
            assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            waiter.leave("reset")
        await in_line(gate, 0)
        assert len(engine.requests) == 1
        engine.script = FakeEngine().script
        waiting = asyncio.create_task(ask(gate, body()))
        await in_line(gate, 1)
        holder.leave("reset")
        assert (await waiting).status == 200


async def test_waiting_ends_with_a_quarter_of_the_deadline() -> None:
    async with (
        FakeEngine(hang=True) as engine,
        admitting(one_place(engine.url)) as gate,
        connect(gate.host, gate.port) as holder,
    ):
        await holder.send(post(CHAT, body()))
        await engine.received(1)
        begun = asyncio.get_running_loop().time()
        refused = await ask(gate, body(), CHAT, "x-tidegate-deadline-ms: 1200")
        took_s = asyncio.get_running_loop().time() - begun
        assert (refused.status, refused.json["error"]["code"]) == (503, "queue_timeout")
        assert 0.2 <= took_s < 1.1
        begun = asyncio.get_running_loop().time()
        refused = await ask(gate, body(), CHAT, "x-stainless-read-timeout: 0.8")
        assert refused.json["error"]["code"] == "queue_timeout"
        assert asyncio.get_running_loop().time() - begun < 0.7
        flexible = asyncio.create_task(ask(gate, body(service_tier="flex"), CHAT, "x-tidegate-deadline-ms: 1200"))
        await asyncio.wait([flexible], timeout=0.8)
        assert not flexible.done()
        assert (await flexible).json["error"]["code"] == "queue_timeout"
        assert len(engine.requests) == 1


async def test_what_cannot_be_in_time_is_refused_at_once_with_the_prediction() -> None:
    async with FakeEngine(ttft_s=0.3) as engine, admitting(one_place(engine.url)) as gate:
        await asyncio.gather(*(ask(gate, body()) for _ in range(4)))  # from which the pace is known
        line = [asyncio.create_task(ask(gate, body())) for _ in range(6)]
        await in_line(gate, 5)
        refused = await ask(gate, body(), CHAT, "x-tidegate-deadline-ms: 1200")
        assert refused.status == 503
        assert "predicted wait" in refused.json["error"]["message"]
        assert float(refused.headers["retry-after-ms"]) > 1000
        assert {reply.status for reply in await asyncio.gather(*line)} == {200}


async def test_tenants_take_turns_and_one_cannot_fill_the_line(tmp_path: Path) -> None:
    keys = [static(tenant="heavy"), static("b", OTHER, tenant="light")]
    backend = {"queue": {"max_waiting_per_tenant": 10}}
    async with FakeEngine(ttft_s=0.05) as engine:
        backend["replicas"] = [{"url": engine.url, "max_in_flight": 1}]  # type: ignore[assignment]
        settings = keyed(
            tmp_path, [engine.url], *keys, backend=backend, tenants={"heavy": {"weight": 1}, "light": {"weight": 1}}
        )
        async with admitting(settings) as gate:
            heavy = [asyncio.create_task(ask(gate, body(max_tokens=10), CHAT, bearer())) for _ in range(11)]
            await in_line(gate, 10)
            refused = await ask(gate, body(max_tokens=10), CHAT, bearer())
            assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
            light = await ask(gate, body(max_tokens=10), CHAT, bearer(OTHER))
            assert light.status == 200
            assert sum(task.done() for task in heavy) <= 5  # it did not wait for those that came before
            assert {reply.status for reply in await asyncio.gather(*heavy)} == {200}


async def test_long_prompts_wait_for_the_cache_though_there_are_places() -> None:
    async with FakeEngine(hang=True) as engine:
        settings = one_place(engine.url, {"max_tokens": 1000}, places=8)
        async with admitting(settings) as gate, connect(gate.host, gate.port) as holder:
            await holder.send(post(CHAT, body(max_tokens=900)))
            await engine.received(1)
            engine.script = FakeEngine().script
            waiting = asyncio.create_task(ask(gate, body(max_tokens=900)))
            await in_line(gate, 1)
            assert len(engine.requests) == 1
            holder.leave("reset")
            assert (await waiting).status == 200


async def test_shutdown_ends_the_waiting() -> None:
    async with (
        FakeEngine(hang=True) as engine,
        admitting(one_place(engine.url)) as gate,
        connect(gate.host, gate.port) as holder,
    ):
        await holder.send(post(CHAT, body()))
        await engine.received(1)
        waiting = asyncio.create_task(ask(gate, body()))
        await in_line(gate, 1)
        gate.runtime.interrupt_all(Draining("This gateway is shutting down.", retry_after_s=1.0))
        assert (await waiting).json["error"]["code"] == "gateway_draining"


async def test_the_class_goes_to_the_engine_and_a_request_can_only_lower_it(tmp_path: Path) -> None:
    keys = [static(**{"class": "batch"}), static("b", OTHER, **{"class": "critical"})]
    async with FakeEngine() as engine:
        settings = keyed(tmp_path, [engine.url], *keys, engine="vllm")
        async with admitting(settings) as gate:
            for headers in ((bearer(),), (bearer(), "x-tidegate-class: critical"), (bearer(OTHER),)):
                assert (await ask(gate, body(), CHAT, *headers)).status == 200
            assert [json.loads(request.body).get("priority") for request in engine.requests] == [1, 1, -1]
            assert [record.priority_class for record in await gate.settled(3)] == ["batch", "batch", "critical"]
            refused = await ask(gate, body(), CHAT, bearer(), "x-tidegate-class: first")
            assert (refused.status, refused.json["error"]["param"]) == (400, "x-tidegate-class")


async def test_a_key_that_ends_while_its_request_waits_opens_nothing(tmp_path: Path) -> None:
    async with FakeEngine(hang=True) as engine:
        backend = {"replicas": [{"url": engine.url, "max_in_flight": 1}]}
        settings = keyed(tmp_path, [engine.url], static(), static("b", OTHER), backend=backend)
        async with admitting(settings) as gate, connect(gate.host, gate.port) as holder:
            await holder.send(post(CHAT, body(), bearer(OTHER)))
            await engine.received(1)
            waiting = asyncio.create_task(ask(gate, body(), CHAT, bearer()))
            await in_line(gate, 1)
            gate.runtime.reload(keyed(tmp_path, [engine.url], static("b", OTHER), backend=backend))
            holder.leave("reset")
            refused = await waiting
            assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
            assert len(engine.requests) == 1
            assert not gate.runtime.gate.visits


async def test_a_request_whose_only_region_is_full_keeps_nobody_else_from_a_place() -> None:
    async with FakeEngine(hang=True) as home, FakeEngine() as abroad:
        replicas = [
            {"url": home.url, "region": "eu-west", "max_in_flight": 1},
            {"url": abroad.url, "region": "us-east", "max_in_flight": 1},
        ]
        settings = settings_for([], backend={"replicas": replicas})
        async with admitting(settings) as gate, connect(gate.host, gate.port) as holder:
            await holder.send(post(CHAT, body(), "x-tidegate-region: eu-west"))
            await home.received(1)
            restricted = [asyncio.create_task(ask(gate, body(), CHAT, "x-tidegate-region: eu-west")) for _ in range(3)]
            await until(lambda: len(gate.runtime.gate.visits) == 4)
            for _ in range(5):
                assert (await ask(gate, body(), CHAT, "x-tidegate-region: us-east")).status == 200
            home.script = FakeEngine().script
            holder.leave("reset")
            replies = await asyncio.gather(*restricted)
            assert {reply.status for reply in replies} == {200}
            assert {reply.headers["x-tidegate-region"] for reply in replies} == {"eu-west"}
            assert not gate.runtime.gate.visits
