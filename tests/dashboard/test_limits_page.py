"""The page of limits: whose limits are nearest to their end, what is left of them, and what is seen to change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from playwright.async_api import Page, expect

from tests.support.browsing import Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


@every_look
async def test_limits_are_shown_with_what_is_left(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("limits")
    table = page.get_by_role("table", name="Limits by holder")
    for holder in ("acme", "globex", "initech", "nightly batch (initech)"):
        await expect(table.get_by_role("button", name=holder, exact=True)).to_have_count(1)
    await expect(page.locator(".stat", has_text="Counted in")).to_contain_text("memory")
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_a_limit_that_is_used_up_comes_first_by_itself(visit: Visit, fleet: Rig) -> None:
    page = await visit("limits")
    await fleet.ask("exhausted")
    await fleet.ask("exhausted")
    used_up = page.locator(".limits-of", has_text="nightly batch")
    await expect(used_up).to_contain_text("used up")
    await expect(used_up).to_contain_text("requests a minute")
    await expect(used_up).to_contain_text("refused")
    await expect(page.locator(".stat", has_text="Used up").first).to_contain_text("requests are refused")
    meter = used_up.get_by_role("meter").first
    assert int(await meter.get_attribute("aria-valuenow") or 0) > 0


async def test_money_shows_what_is_spent_and_what_is_reserved(visit: Visit, fleet: Rig) -> None:
    page = await visit("limits")
    await page.get_by_label("Tenant").fill("acme")
    await page.get_by_role("button", name="Show", exact=True).click()
    await expect(page).to_have_url(f"{fleet.dashboard}#limits?tenant=acme")
    await expect(page.get_by_role("button", name="globex", exact=True)).to_have_count(0)
    await page.get_by_role("table").get_by_role("button", name="acme", exact=True).click()
    of_acme = page.get_by_role("region", name="Limits of acme").first
    await expect(of_acme).to_contain_text("dollars a day")
    await expect(of_acme).to_contain_text("reserved")
    answer = (await fleet.admin("GET", "/admin/limits?tenant=acme")).json()
    budget = next(gauge for row in answer["data"] for gauge in row["limits"] if gauge["limit"] == "usd_per_day")
    assert budget["used"] > 0
    await page.get_by_role("button", name="Show all").click()
    await expect(page.get_by_role("table").get_by_role("button", name="globex", exact=True)).to_have_count(1)


async def test_a_filter_that_matches_nothing_says_what_to_do(visit: Visit) -> None:
    page = await visit("limits?tenant=nobody")
    await expect(page.locator("main")).to_contain_text("No limit matches")
