"""The page Scaling: what is wanted and why, a number held by an operator, agents; and what a new gateway's says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.browsing import (
    LOOKS,
    Problems,
    Visit,
    every_look,
    new_context,
    refused_by_policy,
    settled,
    sign_in,
    watched_page,
)
from tests.support.command import PATIENCE_S
from tests.support.fleet_rig import READER_TOKEN, Rig, fleet_rig

Axe = Callable[[Page], Awaitable[None]]
FREE = {"input": 0, "output": 0}


async def scaling_of(fleet: Rig) -> dict[str, Any]:
    answer: dict[str, Any] = (await fleet.admin("GET", "/admin/scaling/chat-pool")).json()
    return answer


@pytest_asyncio.fixture(loop_scope="session")
async def released(fleet: Rig) -> AsyncIterator[None]:
    """Nothing is held, whatever has become of the test."""
    yield
    await fleet.admin("DELETE", "/admin/scaling/chat-pool")


@every_look
async def test_a_pool_says_how_many_it_should_have_and_why(visit: Visit, axe: Axe) -> None:
    page = await visit("scaling")
    card = page.get_by_role("region", name="chat-pool", exact=True)
    for text in ("2 ready, 0 starting; between 1 and 4", "provider none", "For KEDA or an HPA", "an hour"):
        await expect(card).to_contain_text(text)
    await expect(card.get_by_role("img", name="Replicas of chat-pool:")).to_be_visible()
    await expect(card).to_contain_text("requests/s")  # the stream brings what workers have told by now
    await expect(card.get_by_role("listitem").first).to_contain_text("replica")
    await expect(card.get_by_role("img", name="Replicas wanted and there")).to_be_visible()
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_a_number_is_held_undone_and_released_by_click(visit: Visit, fleet: Rig, released: None) -> None:
    page = await visit("scaling")
    card = page.get_by_role("region", name="chat-pool", exact=True)
    await card.get_by_label("Hold at").fill("3")
    await card.get_by_label("For", exact=True).select_option("4 hours")
    await card.get_by_role("button", name="Hold", exact=True).click()
    await expect(card).to_contain_text("At 3 replicas by")
    await expect(card).to_contain_text("it ends in 4 h")
    held = (await scaling_of(fleet))["held"]
    assert held["count"] == 3
    await expect(card).to_contain_text("3 wanted")  # as soon as the gateway has decided anew
    await expect(card).to_contain_text("1 more wanted")
    assert (await scaling_of(fleet))["wanted"] == 3
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(card).not_to_contain_text("At 3 replicas by")
    assert (await scaling_of(fleet))["held"] is None
    await card.get_by_label("Hold at").fill("4")
    await card.get_by_role("button", name="Hold", exact=True).click()
    await expect(card).to_contain_text("At 4 replicas by")
    await card.get_by_role("button", name="Release").click()
    await expect(card).not_to_contain_text("At 4 replicas by")
    assert (await scaling_of(fleet))["held"] is None
    await page.locator(".notice").last.get_by_role("button", name="Undo").click()
    await expect(card).to_contain_text("At 4 replicas by")
    assert (await scaling_of(fleet))["held"]["count"] == 4


async def test_agents_are_listed_with_what_they_have(visit: Visit, fleet: Rig) -> None:
    page = await visit("scaling")
    await expect(page.get_by_role("region", name="Agents")).to_contain_text("tidegate fleet up")
    pools = {"chat-pool": {"launched": 3, "ready": 2, "max": 7}}
    for agent in ("gpu-b", "gpu-a"):
        assert (await fleet.admin("PUT", f"/admin/agents/{agent}", {"pools": pools})).status_code == 200
    rows = page.get_by_role("table", name="Agents").get_by_role("row")
    await expect(rows).to_have_count(3)
    assert (await rows.nth(1).get_by_role("cell").all_inner_texts())[:5] == ["gpu-a", "chat-pool", "3", "2", "7"]
    assert re.fullmatch("now|[0-9] s ago", await rows.nth(1).get_by_role("cell").last.inner_text())


async def test_who_may_only_look_can_hold_nothing(browser: Browser, fleet: Rig) -> None:
    context = await new_context(browser, LOOKS[0])
    page = await context.new_page()
    await sign_in(page, fleet, READER_TOKEN)
    await page.goto(f"{fleet.dashboard}#scaling")
    card = page.get_by_role("region", name="chat-pool", exact=True)
    await expect(card).to_contain_text("between 1 and 4")
    await expect(card.get_by_role("button")).to_have_count(0)
    await context.close()


# -- a gateway with a pool that agents launch, and that nobody scales


@pytest.fixture(scope="module")
def launching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    solo = {"engine": "sglang", "launch": {"model": "some/model"}, "replicas": [{"url": "http://127.0.0.1:9"}]}
    sections: dict[str, Any] = {"backends": {"solo": solo}, "models": {"solo": {"backend": "solo", "price": FREE}}}
    with fleet_rig(tmp_path_factory.mktemp("launching"), traffic=False, **sections) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="session")
async def launching_page(browser: Browser, launching: Rig) -> AsyncIterator[Page]:
    context = await new_context(browser, LOOKS[0])
    problems = Problems(launching.admin_url.removeprefix("http://"))
    problems.expect("status of 401")
    page = await watched_page(context, problems)
    await sign_in(page, launching)
    yield page
    problems.found += await refused_by_policy(page)
    await context.close()
    assert problems.unexpected == []


async def test_where_no_pool_is_scaled_the_page_says_how_to(launching: Rig, launching_page: Page, axe: Axe) -> None:
    await launching_page.goto(f"{launching.dashboard}#scaling")
    await settled(launching_page)
    main = launching_page.locator("main")
    for text in ("scaling: {max: 8}", "KEDA", "tidegate fleet up"):
        await expect(main).to_contain_text(text)
    await axe(launching_page)


async def test_servers_are_restarted_one_by_one_by_click(launching: Rig, launching_page: Page) -> None:
    async def told() -> dict[str, Any]:
        body = {"pools": {"solo": {"launched": 1, "ready": 1, "max": 1}}}
        order: dict[str, Any] = (await launching.admin("PUT", "/admin/agents/gpu1", body)).json()["pools"]["solo"]
        return order

    before = (await told())["roll"]
    await launching_page.goto(f"{launching.dashboard}#fleet")
    await launching_page.get_by_role("button", name="Restart solo one by one").click()
    dialog = launching_page.get_by_role("dialog")
    await expect(dialog).to_contain_text("There is no other server in solo")
    await dialog.get_by_role("button", name="Restart one by one").click()
    await expect(launching_page.locator(".notice")).to_contain_text("restarted one by one")
    async with asyncio.timeout(PATIENCE_S):  # workers hear of it in a moment
        while (order := await told())["roll"] == before:
            pass
    assert order["roll"] == before + 1
