"""A request that an operator ends, in every phase: what its client gets, what its engine hears, what is on record."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.inspection.local import Requests
from gateway.inspection.query import Query
from gateway.record import Outcome
from loadtests.engine import FakeEngine
from tests.support.client import PATIENCE_S, until
from tests.support.http import ask, error_of, streaming
from tests.support.serving import Serving, serving, settings_for

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])


async def live(gateway: Serving, phase: str, count: int = 1) -> dict[str, Any]:
    """The only one under way in this phase, once there is one."""
    requests = Requests(gateway.runtime, 0)
    found: list[dict[str, Any]] = []

    def there() -> bool:
        nonlocal found
        found = [row for row in requests.page(Query(live=True))["live"] if row["phase"] == phase]
        return len(found) == count

    await until(there, PATIENCE_S)
    return found[0]


@EDGES
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_one_that_waits_for_its_first_token_gets_a_503(edge: str, body: dict[str, Any]) -> None:
    async with (
        FakeEngine(hang=True) as engine,
        serving(settings_for([engine.url], edge=edge, engine="sglang")) as gateway,
    ):
        asked = asyncio.create_task(ask(gateway, body))
        row = await live(gateway, "waiting_for_first_token")
        assert (row["replica"], row["attempts"], row["tenant"]) == ("pool-0", 1, "default")
        request = await engine.received()
        assert Requests(gateway.runtime, 0).end(row["id"])
        reply = await asked
        assert (reply.status, error_of(reply.body)["code"]) == (503, "ended_by_operator")
        assert reply.headers["x-should-retry"] == "false"
        assert "retry-after" not in reply.headers
        await until(lambda: engine.aborted_rids == [json.loads(request.body)["rid"]], PATIENCE_S)
        (record,) = await gateway.settled()
        assert (record.outcome, record.error_code) == (Outcome.ENDED_BY_OPERATOR, "ended_by_operator")
        assert record.tries[0].code == "ended_by_operator"
        replica = gateway.runtime.fleet.pools["pool"].replicas[0]
        assert replica.in_flight == 0
        assert replica.health.window.failed == 0


@EDGES
async def test_a_stream_ends_with_an_event_and_no_other_replica_goes_on_with_it(edge: str) -> None:
    async with (
        FakeEngine(hang_mid=2) as first,
        FakeEngine(hang_mid=2) as second,
        serving(
            settings_for([first.url, second.url], edge=edge, models={"m": {"backend": "pool", "continuation": True}})
        ) as gateway,
        streaming(gateway, STREAM) as stream,
    ):
        await stream.chunk()
        row = await live(gateway, "streaming")
        assert Requests(gateway.runtime, 0).end(row["id"])
        rest = await stream.rest()
        assert b'"ended_by_operator"' in rest
        assert b"[DONE]" not in rest
        (record,) = await gateway.settled()
        assert (record.outcome, record.attempts, record.content_events) == (Outcome.ENDED_BY_OPERATOR, 1, 2)


async def test_one_that_stands_in_line_never_reaches_an_engine() -> None:
    backend = {"queue": {"max_wait_s": 60}}
    async with (
        FakeEngine(hang=True) as engine,
        serving(settings_for([engine.url], backend=backend)) as gateway,
    ):
        gateway.runtime.fleet.pools["pool"].replicas[0].max_in_flight = 1
        gateway.runtime.fleet.pools["pool"].replicas[0].meter.configure(1, None)
        first = asyncio.create_task(ask(gateway, CHAT))
        await engine.received()
        second = asyncio.create_task(ask(gateway, CHAT))
        row = await live(gateway, "queue")
        assert Requests(gateway.runtime, 0).end(row["id"])
        reply = await second
        assert (reply.status, error_of(reply.body)["code"]) == (503, "ended_by_operator")
        told = Requests(gateway.runtime, 0).one(row["id"])
        assert told is not None
        assert [phase["name"] for phase in told["timeline"]["phases"]][-2:] == ["queue", "decide"]
        assert not first.done()
        assert len(engine.requests) == 1
        row = await live(gateway, "waiting_for_first_token")
        assert Requests(gateway.runtime, 0).end(row["id"])
        await first


async def test_no_other_model_is_asked_instead() -> None:
    async with FakeEngine(hang=True) as engine, FakeEngine() as other:
        settings = settings_for(
            [engine.url],
            models={"m": {"backend": "pool", "fallbacks": [{"model": "n"}]}, "n": {"backend": "other"}},
            backends={
                "pool": {"engine": "openai", "replicas": [{"url": engine.url}]},
                "other": {"engine": "openai", "replicas": [{"url": other.url}]},
            },
        )
        async with serving(settings) as gateway:
            asked = asyncio.create_task(ask(gateway, CHAT))
            row = await live(gateway, "waiting_for_first_token")
            assert Requests(gateway.runtime, 0).end(row["id"])
            assert error_of((await asked).body)["code"] == "ended_by_operator"
            assert other.requests == []


async def test_what_is_over_or_was_never_there_cannot_be_ended() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        await ask(gateway, CHAT)
        (record,) = await gateway.settled()
        requests = Requests(gateway.runtime, 0)
        assert not requests.end(record.request_id)
        assert not requests.end("req_nobody")
        assert requests.one("req_nobody") is None


async def test_one_that_waits_for_a_connection_asks_nobody_else() -> None:
    async with (
        FakeEngine(hang=True) as engine,
        FakeEngine() as other,
        serving(settings_for([engine.url, other.url], backend={"connections": {"max": 1}})) as gateway,
    ):
        replicas = gateway.runtime.fleet.pools["pool"].replicas
        replicas[1].draining = True
        first = asyncio.create_task(ask(gateway, CHAT))
        await engine.received()
        asked = asyncio.create_task(ask(gateway, CHAT))
        row = await live(gateway, "connecting")
        replicas[1].draining = False
        assert Requests(gateway.runtime, 0).end(row["id"])
        assert error_of((await asked).body)["code"] == "ended_by_operator"
        assert other.requests == []
        first.cancel()


async def test_one_that_waits_for_a_replica_of_its_region_is_ended_there() -> None:
    async with FakeEngine(hang=True) as near, FakeEngine() as far:
        backend = {
            "replicas": [
                {"url": near.url, "region": "eu", "max_in_flight": 1},
                {"url": far.url, "region": "us", "max_in_flight": 1},
            ],
            "queue": {"max_wait_s": 60},
        }
        async with serving(settings_for([], backend=backend)) as gateway:
            region = "x-tidegate-region: eu"
            first = asyncio.create_task(ask(gateway, CHAT, "/v1/chat/completions", region))
            await near.received()
            asked = asyncio.create_task(ask(gateway, CHAT, "/v1/chat/completions", region))
            row = await live(gateway, "deciding")
            assert Requests(gateway.runtime, 0).end(row["id"])
            assert error_of((await asked).body)["code"] == "ended_by_operator"
            assert len(near.requests) == 1
            assert far.requests == []
            first.cancel()


async def test_of_many_under_way_the_oldest_are_shown_and_all_are_counted() -> None:
    async with FakeEngine(hang=True) as engine, serving(settings_for([engine.url])) as gateway:
        asked = [asyncio.create_task(ask(gateway, CHAT)) for _ in range(3)]
        await live(gateway, "waiting_for_first_token", 3)
        page = Requests(gateway.runtime, 0).page(Query(live_limit=2))
        assert page["live_total"] == 3
        assert [row["id"] for row in page["live"]] == sorted(gateway.runtime._live)[:2]
        for task in asked:
            task.cancel()
