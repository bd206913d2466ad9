"""The load generators count what came and nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from loadtests import requests, streams
from loadtests.behaviour import Behaviour
from loadtests.bodies import chat_bodies
from loadtests.engine import FakeEngine


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as engine:
        yield engine


@pytest.mark.parametrize("size_bytes", [300, 1024, 32_768])
def test_bodies_have_the_size_and_differ(size_bytes: int) -> None:
    bodies = chat_bodies(size_bytes)
    assert {len(body) for body in bodies} == {size_bytes}
    assert len(set(bodies)) == len(bodies)
    assert bodies == chat_bodies(size_bytes)
    assert json.loads(bodies[0])["model"] == "bench"


def test_large_bodies_are_conversations() -> None:
    messages = json.loads(chat_bodies(32_768)[0])["messages"]
    assert len(messages) > 50
    assert [message["role"] for message in messages[:4]] == ["system", "user", "assistant", "user"]
    assert messages[-1]["role"] == "user"


def test_a_body_that_cannot_be_so_small_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        chat_bodies(100)


def test_percentile() -> None:
    assert requests.percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert requests.percentile([1.0], 0.99) == 1.0
    assert requests.percentile([], 0.5) == 0.0


async def test_requests_are_counted(engine: FakeEngine) -> None:
    result = await requests.load(engine.url, chat_bodies(1024), connections=4, count=50)
    assert (result.requests, result.errors) == (50, 0)
    assert 0 < result.p50_ms <= result.p99_ms
    assert len(engine.requests) == 50
    assert engine.accepted == 4


@pytest.mark.parametrize(
    "behaviour",
    [Behaviour(status=500), Behaviour(raw=""), Behaviour(content_length_short=5)],
    ids=["status", "closed", "short"],
)
async def test_bad_answers_are_errors(engine: FakeEngine, behaviour: Behaviour) -> None:
    engine.script = behaviour
    result = await requests.load(engine.url, chat_bodies(300), connections=2, count=2)
    assert (result.requests, result.errors) == (0, 2)


async def test_answers_in_pieces_and_in_chunks_are_complete(engine: FakeEngine) -> None:
    engine.script = Behaviour(split=50)
    assert (await requests.load(engine.url, chat_bodies(300), connections=2, count=4)).requests == 4
    stream = [json.dumps({"model": "m", "stream": True}).encode()]
    assert (await requests.load(engine.url, stream, connections=2, count=4)).requests == 4


async def test_requests_end_in_time(engine: FakeEngine) -> None:
    engine.script = Behaviour(delay_head_s=0.05)
    result = await requests.load(engine.url, chat_bodies(300), connections=1, count=1000, max_s=0.12)
    assert 1 <= result.requests <= 4


async def test_streams_are_measured(engine: FakeEngine) -> None:
    result = await streams.load(engine.url, streams=5, chunks=4, rate=100)
    assert (result.streams, result.good, result.chunks) == (5, 5, 20)
    assert 0 < result.delay_p50_ms <= result.delay_p99_ms < 1000
    assert 0 < result.ttft_p50_ms < 1000


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(cut_after=2),
        Behaviour(truncate_after=2),
        Behaviour(done_without_finish=True),
        Behaviour(finish_without_done=True),
        Behaviour(status=503),
    ],
    ids=["cut", "truncated", "no finish", "no done", "refused"],
)
async def test_incomplete_streams_are_not_good(engine: FakeEngine, behaviour: Behaviour) -> None:
    engine.script = behaviour
    result = await streams.load(engine.url, streams=2, chunks=4, rate=200)
    assert result.good == 0


async def test_streams_in_pieces_are_put_together(engine: FakeEngine) -> None:
    engine.script = Behaviour(split=33)
    result = await streams.load(engine.url, streams=2, chunks=4, rate=200)
    assert (result.good, result.chunks) == (2, 8)
