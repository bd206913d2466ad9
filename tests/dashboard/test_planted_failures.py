"""What breaks is on the overview within five seconds: a slow replica, a dead one, a dead Redis, a spent budget.

A gateway of its own, with a Redis of its own that is really killed, and a browser that has the page open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from loadtests.behaviour import Behaviour
from tests.support.browsing import LOOKS, Problems, new_context, settled, sign_in, watched_page
from tests.support.fleet_rig import Rig, fleet_rig
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.quiet

WITHIN_S = 5.0
GONE_WITHIN_MS = 60_000


@dataclass
class Watched:
    """A gateway that is to be harmed, and the page that shows it."""

    rig: Rig
    redis: RedisServer
    page: Page

    async def shows(self, finding: str, verdict: str, since: float) -> None:
        """The finding is there five seconds after `since` at the latest, and with it the verdict."""
        left_ms = 1000 * (WITHIN_S - (time.monotonic() - since))
        await expect(self.page.locator(f"[data-finding^='{finding}']").first).to_be_visible(timeout=max(1.0, left_ms))
        await expect(self.page.get_by_label("Verdict")).to_contain_text(verdict)

    async def forgets(self, finding: str) -> None:
        await expect(self.page.locator(f"[data-finding^='{finding}']")).to_have_count(0, timeout=GONE_WITHIN_MS)


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, RedisServer]]:
    with (
        RedisServer() as redis,
        fleet_rig(tmp_path_factory.mktemp("harmed"), store=redis.url, redis={"timeout_ms": 500}) as rig,
    ):
        yield rig, redis


@pytest_asyncio.fixture(loop_scope="session")
async def watched(harmed: tuple[Rig, RedisServer], browser: Browser) -> AsyncIterator[Watched]:
    """The overview, open, of a gateway that is well."""
    rig, redis = harmed
    await rig.trickle(10.0)
    context = await new_context(browser, LOOKS[0])
    page = await watched_page(context, Problems(rig.admin_url.removeprefix("http://")))
    await sign_in(page, rig)
    await page.goto(f"{rig.dashboard}#overview")
    await settled(page)
    await expect(page.get_by_label("Verdict")).to_contain_text("Healthy", timeout=GONE_WITHIN_MS)
    yield Watched(rig, redis, page)
    await rig.trickle(None)
    await context.close()


async def test_a_slow_replica(watched: Watched) -> None:
    rig = watched.rig
    pace = rig.engines["code-eu"].pace
    assert pace is not None

    def slow(body: bytes, behaviour: Behaviour, received_at: float) -> Behaviour:
        usual = pace(body, behaviour, received_at)
        return replace(usual, ttft_s=usual.ttft_s + 1.5)

    async def ask() -> None:
        """What clients of this model want, for as long as the test needs."""
        while True:
            await rig._ask("acme", "code", stream=True)

    async def harm() -> list[asyncio.Task[None]]:
        rig.engines["code-eu"].pace = slow
        return [asyncio.create_task(ask()) for _ in range(6)]

    async def heal(tasks: list[asyncio.Task[None]]) -> None:
        rig.engines["code-eu"].pace = pace
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    begun = time.monotonic()
    tasks = await rig.run(harm)
    try:
        await watched.shows("slow code-pool/code-eu", "Degraded", begun)
        assert await watched.page.locator("[data-finding^='slow']").count() == 1
    finally:
        await rig.run(lambda: heal(tasks))


async def test_a_dead_replica(watched: Watched) -> None:
    engine = watched.rig.engines["us-0"]
    begun = time.monotonic()
    await watched.rig.run(engine.stop)
    try:
        await watched.shows("replica chat-pool/us-0 cooling_down", "Degraded", begun)
    finally:
        await watched.rig.run(engine.start)
    await watched.forgets("replica chat-pool/us-0")


async def test_a_spent_budget(watched: Watched) -> None:
    body: dict[str, Any] = {"tenant": "globex", "name": "spends little", "limits": {"usd_per_day": 0.000002}}
    key = (await watched.rig.admin("POST", "/admin/keys", body)).json()
    watched.rig.keys["poor"] = key["key"]
    begun = time.monotonic()
    while (await watched.rig.ask("poor")).status_code == 401:  # all workers know a new key within half a second
        assert time.monotonic() - begun < 5
    answers = [await watched.rig.ask("poor") for _ in range(4)]
    assert answers[-1].status_code == 429, answers[-1].text
    assert answers[-1].json()["error"]["code"] == "insufficient_quota"
    await watched.shows("budget", "Healthy", begun)
    await expect(watched.page.locator("[data-finding^='budget']")).to_contain_text(f"tenant globex, key {key['id']}")


async def test_a_dead_redis(watched: Watched) -> None:
    begun = time.monotonic()
    watched.redis.kill()
    try:
        await watched.shows("store", "Failing", begun)
        assert (await watched.rig.ask()).status_code == 200  # and requests are served
    finally:
        watched.redis.start()
    await watched.forgets("store")
