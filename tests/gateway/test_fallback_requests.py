"""Fallbacks end to end: what the client gets, what the engines are sent, and who is charged for what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger import as_record
from gateway.order import CHAT as CHAT_PATH
from gateway.record import Outcome
from gateway.state import LocalSource
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.gateway.admission.keyed import bearer, keyed, static
from tests.support.client import until
from tests.support.http import ask, error_of, streaming
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
STREAM = {**CHAT, "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
MILLION = 1_000_000


@dataclass
class Three:
    """A gateway whose model m, at `own`, falls back to the model small and then to itself at another pool."""

    gateway: Serving
    own: FakeEngine
    small: FakeEngine
    far: FakeEngine

    @property
    def asked(self) -> tuple[int, int, int]:
        return len(self.own.requests), len(self.small.requests), len(self.far.requests)


def sections(own: FakeEngine, small: FakeEngine, far: FakeEngine, **model: Any) -> dict[str, Any]:
    there = {"backend": "far", "upstream_model": "org/m", "price": {"input": 4.0, "output": 8.0}}
    return {
        "models": {
            "m": {"backend": "pool", "price": {"input": 1.0, "output": 1.0}, "fallbacks": ["small", there], **model},
            "small": {"backend": "small", "price": {"input": 2.0, "output": 2.0}},
        },
        "backends": {
            "pool": {"engine": "openai", "replicas": [{"url": own.url, "max_in_flight": 1}], "queue": {"headroom": 0}},
            "small": {"engine": "openai", "replicas": [{"url": small.url, "region": "us"}]},
            "far": {"engine": "openai", "hosted": True, "replicas": [{"url": far.url, "region": "eu"}]},
        },
    }


@asynccontextmanager
async def three(edge: str = "protocol", **more: Any) -> AsyncIterator[Three]:
    model = more.pop("model", {})
    async with FakeEngine(chunks=2) as own, FakeEngine(chunks=3) as small, FakeEngine(chunks=4) as far:
        made = settings_for([], edge=edge, **sections(own, small, far, **model), **more)
        async with serving(made, own_policies=True) as gateway:
            yield Three(gateway, own, small, far)


async def metric(gateway: Serving, name: str, **labels: str) -> float:
    families = await LocalSource(gateway.runtime).metrics()
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@EDGES
@pytest.mark.parametrize(
    ("body", "failing", "reason"),
    [
        (CHAT, Behaviour(status=500), "failed"),
        (CHAT, Behaviour(status=401), "credential_refused"),
        (CHAT, Behaviour(status=403), "credential_refused"),
        (CHAT, Behaviour(status=429), "rate_limited"),
        (CHAT, Behaviour(raw=""), "failed"),
        (STREAM, Behaviour(status=503), "overloaded"),
        (STREAM, Behaviour(error_first=True), "failed"),
        (STREAM, Behaviour(cut_after=0), "failed"),
        (STREAM, Behaviour(empty_stream=True), "failed"),
    ],
)
async def test_another_model_answers_and_the_reply_says_so(
    edge: str, body: dict[str, Any], failing: Behaviour, reason: str
) -> None:
    async with three(edge) as fleet:
        fleet.own.script = failing
        reply = await ask(fleet.gateway, body)
        assert (reply.status, reply.headers["x-tidegate-model"]) == (200, "small")
        assert reply.headers["x-tidegate-replica"] == "small-0"
        assert b'"error"' not in reply.body
        assert fleet.asked[1:] == (1, 0)
        assert json.loads(fleet.small.requests[0].body)["model"] == "small"
        (record,) = await fleet.gateway.settled()
        assert (record.outcome, record.model, record.fallback_from) == (Outcome.COMPLETED, "small", "m")
        assert as_record(record)["fallback_from"] == "m"
        assert record.attempts == int(reply.headers["x-tidegate-attempts"]) >= 2
        assert record.cost_usd == pytest.approx((256 + 3) * 2.0 / MILLION)
        counted = await metric(fleet.gateway, "tidegate_fallbacks_total", model="m", to="small", reason=reason)
        assert counted == 1


async def test_an_answer_of_the_model_asked_for_says_nothing_of_models() -> None:
    async with three() as fleet:
        reply = await ask(fleet.gateway, CHAT)
        assert "x-tidegate-model" not in reply.headers
        (record,) = await fleet.gateway.settled()
        assert (record.fallback_from, as_record(record)["fallback_from"]) == ("", None)


async def test_the_last_entry_is_the_same_model_elsewhere_at_the_price_there() -> None:
    async with three() as fleet:
        fleet.own.script = fleet.small.script = Behaviour(status=500)
        reply = await ask(fleet.gateway, STREAM)
        assert (reply.status, "x-tidegate-model" in reply.headers) == (200, False)
        assert json.loads(fleet.far.requests[0].body)["model"] == "org/m"
        (record,) = await fleet.gateway.settled()
        assert (record.model, record.fallback_from, record.pool) == ("m", "m", "far")
        assert record.cost_usd == pytest.approx((256 * 4.0 + 4 * 8.0) / MILLION)


async def test_when_nobody_answers_the_client_hears_the_last_one() -> None:
    async with three() as fleet:
        fleet.own.script = fleet.small.script = fleet.far.script = Behaviour(status=500)
        reply = await ask(fleet.gateway, CHAT)
        assert reply.status == 502
        assert all(fleet.asked)
        (record,) = await fleet.gateway.settled()
        assert record.outcome is Outcome.UPSTREAM_ERROR


async def test_where_it_was_tried_last_is_one_place_though_the_fallbacks_have_no_replica() -> None:
    async with three() as fleet:
        fleet.own.script = Behaviour(status=500)
        pools = fleet.gateway.runtime.fleet.pools
        pools["small"].replicas[0].draining = pools["far"].replicas[0].draining = True
        reply = await ask(fleet.gateway, CHAT)
        assert (reply.status, fleet.asked) == (503, (1, 0, 0))
        (record,) = await fleet.gateway.settled()
        assert (record.pool, record.replica) == ("pool", reply.headers["x-tidegate-replica"])
        assert await metric(fleet.gateway, "tidegate_attempts_total", pool="pool") == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_the_clients_own_mistake_is_nobody_elses(status: int) -> None:
    async with three() as fleet:
        fleet.own.script = Behaviour(status=status)
        reply = await ask(fleet.gateway, CHAT)
        assert (reply.status, fleet.asked[1:]) == (status, (0, 0))


async def test_what_fallbacks_refuse_is_not_told_as_the_clients_mistake() -> None:
    async with three() as fleet:
        fleet.own.script = Behaviour(status=503)
        fleet.small.script = fleet.far.script = Behaviour(status=400)
        reply = await ask(fleet.gateway, CHAT)
        assert (reply.status, error_of(reply.body)["code"]) == (503, "upstream_overloaded")
        assert all(fleet.asked)


@EDGES
async def test_a_stream_that_was_opened_with_comments_only_still_moves(edge: str) -> None:
    async with three(edge, stream={"hold_s": 0.1, "heartbeat_s": 0.1}) as fleet:
        fleet.own.script = Behaviour(role_only_then_hang=True)
        async with streaming(fleet.gateway, STREAM) as stream:
            await stream.until(b": ping")
            fleet.own.script = Behaviour(status=500)
            fleet.own.drop_connections()
            await stream.rest()
        assert stream.body.endswith(b"data: [DONE]\n\n")
        assert stream.body.count(b"[DONE]") == 1
        assert b'"error"' not in stream.body
        assert fleet.asked[1:] == (1, 0)
        (record,) = await fleet.gateway.settled()
        assert (record.outcome, record.model, record.status) == (Outcome.COMPLETED, "small", 200)


@EDGES
async def test_when_such_a_stream_finds_nobody_the_error_is_in_it(edge: str) -> None:
    async with three(edge, stream={"hold_s": 0.1, "heartbeat_s": 0.1}) as fleet:
        fleet.own.script = Behaviour(role_only_then_hang=True)
        fleet.small.script = fleet.far.script = Behaviour(status=400)
        async with streaming(fleet.gateway, STREAM) as stream:
            await stream.until(b": ping")
            fleet.own.drop_connections()
            fleet.own.script = Behaviour(status=500)
            await stream.rest()
        assert stream.body.count(b'"error"') == 1
        assert b"[DONE]" not in stream.body
        assert all(fleet.asked)


@EDGES
async def test_after_content_it_is_too_late(edge: str) -> None:
    async with three(edge) as fleet:
        fleet.own.script = Behaviour(cut_after=1)
        reply = await ask(fleet.gateway, STREAM)
        assert b"upstream_disconnected" in reply.body
        assert fleet.asked == (1, 0, 0)


async def test_a_first_token_that_does_not_come_in_time_comes_from_elsewhere() -> None:
    async with three(model={"timeouts": {"first_token_s": 0.3}}) as fleet:
        fleet.own.script = Behaviour(role_only_then_hang=True)
        reply = await ask(fleet.gateway, STREAM)
        assert (reply.status, reply.headers["x-tidegate-model"]) == (200, "small")
        assert await metric(fleet.gateway, "tidegate_fallbacks_total", reason="timeout") == 1


async def test_the_requests_own_deadline_ends_it_wherever_it_is() -> None:
    async with three() as fleet:
        fleet.own.script = Behaviour(status=500)
        fleet.small.script = Behaviour(hang=True)
        reply = await ask(fleet.gateway, CHAT, CHAT_PATH, "x-tidegate-deadline-ms: 500")
        assert (reply.status, fleet.asked[1:]) == (504, (1, 0))


async def test_what_the_queue_refuses_goes_elsewhere() -> None:
    """One runs, and there is time for no wait."""
    async with three() as fleet:
        fleet.own.script = Behaviour(chunks=2, ttft_s=60.0)
        first = asyncio.create_task(ask(fleet.gateway, STREAM))
        await fleet.own.received(1)
        reply = await ask(fleet.gateway, STREAM, CHAT_PATH, "x-tidegate-deadline-ms: 1000")
        assert (reply.status, reply.headers["x-tidegate-model"]) == (200, "small")
        assert await metric(fleet.gateway, "tidegate_fallbacks_total", reason="queue_refused") == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await fleet.gateway.settled(2)
        assert not fleet.gateway.runtime.gate.visits


async def test_no_replica_at_all_is_a_reason_too_and_a_lock_to_a_region_holds() -> None:
    async with three() as fleet:
        pools = fleet.gateway.runtime.fleet.pools
        pools["pool"].replicas[0].draining = True
        reply = await ask(fleet.gateway, CHAT)
        assert reply.headers["x-tidegate-model"] == "small"
        pools["pool"].replicas[0].region = "eu"
        reply = await ask(fleet.gateway, CHAT, CHAT_PATH, "x-tidegate-region: eu")
        assert (reply.status, reply.headers["x-tidegate-region"]) == (200, "eu")
        assert fleet.asked == (0, 1, 1)


async def test_the_other_models_limits_and_price_are_what_counts(tmp_path: Path) -> None:
    """Each model lets through one request a minute; what was reserved for m comes back when small answers."""
    async with FakeEngine(status=500) as own, FakeEngine(chunks=3) as small, FakeEngine(chunks=4) as far:
        given = sections(own, small, far)
        once = {"tenant_limits": {"requests_per_minute": 1}}
        given["models"]["m"] |= {"tenant_limits": {"requests_per_minute": 2}}
        given["models"]["small"] |= once
        async with serving(keyed(tmp_path, [], static(), **given), own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            replies = [await ask(gateway, CHAT, CHAT_PATH, bearer()) for _ in range(2)]
            assert [reply.status for reply in replies] == [200, 200]
            assert [reply.headers.get("x-tidegate-model") for reply in replies] == ["small", None]
            first, second = await gateway.settled(2)
            assert (first.pool, second.pool) == ("small", "far")
            assert not gateway.runtime.gate.visits


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_nothing_that_was_reserved_on_the_way_is_kept(
    tmp_path: Path, store: str, redis_server: RedisServer
) -> None:
    """One request at a time is all that the key may have, wherever it goes: what is left behind would stop the next."""
    async with FakeEngine(status=500) as own, FakeEngine(chunks=3) as small, FakeEngine(chunks=4) as far:
        given = sections(own, small, far)
        given["models"]["small"] |= {"tenant_limits": {"requests_per_minute": 1}}
        given["models"]["m"] |= {"tenant_limits": {"requests_per_minute": 1000}}
        where = {"store": redis_server.url, "redis": {"timeout_ms": 1000}} if store == "redis" else {}
        alone = static(limits={"concurrent_requests": 1, "requests_per_minute": 600})
        async with serving(keyed(tmp_path, [], alone, **where, **given), own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            for count in range(1, 6):
                reply = await ask(gateway, CHAT if count % 2 else STREAM, CHAT_PATH, bearer())
                assert (reply.status, reply.headers["x-tidegate-store"]) == (200, store)
                assert reply.headers["x-tidegate-replica"] == ("small-0" if count == 1 else "far-0")
                await gateway.settled(count)
            assert fleet_asked(own, small, far) == (5, 1, 4)
            assert not gateway.runtime.gate.visits
            assert gateway.runtime.fallbacks._chains == {}


def fleet_asked(*engines: FakeEngine) -> tuple[int, ...]:
    return tuple(len(engine.requests) for engine in engines)


async def test_a_hard_limit_of_the_fallback_is_held_though_the_model_asked_for_has_none(tmp_path: Path) -> None:
    async with FakeEngine(status=500) as own, FakeEngine(chunks=3) as small, FakeEngine(status=500) as far:
        given = sections(own, small, far)
        given["models"]["m"] |= {"tenant_limits": {"requests_per_minute": 100}}
        given["models"]["small"] |= {"tenant_limits": {"output_tokens_per_minute": 60_000, "hard_tokens": True}}
        async with serving(keyed(tmp_path, [], static(), **given), own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            reply = await ask(gateway, CHAT, CHAT_PATH, bearer())
            assert (reply.status, reply.headers["x-tidegate-model"]) == (200, "small")
            assert "max_completion_tokens" in json.loads(small.requests[0].body)
            assert "max_completion_tokens" not in json.loads(own.requests[0].body)


async def test_a_key_never_gets_a_model_that_it_may_not_use(tmp_path: Path) -> None:
    async with FakeEngine(status=500) as own, FakeEngine(chunks=3) as small, FakeEngine(chunks=4) as far:
        settings = keyed(tmp_path, [], static(models=["m"]), **sections(own, small, far))
        async with serving(settings, own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            reply = await ask(gateway, CHAT, CHAT_PATH, bearer())
            assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "far-0")
            assert small.requests == []


@EDGES
async def test_a_client_that_leaves_at_the_fallback_closes_it_too(edge: str) -> None:
    async with three(edge) as fleet:
        fleet.own.script = Behaviour(status=500)
        fleet.small.script = Behaviour(hang=True)
        asking = asyncio.create_task(ask(fleet.gateway, STREAM))
        request = await fleet.small.received(1)
        asking.cancel()
        async with asyncio.timeout(10.0):
            await request.gone.wait()
        (record,) = await fleet.gateway.settled()
        assert (record.outcome, record.model) == (Outcome.CLIENT_LEFT, "small")
        assert fleet.asked[2] == 0
        pools = fleet.gateway.runtime.fleet.pools.values()
        await until(lambda: not any(each.in_flight for pool in pools for each in pool.replicas))


async def test_explaining_names_who_would_be_asked() -> None:
    async with three() as fleet:
        told = await LocalSource(fleet.gateway.runtime).explain(
            json.dumps({"body": CHAT, "headers": {"x-tidegate-region": "eu"}}).encode()
        )
        assert told["fallbacks"] == [
            {"model": "small", "pool": "small", "passed_over": "residency"},
            {"model": "m", "pool": "far", "passed_over": None},
        ]
