"""The page Playground in a browser: a prompt sent to one place and to two, stopped, and shown as text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from playwright.async_api import Page, expect

from loadtests.behaviour import Behaviour
from tests.support.browsing import WITHIN_MS, Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]
MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"


async def write(page: Page, prompt: str) -> None:
    await page.get_by_label("Model").select_option("code")
    await page.get_by_label("Prompt", exact=True).fill(prompt)


@every_look
async def test_a_prompt_is_answered_as_it_streams(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("playground")
    await write(page, f"hello {MARKUP}")
    await page.keyboard.press("Control+Enter")
    column = page.get_by_role("region", name="As any request")
    await expect(column.get_by_role("log")).not_to_be_empty(timeout=WITHIN_MS)
    await expect(column.get_by_role("status")).to_contain_text("done", timeout=WITHIN_MS)
    await expect(column).to_contain_text("Replica code-")
    await expect(column).to_contain_text("completed")
    await column.get_by_text("Why it went there").click()
    await expect(column.get_by_role("table", name="Candidates, the cheapest first")).to_be_visible()
    await axe(page)
    await page.get_by_text("The same with curl").click()
    assert MARKUP.replace("'", "") in await page.locator(".play-curl").inner_text()
    assert await page.locator("main img, main b:text-is('bold')").count() == 0
    await column.get_by_role("link", name="Open the request").click()
    await expect(page.get_by_role("table", name="Phases of the request")).to_be_visible(timeout=WITHIN_MS)


async def test_the_same_prompt_goes_to_two_replicas_side_by_side(visit: Visit, fleet: Rig) -> None:
    page = await visit("playground")
    await write(page, "compare")
    await page.get_by_role("button", name="Side by side").click()
    await page.get_by_label("Column 1 goes").select_option("replica=code-us")
    await page.get_by_label("Column 2 goes").select_option("policy=round_robin")
    await page.get_by_role("button", name="Send").click()
    left, right = (
        page.get_by_role("region", name="replica code-us"),
        page.get_by_role("region", name="policy round_robin"),
    )
    for column in (left, right):
        await expect(column.get_by_role("status")).to_contain_text("done", timeout=WITHIN_MS)
    await expect(left).to_contain_text("Replica code-us")
    await right.get_by_text("Why it went there").click()
    await expect(right).to_contain_text("By the policy round_robin")
    rows = (await fleet.admin("GET", "/admin/requests?tenant=playground&replica=code-us&live=false")).json()["settled"]
    assert rows[0]["outcome"] == "completed"


async def test_an_answer_is_stopped_and_its_engine_told(visit: Visit, fleet: Rig) -> None:
    async def hang() -> None:
        fleet.engines["code-eu"].queue.append(Behaviour(hang_mid=1))

    async def let_go() -> None:
        fleet.engines["code-eu"].queue.clear()

    await fleet.trickle(None)
    page = await visit("playground")
    await write(page, "go on for ever")
    await page.get_by_label("Goes").select_option("replica=code-eu")
    await fleet.run(hang)
    try:
        await page.get_by_role("button", name="Send").click()
        column = page.get_by_role("region", name="replica code-eu")
        await expect(column.get_by_role("log")).not_to_be_empty(timeout=WITHIN_MS)
        await page.get_by_role("button", name="Stop").click()
        await expect(column.get_by_role("status")).to_contain_text("stopped", timeout=WITHIN_MS)
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        path = "/admin/requests?tenant=playground&outcome=client_left"
        for _ in range(100):
            if (await fleet.admin("GET", path)).json()["settled"]:
                break
            await page.wait_for_timeout(50)
        else:
            raise AssertionError("the request was not ended")
    finally:
        await fleet.run(let_go)


async def test_a_refusal_is_shown_in_the_gateways_words(visit: Visit, fleet: Rig) -> None:
    page = await visit("playground")
    await write(page, "hello")
    await page.get_by_label("Tenant").fill("nobody-of-this-name")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_role("alert")).to_contain_text("unknown_tenant", timeout=WITHIN_MS)
