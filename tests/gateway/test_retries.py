"""How often a pool is asked again, when it is left alone, and what a client is told when nothing more is tried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT, Reply
from routing.retry_budget import Retries, Ruling
from routing.types import Replica
from tests.support.http import ask, error_of
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
QUEUE_FULL = '{"object":"error","message":"The request queue is full.","type":"ServiceUnavailable","code":503}'


def replicas(gateway: Serving) -> tuple[Replica, ...]:
    return gateway.runtime.fleet.pools["pool"].replicas


def retries(gateway: Serving) -> Retries:
    return gateway.runtime.fleet.pools["pool"].retries


def prefer_first(gateway: Serving) -> None:
    """Have the first replica chosen while it has as little to do as the others."""
    for other in replicas(gateway)[1:]:
        other.in_flight += 1


async def ask_many(gateway: Serving, count: int, body: Any = CHAT, *, at_once: int = 20) -> list[Reply]:
    slots = asyncio.Semaphore(at_once)

    async def one() -> Reply:
        async with slots:
            return await ask(gateway, body)

    return list(await asyncio.gather(*(one() for _ in range(count))))


# -- what goes elsewhere


@EDGES
@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize(
    ("body", "failing"),
    [
        *((CHAT, Behaviour(status=status)) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
        (STREAM, Behaviour(status=409)),
        (STREAM, Behaviour(error_first=True)),
        (STREAM, Behaviour(error_event_after=0)),
        (STREAM, Behaviour(empty_stream=True)),
        (STREAM, Behaviour(cut_after=0)),
        (STREAM, Behaviour(truncate_after=0)),
        (STREAM, Behaviour(role_only_then_hang=True)),
        (STREAM, Behaviour(hang=True)),
        (CHAT, Behaviour(raw="")),
    ],
)
async def test_what_failed_before_content_is_answered_elsewhere(
    edge: str, hosted: bool, body: dict[str, Any], failing: Behaviour
) -> None:
    backend = {"hosted": hosted, "timeouts": {"first_token_s": 0.3}}
    async with (
        FakeEngine(failing) as bad,
        FakeEngine(chunks=2) as good,
        serving(settings_for([bad.url, good.url], edge=edge, backend=backend)) as gateway,
    ):
        prefer_first(gateway)
        reply = await ask(gateway, body)
        assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "2")
        assert b'"error"' not in reply.body
        assert (len(bad.requests), len(good.requests)) == (1, 1)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_what_is_the_requests_fault_is_returned_and_no_mark(status: int) -> None:
    async with FakeEngine(status=status, ports=(0, 0)) as engine, serving(settings_for(engine.urls)) as gateway:
        reply = await ask(gateway, CHAT)
        assert (reply.status, "x-should-retry" in reply.headers) == (status, False)
        assert len(engine.requests) == 1
        assert sum(retries(gateway).counts.values()) == 0


async def test_no_content_in_time_is_tried_elsewhere_once_and_within_the_deadline() -> None:
    backend = {"timeouts": {"first_token_s": 0.3, "total_s": 5.0}}
    async with FakeEngine(hang=True, ports=(0, 0, 0)) as engine:
        async with serving(settings_for(engine.urls, backend=backend)) as gateway:
            reply = await ask(gateway, STREAM)
            assert (reply.status, error_of(reply.body)["code"]) == (504, "first_token_timeout")
            assert reply.headers["x-should-retry"] == "false"
            assert len(engine.requests) == 2
        async with serving(
            settings_for(engine.urls, backend={"timeouts": {"first_token_s": 5, "total_s": 0.3}})
        ) as gateway:
            reply = await ask(gateway, STREAM)
            assert (reply.status, error_of(reply.body)["code"]) == (504, "upstream_timeout")
            assert len(engine.requests) == 3


async def test_as_many_attempts_as_the_settings_say() -> None:
    for attempts, sent in ((1, 1), (2, 2), (3, 3)):
        async with FakeEngine(status=503, error_body=QUEUE_FULL, ports=(0, 0, 0, 0)) as engine:
            backend = {"retries": {"attempts": attempts}}
            async with serving(settings_for(engine.urls, backend=backend)) as gateway:
                reply = await ask(gateway, CHAT)
                assert (reply.status, int(reply.headers["x-tidegate-attempts"])) == (503, sent)
                assert len(engine.requests) == sent


async def test_the_one_address_of_a_hosted_api_is_asked_again_once_unless_others_can_be() -> None:
    async with FakeEngine(raw="") as engine, FakeEngine() as other:
        async with serving(settings_for([engine.url], backend={"hosted": True})) as gateway:
            reply = await ask(gateway, CHAT)
            assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
            assert len(engine.requests) == 2
            engine.queue.append(Behaviour(status=500))
            engine.script = Behaviour()
            assert (await ask(gateway, CHAT)).status == 200
        engine.script = Behaviour(raw="")
        sent = len(engine.requests)
        settings = settings_for(
            [],
            models={"m": {"backend": "pool", "fallbacks": [{"backend": "other"}]}},
            backends={
                "pool": {"engine": "openai", "hosted": True, "replicas": [{"url": engine.url}]},
                "other": {"engine": "openai", "replicas": [{"url": other.url}]},
            },
            backend={"replicas": [{"url": other.url}]},
        )
        async with serving(settings) as gateway:
            assert (await ask(gateway, CHAT)).status == 200
        assert len(engine.requests) == sent + 1


# -- the budget


@pytest.mark.parametrize(
    "failing", [Behaviour(raw=""), Behaviour(status=500), Behaviour(status=503, error_body=QUEUE_FULL)]
)
async def test_a_pool_that_fails_everything_is_not_stormed(failing: Behaviour) -> None:
    async with (
        FakeEngine(failing, ports=(0, 0, 0)) as engine,
        serving(settings_for(engine.urls)) as gateway,
    ):
        began = time.monotonic()
        replies = await ask_many(gateway, 500)
        took_s = time.monotonic() - began
        assert {reply.status for reply in replies} <= {502, 503}
        events = len(engine.urls) * (1 + took_s // 10.0)
        assert 500 < len(engine.requests) <= 500 * 1.1 + 1.0 * (took_s + 10.0) + events * 20
        refused = [reply for reply in replies if reply.headers.get("x-tidegate-attempts") == "1"]
        assert len(refused) > 300
        assert {reply.headers.get("x-should-retry") for reply in refused} == {"false"}
        assert retries(gateway).counts[Ruling.REFUSED] >= len(refused)


async def test_one_bad_replica_does_not_use_up_the_budget_of_the_others() -> None:
    """Its refusals cost nothing, and what is answered elsewhere was no additional work."""
    async with (
        FakeEngine(status=503, error_body=QUEUE_FULL) as busy,
        FakeEngine() as free,
        serving(settings_for([busy.url, free.url], backend={"retries": {"share": 0, "per_s": 0.1}})) as gateway,
    ):
        prefer_first(gateway)
        for body in (CHAT, STREAM):
            assert {(await ask(gateway, body)).status for _ in range(30)} == {200}
        assert len(busy.requests) == 60
        assert retries(gateway).budget.left(time.monotonic()) == 1.0


async def test_slow_replicas_are_not_asked_twice_for_everything() -> None:
    """What timed out may have been worked on: an answer elsewhere does not pay that back."""
    backend = {"timeouts": {"first_token_s": 0.2}, "retries": {"share": 0, "per_s": 0.1}}
    async with (
        FakeEngine(hang=True) as slow,
        FakeEngine(chunks=1) as well,
        serving(settings_for([slow.url, well.url], backend=backend)) as gateway,
    ):
        prefer_first(gateway)
        statuses = [(await ask(gateway, STREAM)).status for _ in range(4)]
        assert statuses == [200, 200, 504, 504], "moved with its replica's first loss, then allowed, then refused"
        assert len(slow.requests) == 4


@EDGES
async def test_requests_that_wait_at_a_replica_that_dies_are_all_answered(edge: str) -> None:
    async with (
        FakeEngine(hang=True) as dying,
        FakeEngine(chunks=2) as well,
        serving(settings_for([dying.url, well.url], edge=edge)) as gateway,
    ):
        replicas(gateway)[1].in_flight += 1000
        waiting = [asyncio.create_task(ask(gateway, body)) for body in (CHAT, STREAM) for _ in range(100)]
        await dying.received(200)
        replicas(gateway)[1].in_flight -= 1000
        await dying.stop()
        replies = await asyncio.gather(*waiting)
        assert {reply.status for reply in replies} == {200}
        assert not [reply for reply in replies if b'"error"' in reply.body]
        assert len(well.requests) == 200
        counts = retries(gateway).counts
        assert (counts[Ruling.MOVED], counts[Ruling.REFUSED]) == (200, 0)
        assert {record.outcome for record in await gateway.settled(200)} == {Outcome.COMPLETED}


async def test_the_openai_client_does_not_try_again_what_was_not_tried_again_here() -> None:
    """Its two retries and three attempts here would be nine sends to a pool that is sick."""
    backend = {"retries": {"share": 0, "per_s": 0}}
    async with (
        FakeEngine(ports=(0, 0)) as engine,
        serving(settings_for(engine.urls, backend=backend)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=2) as client,
    ):
        losses = retries(gateway).losses
        for replica in replicas(gateway):  # their events are over
            assert losses.moves(replica, 0.0, 1, time.monotonic())
        engine.script = Behaviour(raw="")
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(engine.requests) == 1


async def test_the_budget_outlives_a_reload() -> None:
    async with FakeEngine(raw="", ports=(0, 0)) as engine:
        settings = settings_for(engine.urls)
        async with serving(settings) as gateway:
            await ask_many(gateway, 100)
            before = retries(gateway)
            left = before.budget.left(time.monotonic())
            gateway.runtime.reload(settings_for(engine.urls, backend={"retries": {"share": 0.1, "attempts": 2}}))
            assert retries(gateway) is before
            assert before.attempts == 2
            assert before.budget.left(time.monotonic()) == pytest.approx(left, abs=1.0)


# -- Retry-After


async def test_a_server_that_names_a_time_is_left_alone_until_then() -> None:
    async with (
        FakeEngine(status=429, retry_after="1") as limited,
        FakeEngine() as free,
        serving(settings_for([limited.url, free.url])) as gateway,
    ):
        prefer_first(gateway)
        began = time.monotonic()
        assert (await ask(gateway, CHAT)).status == 200
        replicas(gateway)[1].in_flight -= 1
        times: list[float] = []
        while len(limited.requests) == 1 and time.monotonic() < began + 20.0:
            assert {reply.status for reply in await ask_many(gateway, 10)} == {200}
            times.append(time.monotonic() - began)
        assert len(times) > 1
        assert limited.requests[1].received_at - limited.requests[0].received_at >= 1.0


@pytest.mark.parametrize(
    ("hosted", "status", "shown"),
    [(True, 429, 429), (True, 503, 503), (False, 429, 503), (False, 503, 503)],
)
async def test_a_client_is_told_when_the_first_of_them_may_be_asked_again(
    hosted: bool, status: int, shown: int
) -> None:
    backend = {"hosted": hosted, "api_key": "sk-ours"}
    async with (
        FakeEngine(status=status, retry_after="120", ports=(0, 0)) as engine,
        serving(settings_for(engine.urls, backend=backend)) as gateway,
    ):
        first = await ask(gateway, CHAT)
        assert first.status == status
        sent = len(engine.requests)
        assert sent == (1 if (hosted, status) == (True, 429) else 2)
        for body in (CHAT, STREAM):
            then = await ask(gateway, body)
            assert then.status == shown
            assert 115 <= int(then.headers["retry-after"]) <= 146
            assert "rate_limited" in error_of(then.body)["message"]
            assert "x-should-retry" not in then.headers
        assert len(engine.requests) == sent
        assert int(first.headers["retry-after"]) <= 146


async def test_another_model_of_the_same_server_is_not_limited() -> None:
    models = {"m": {"backend": "pool"}, "other": {"backend": "pool"}}
    async with FakeEngine() as engine, serving(settings_for([engine.url], models=models)) as gateway:
        engine.queue.append(Behaviour(status=429, retry_after="60"))
        assert (await ask(gateway, {**CHAT, "model": "m"})).status == 429
        assert (await ask(gateway, {**CHAT, "model": "m"})).status == 503
        assert (await ask(gateway, {**CHAT, "model": "other"})).status == 200
        (replica,) = replicas(gateway)
        assert replica.available(time.monotonic())


@pytest.mark.parametrize("value", ["-1", "soon", "", "nan", "inf", "1_000", "Mon, 99 Foo 2026 99:99:99 GMT", "0"])
async def test_nonsense_pauses_nobody(value: str) -> None:
    async with FakeEngine(status=503, retry_after=value) as engine, serving(settings_for([engine.url])) as gateway:
        for _ in range(3):
            assert (await ask(gateway, CHAT)).status == 503
        assert len(engine.requests) == 3


async def test_an_endless_pause_is_cut() -> None:
    async with FakeEngine(status=503, retry_after="1e9") as engine, serving(settings_for([engine.url])) as gateway:
        await ask(gateway, CHAT)
        now = time.monotonic()
        assert 290 < replicas(gateway)[0].limited_until("m", now) - now <= 300


async def test_an_own_engine_that_names_no_time_is_asked_again() -> None:
    async with FakeEngine(status=429) as engine, serving(settings_for([engine.url])) as gateway:
        for _ in range(5):
            assert (await ask(gateway, CHAT)).status == 429
        assert len(engine.requests) == 5


async def test_a_storm_of_429s_stays_within_the_budget() -> None:
    async with (
        FakeEngine(status=429, retry_after="30", delay_head_s=0.05, ports=(0, 0, 0)) as engine,
        serving(settings_for(engine.urls)) as gateway,
    ):
        statuses: Sequence[int] = [reply.status for reply in await ask_many(gateway, 300, at_once=60)]
        assert set(statuses) <= {429, 503}
        # Only those that were under way before the first of each replica was refused, and as many moved.
        assert len(engine.requests) <= 60 + 3 * 60
        sent = len(engine.requests)
        await ask_many(gateway, 100)
        assert len(engine.requests) == sent
