"""The hub and its streams: computed once for all, bounded, and over when they should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.rollups.hub import Hub, TooManyStreams, Viewer
from tests.support.admin_desk import OWNER, AdminSide, admin_side, bearer

PATIENCE_S = 15.0


class Counter:
    """A producer whose data a test decides about."""

    def __init__(self) -> None:
        self.runs = 0
        self.value = 0
        self.changed = asyncio.Event()

    async def __call__(self) -> dict[str, Any]:
        self.runs += 1
        self.changed.set()
        return {"value": self.value}

    async def until(self, runs: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.runs < runs:
                self.changed.clear()
                await self.changed.wait()


async def take(events: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        return await anext(events)


def hub_of(producer: Counter, **options: Any) -> Hub:
    hub = Hub(**options)
    hub.topic("t", 0.01, producer)
    return hub


async def test_a_topic_is_computed_once_for_all_and_only_while_somebody_looks() -> None:
    producer = Counter()
    hub = hub_of(producer)
    assert not hub.watched("t")
    first, second = hub.join(["t"]), hub.join(["t", "t"])
    streams = [hub.events(first), hub.events(second)]
    for stream in streams:
        assert await take(stream) == b"retry: 2000\n\n"
        assert await take(stream) == b'event: t\ndata: {"value":0}\n\n'
    await producer.until(5)
    assert not first.fresh  # equal data is not sent again
    hub.leave(first)
    assert hub.watched("t")
    hub.leave(second)
    assert not hub.watched("t")
    runs = producer.runs
    await asyncio.sleep(0.05)  # five periods in which nothing may happen
    assert producer.runs == runs
    await hub.aclose()


async def test_a_slow_viewer_gets_the_newest_and_nothing_piles_up() -> None:
    producer = Counter()
    hub = hub_of(producer)
    viewer = hub.join(["t"])
    stream = hub.events(viewer)
    await take(stream)
    for value in range(1, 50):
        producer.value = value
        await producer.until(producer.runs + 1)
    await producer.until(producer.runs + 2)
    assert len(viewer.fresh) == 1
    assert await take(stream) == b'event: t\ndata: {"value":49}\n\n'
    hub.leave(viewer)
    await hub.aclose()


async def test_a_viewer_that_comes_later_gets_at_once_what_is_known() -> None:
    producer = Counter()
    hub = Hub()
    hub.topic("t", 3600.0, producer)
    first = hub.join(["t"])
    stream = hub.events(first)
    await take(stream)
    await take(stream)
    second = hub.join(["t"])
    other = hub.events(second)
    await take(other)
    assert await take(other) == b'event: t\ndata: {"value":0}\n\n'
    assert producer.runs == 1
    await hub.aclose()


async def test_silence_is_broken_by_comments() -> None:
    hub = hub_of(Counter(), keep_alive_s=0.05)
    stream = hub.events(hub.join(["t"]))
    await take(stream)
    await take(stream)
    assert await take(stream) == b":\n\n"
    await hub.aclose()


async def test_streams_are_bounded() -> None:
    hub = hub_of(Counter(), max_streams=2)
    viewers = [hub.join(["t"]), hub.join(["t"])]
    with pytest.raises(TooManyStreams):
        hub.join(["t"])
    hub.leave(viewers[0])
    hub.join(["t"])
    await hub.aclose()


async def test_a_producer_that_fails_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    fails = [True, True, False]

    async def produce() -> dict[str, Any]:
        if fails and fails.pop(0):
            raise RuntimeError("the test wants it")
        return {"value": 1}

    hub = Hub()
    hub.topic("t", 0.01, produce)
    stream = hub.events(hub.join(["t"]))
    await take(stream)
    assert await take(stream) == b'event: t\ndata: {"value":1}\n\n'
    assert [each.getMessage() for each in caplog.records] == ["the live topic t failed"]  # said once
    await hub.aclose()


async def test_a_hub_that_is_closed_ends_every_stream_and_opens_none() -> None:
    hub = hub_of(Counter())
    viewer = hub.join(["t"])
    stream = hub.events(viewer)
    await take(stream)
    await hub.aclose()
    assert [chunk async for chunk in stream] == []
    late = hub.join(["t"])
    assert [chunk async for chunk in hub.events(late)] == [b"retry: 2000\n\n"]


# -- over a socket


@asynccontextmanager
async def stream(side: AdminSide, topics: str, headers: dict[str, str]) -> AsyncIterator[httpx2.Response]:
    async with side.client.stream("GET", f"/admin/events?topics={topics}", headers=headers) as answer:
        yield answer


async def until_viewers(side: AdminSide, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while side.desk.hub.streams != count:  # noqa: ASYNC110 - set by a connection's end
            await asyncio.sleep(0.005)


async def test_events_come_as_server_sent_events(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side, stream(side, "overview", bearer(OWNER)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.aiter_lines()
        async with asyncio.timeout(PATIENCE_S):
            found = [await anext(lines) for _ in range(4)]
        assert found[:3] == ["retry: 2000", "", "event: overview"]
        assert found[3].startswith('data: {"at_unix_s":')


@pytest.mark.parametrize("query", ["", "?topics=", "?topics=nothing", "?topics=overview,nothing"])
async def test_topics_that_do_not_exist_are_refused(tmp_path: Path, query: str) -> None:
    async with admin_side(tmp_path) as side:
        answer = await side.client.get(f"/admin/events{query}", headers=bearer(OWNER))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "topics")
        assert (await side.client.get("/admin/events?topics=overview")).status_code == 401


async def test_a_viewer_that_goes_is_forgotten(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        async with stream(side, "overview", bearer(OWNER)):
            await until_viewers(side, 1)
        await until_viewers(side, 0)
        assert not side.desk.hub.watched("overview")


async def test_logging_out_ends_the_stream(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        session = await side.logged_in()
        async with stream(side, "overview", session) as answer:
            lines = answer.aiter_lines()
            async with asyncio.timeout(PATIENCE_S):
                await anext(lines)
                gone = await side.client.delete("/admin/session", headers=session)
                assert gone.is_success, gone.text
                async for _ in lines:
                    pass
        await until_viewers(side, 0)


async def test_the_end_of_the_gateway_ends_the_stream(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side, stream(side, "overview", bearer(OWNER)) as answer:
        lines = answer.aiter_lines()
        async with asyncio.timeout(PATIENCE_S):
            await anext(lines)
            await side.desk.aclose()
            async for _ in lines:
                pass
        assert isinstance(side.desk.hub.join(["overview"]), Viewer)
