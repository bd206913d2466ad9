"""Hedged requests whose replicas hang, break or come at once, or whose client leaves: one answer, and one charge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest

from gateway.record import Outcome
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT, read_reply
from routing.hedging import Hedges
from routing.types import Replica
from tests.support.client import connect, post, until
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
PLACES = 10
DELAY_S = 0.05
LATE_S = 0.4
"""Long after the delay."""


@dataclass
class Pair:
    """A gateway whose requests all go to the first replica, unless it is late."""

    gateway: Serving
    first: FakeEngine
    second: FakeEngine

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return self.gateway.runtime.fleet.pools["pool"].replicas

    @property
    def hedges(self) -> Hedges:
        hedges = self.gateway.runtime.fleet.models["m"].hedges
        assert hedges is not None
        return hedges

    @property
    def asked(self) -> tuple[int, int]:
        return len(self.first.requests), len(self.second.requests)

    def teach(self, ttft_s: float = 0.001) -> None:
        """As if prompts of all lengths had been answered so quickly lately."""
        for _ in range(128):
            for power in range(14):
                self.hedges.note(2**power, ttft_s)

    async def at_rest(self) -> None:
        """Every place is free again, but the one that keeps requests from the second replica."""
        await until(lambda: [each.in_flight for each in self.replicas] == [0, 1], 10.0)


@asynccontextmanager
async def pair(
    first: Behaviour | None = None,
    second: Behaviour | None = None,
    *,
    edge: str = "protocol",
    engine: str = "openai",
    places: int = PLACES,
    hedge: dict[str, Any] | None = None,
    **more: Any,
) -> AsyncIterator[Pair]:
    hedge = {"share": 0.5, "min_delay_ms": DELAY_S * 1000, **(hedge or {})}
    async with FakeEngine(first or Behaviour(chunks=2)) as one, FakeEngine(second or Behaviour(chunks=3)) as two:
        settings = settings_for(
            [],
            edge=edge,
            models={"m": {"backend": "pool", "price": {"input": 1.0, "output": 1.0}, "hedge": hedge}},
            backends={
                "pool": {
                    "engine": engine,
                    "replicas": [{"url": each.url, "max_in_flight": places} for each in (one, two)],
                    "queue": {"enabled": False},
                }
            },
            **more,
        )
        async with serving(settings) as gateway:
            found = Pair(gateway, one, two)
            found.replicas[1].in_flight += 1
            found.teach()
            yield found


@EDGES
@pytest.mark.parametrize("hanging", [Behaviour(hang=True), Behaviour(role_only_then_hang=True)])
async def test_the_second_answers_for_one_that_hangs_which_is_left_at_once(edge: str, hanging: Behaviour) -> None:
    async with pair(hanging, edge=edge) as both:
        reply = await ask(both.gateway, STREAM)
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-1")
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert reply.body.count(b'"role"') == 1
        assert both.asked == (1, 1)
        async with asyncio.timeout(10.0):
            await both.first.requests[0].gone.wait()
        await both.at_rest()


async def test_it_is_charged_once_for_the_answer_that_the_client_got() -> None:
    async with pair(Behaviour(hang=True), Behaviour(chunks=3, prompt_tokens=100, cached_tokens=0)) as both:
        await ask(both.gateway, STREAM)
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica, record.attempts) == (Outcome.COMPLETED, "pool-1", 2)
        assert record.usage is not None
        assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (100, 3)
        assert record.cost_usd == pytest.approx(103 / 1e6)
        assert record.hedged
        assert record.ttft_s is not None
        assert record.ttft_s >= DELAY_S


async def test_the_first_wins_when_it_is_quicker_after_all() -> None:
    async with pair(Behaviour(chunks=2, ttft_s=LATE_S), Behaviour(hang=True)) as both:
        reply = await ask(both.gateway, STREAM)
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-0")
        async with asyncio.timeout(10.0):
            await both.second.requests[0].gone.wait()
        (record,) = await both.gateway.settled()
        assert (record.replica, record.usage.completion_tokens if record.usage else 0) == ("pool-0", 2)
        await both.at_rest()


async def test_the_engine_of_the_loser_is_told_to_stop() -> None:
    async with pair(Behaviour(role_only_then_hang=True), engine="sglang") as both:
        assert (await ask(both.gateway, STREAM)).status == 200
        async with asyncio.timeout(10.0):
            await both.first.until(lambda: bool(both.first.aborted_rids))
        assert both.second.aborted_rids == []


async def test_of_two_that_come_at_the_same_time_one_is_passed_on_whole() -> None:
    rng = Random(5)
    async with pair(places=1000) as both:

        def near(body: bytes, behaviour: Behaviour, at: float) -> Behaviour:
            return replace(behaviour, ttft_s=rng.uniform(0.0, 0.01))

        def late(body: bytes, behaviour: Behaviour, at: float) -> Behaviour:
            return replace(behaviour, ttft_s=rng.uniform(DELAY_S, DELAY_S + 0.015))

        both.first.pace, both.second.pace = late, near
        for _ in range(30):
            both.teach()
            reply = await ask(both.gateway, STREAM)
            expected = 2 if reply.headers["x-tidegate-replica"] == "pool-0" else 3
            assert reply.body.count(b'"content"') == expected + reply.body.count(b'"role"')
            assert reply.body.count(b'"role"') <= 1
            assert reply.body.count(b"data: [DONE]") == 1
        records = await both.gateway.settled(30)
        assert all(each.outcome is Outcome.COMPLETED for each in records)
        assert any(each.hedged for each in records)
        await both.at_rest()


async def test_no_more_than_the_share_is_sent_twice_by_a_thousand_requests() -> None:
    """About one in thirty is late; two in a hundred, and what was saved up, may be sent again."""
    rng = Random(1)

    def pace(body: bytes, behaviour: Behaviour, at: float) -> Behaviour:
        return replace(behaviour, ttft_s=0.3 if rng.random() < 0.035 else 0.0)

    async with pair(hedge={"share": 0.02, "min_delay_ms": 100}, places=1000) as both:
        both.first.pace = pace
        while both.hedges.may(0.0):
            pass

        async def client() -> None:
            async with connect(both.gateway.host, both.gateway.port) as connection:
                for _ in range(50):
                    await connection.send(post("/v1/chat/completions", STREAM))
                    async with asyncio.timeout(20.0):
                        reply = await read_reply(connection.reader)
                    assert reply.status == 200

        await asyncio.gather(*(client() for _ in range(20)))
        records = await both.gateway.settled(1000, 20.0)
        hedged = sum(each.hedged for each in records)
        assert sum(both.asked) == 1000 + hedged
        assert 3 <= hedged <= 20


async def stays_with_the_first(both: Pair, body: dict[str, Any]) -> None:
    """The first is late, and nobody else is asked."""
    both.first.script = replace(both.first.script, ttft_s=LATE_S)
    reply = await ask(both.gateway, body)
    assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-0")
    assert both.asked[1] == 0
    assert not (await both.gateway.settled())[-1].hedged


async def test_a_busy_pool_is_not_made_busier() -> None:
    async with pair() as both:
        for each in both.replicas:
            each.max_in_flight = None  # what it takes is known all the same
        both.replicas[1].in_flight += 8
        both.replicas[0].in_flight += 5  # 15 of 20 with the request itself
        await stays_with_the_first(both, STREAM)
        both.replicas[1].in_flight -= 2
        reply = await ask(both.gateway, STREAM)
        assert (reply.headers["x-tidegate-replica"], both.asked[1]) == ("pool-1", 1)


async def test_a_pool_of_which_nobody_knows_how_much_it_takes_is_not_hedged() -> None:
    async with pair() as both:
        for each in both.replicas:
            each.max_in_flight = None
            each.meter.configure(None, None)
        await stays_with_the_first(both, STREAM)


async def test_long_prompts_are_not_sent_twice() -> None:
    async with pair(hedge={"max_prompt_tokens": 200}) as both:
        await stays_with_the_first(both, {**STREAM, "messages": [{"role": "user", "content": "long " * 400}]})


async def test_an_answer_that_comes_whole_is_not_asked_for_twice() -> None:
    async with pair() as both:
        await stays_with_the_first(both, CHAT)


async def test_a_rented_replica_is_never_the_second() -> None:
    async with pair() as both:
        both.replicas[1].hosted = True
        await stays_with_the_first(both, STREAM)


async def test_without_credit_nothing_is_sent() -> None:
    async with pair() as both:
        while both.hedges.may(0.0):
            pass
        await stays_with_the_first(both, STREAM)


async def test_a_replica_that_may_not_have_the_request_is_not_asked() -> None:
    async with pair() as both:
        both.replicas[1].draining = True
        await stays_with_the_first(both, STREAM)


async def test_a_reload_keeps_what_was_learned_and_goes_by_the_new_settings() -> None:
    async with pair() as both:
        before = both.hedges
        settings = both.gateway.runtime.settings
        model = settings.models["m"]
        assert model.hedge is not None
        slower = model.hedge.model_copy(update={"min_delay_ms": 700.0})
        models = {"m": model.model_copy(update={"hedge": slower})}
        both.gateway.runtime.reload(settings.model_copy(update={"models": models}))
        assert both.hedges is before
        assert before.delay_s(100) == 0.7


@EDGES
async def test_a_client_that_leaves_closes_both(edge: str) -> None:
    async with pair(Behaviour(hang=True), Behaviour(hang=True), edge=edge) as both:
        asking = asyncio.create_task(ask(both.gateway, STREAM))
        one, two = await both.first.received(1), await both.second.received(1)
        asking.cancel()
        async with asyncio.timeout(10.0):
            await one.gone.wait()
            await two.gone.wait()
        (record,) = await both.gateway.settled()
        assert record.outcome is Outcome.CLIENT_LEFT
        await both.at_rest()


@EDGES
async def test_when_the_first_breaks_the_second_which_is_under_way_answers(edge: str) -> None:
    async with pair(Behaviour(role_only_then_hang=True), Behaviour(chunks=3, ttft_s=LATE_S), edge=edge) as both:
        asking = asyncio.create_task(ask(both.gateway, STREAM))
        await both.second.received(1)
        both.first.drop_connections()
        reply = await asking
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-1")
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert both.asked == (1, 1)
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.COMPLETED, "pool-1")
        await both.at_rest()


async def test_when_the_second_breaks_the_first_answers_as_if_nothing_had_been() -> None:
    async with pair(Behaviour(chunks=2, ttft_s=LATE_S), Behaviour(status=500)) as both:
        reply = await ask(both.gateway, STREAM)
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-0")
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert both.asked == (1, 1)
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.COMPLETED, "pool-0")
        await both.at_rest()


@EDGES
async def test_when_both_break_there_is_one_error(edge: str) -> None:
    async with pair(Behaviour(hang=True), Behaviour(hang=True), edge=edge) as both:
        asking = asyncio.create_task(ask(both.gateway, STREAM))
        await both.second.received(1)
        both.first.script = both.second.script = Behaviour(status=500)
        both.first.drop_connections()
        both.second.drop_connections()
        reply = await asking
        assert reply.status in (502, 503)
        assert reply.body.count(b'"error"') == 1
        assert all(asked <= 2 for asked in both.asked)
        (record,) = await both.gateway.settled()
        assert record.outcome in (Outcome.UPSTREAM_ERROR, Outcome.UNAVAILABLE)
        await both.at_rest()


async def test_a_stream_that_was_opened_with_comments_is_won_too() -> None:
    opened = {"hold_s": 0.1, "heartbeat_s": 0.1}
    async with pair(Behaviour(hang=True), hedge={"min_delay_ms": 400}, stream=opened) as both:
        async with streaming(both.gateway, STREAM) as stream:
            await stream.until(b": ping")
            await stream.rest()
        assert stream.body.endswith(b"data: [DONE]\n\n")
        assert both.asked == (1, 1)


@pytest.mark.parametrize("cut", [Behaviour(cut_after=1), Behaviour(truncate_after=1)])
async def test_after_content_the_other_is_gone_and_nothing_is_repeated(cut: Behaviour) -> None:
    async with pair(Behaviour(hang=True), cut) as both:
        reply = await ask(both.gateway, STREAM)
        assert reply.status == 200
        assert reply.body.count(b'"error"') == 1
        assert both.asked == (1, 1)
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.replica) == (Outcome.UPSTREAM_INTERRUPTED, "pool-1")
        await both.at_rest()
