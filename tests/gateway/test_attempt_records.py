"""What the record of an exchange keeps of each attempt, however it went."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.record import Attempt, Exchange
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

STREAM = {**CHAT, "stream": True}
TWO: dict[str, Any] = {"models": {"m": {"backend": "pool", "policy": "round_robin"}}}


def in_order(tried: Attempt) -> bool:
    """Its times follow one another; those that are missing stand for what has not happened."""
    times = [tried.begun_at, tried.connected_at, tried.sent_at, tried.first_content_at, tried.ended_at]
    known = [each for each in times if each is not None]
    return known == sorted(known) and tried.ended_at is not None


async def only(gateway: Serving) -> Exchange:
    (record,) = await gateway.settled()
    assert len(record.tries) == record.attempts
    assert all(map(in_order, record.tries))
    return record


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_an_attempt_that_answers_has_all_its_times_and_no_code(body: dict[str, Any]) -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        await ask(gateway, body)
        record = await only(gateway)
    (tried,) = record.tries
    assert (tried.pool, tried.replica, tried.reason, tried.code) == ("pool", "pool-0", record.route_reason, "")
    assert record.failures == []
    assert None not in (tried.connected_at, tried.sent_at)
    assert (tried.first_content_at is not None) == (body is STREAM)
    assert tried.first_content_at == record.first_content_at
    assert record.started_at <= record.read_at <= tried.begun_at
    assert record.finished_at is not None
    assert tried.ended_at is not None
    assert tried.ended_at <= record.finished_at


async def test_one_that_is_not_reached_never_had_a_connection() -> None:
    async with FakeEngine() as engine:
        url = engine.url
    async with serving(settings_for([url])) as gateway:
        await ask(gateway, CHAT)
        record = await only(gateway)
    (tried,) = record.failures
    assert (tried.connected_at, tried.sent_at, tried.code) == (None, None, "upstream_unreachable")


async def test_a_failed_attempt_says_why_and_the_next_one_follows() -> None:
    async with (
        FakeEngine(status=500) as ill,
        FakeEngine() as well,
        serving(settings_for([ill.url, well.url], **TWO)) as gateway,
    ):
        await asyncio.gather(ask(gateway, CHAT), ask(gateway, CHAT))
        records = await gateway.settled(2)
    (record,) = [each for each in records if each.attempts == 2]
    first, second = record.tries
    assert record.failures == [first]
    assert (first.replica, first.code != "", second.replica, second.code) == ("pool-0", True, "pool-1", "")
    assert first.sent_at is not None
    assert first.ended_at is not None
    assert first.ended_at <= second.begun_at


@pytest.mark.parametrize("script", [Behaviour(hang=True), Behaviour(hang_mid=1)], ids=["before", "within"])
async def test_a_client_that_leaves_is_no_failure_of_the_attempt(script: Behaviour) -> None:
    async with FakeEngine(script) as engine, serving(settings_for([engine.url], stream={"hold_s": 0})) as gateway:
        async with streaming(gateway, STREAM) as stream:
            await stream.chunk()
        record = await only(gateway)
    assert [each.code for each in record.tries] == ["client_left"]
    assert record.failures == []


def test_failures_are_in_the_order_of_their_failing() -> None:
    exchange = Exchange("req_1", "/v1/chat/completions", 1.0, 0.0)
    late = Attempt("p", "a", "", 1.0, ended_at=5.0, code="x")
    outrun = Attempt("p", "b", "", 2.0, ended_at=3.0, code="outrun")
    exchange.tries = (late, outrun, Attempt("p", "c", "", 4.0, ended_at=6.0), Attempt("p", "d", "", 4.0))
    assert exchange.failures == [outrun, late]
