"""The page Policies: what is in force, the shadow, a comparison, switching and undoing it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest_asyncio
from playwright.async_api import Page, expect

from tests.support.browsing import Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="session")
async def as_configured(fleet: Rig) -> AsyncIterator[None]:
    """No override is left, whatever has become of the test."""
    yield
    await take_back(fleet)


async def take_back(fleet: Rig) -> None:
    version = (await fleet.admin("GET", "/admin/overrides")).json()["version"]
    await fleet.admin("DELETE", "/admin/overrides", **{"if-match": f'"{version}"'})


async def policy_of(fleet: Rig, model: str) -> str:
    models = (await fleet.admin("GET", "/admin/policies")).json()["models"]
    return str(next(each["policy"] for each in models if each["name"] == model))


@every_look
async def test_each_model_says_by_which_policy_it_goes(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("policies")
    for model in ("chat", "support", "code"):
        card = page.get_by_role("region", name=model, exact=True)
        await expect(card).to_contain_text("Policy in force: cost")
        await expect(card).to_contain_text("A shadow policy decides about some of the requests too, and sends nothing")
    await expect(page.get_by_role("region", name="Compare on recent traffic")).to_be_visible()
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_a_policy_is_switched_and_the_switch_undone(visit: Visit, fleet: Rig, as_configured: None) -> None:
    page = await visit("policies")
    card = page.get_by_role("region", name="code", exact=True)
    await card.get_by_label("Policy for code").select_option("round_robin")
    await card.get_by_role("button", name="Switch", exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert await policy_of(fleet, "code") == "cost"
    await card.get_by_role("button", name="Switch", exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name="Switch").click()
    await expect(card).to_contain_text("Policy in force: round_robin")
    await expect(card).to_contain_text("changed here")
    assert await policy_of(fleet, "code") == "round_robin"
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(card).to_contain_text("Policy in force: cost")
    assert await policy_of(fleet, "code") == "cost"


async def test_a_shadow_shows_where_requests_would_have_gone(
    visit: Visit, fleet: Rig, axe: Axe, as_configured: None
) -> None:
    page = await visit("policies")
    card = page.get_by_role("region", name="chat", exact=True)
    await card.get_by_label("Shadow for chat").select_option("round_robin")
    await card.get_by_role("button", name="Start shadow").click()
    await expect(card).to_contain_text("Shadow: round_robin")
    await fleet.send(20)
    table = card.get_by_role("table", name="Where requests for chat went, and would have gone")
    await expect(table).to_contain_text("eu-0", timeout=15_000)  # the live topic brings it
    await expect(card).to_contain_text("Same replica")
    await axe(page)
    await card.get_by_role("button", name="Switch to round_robin").click()
    await page.get_by_role("dialog").get_by_role("button", name="Switch").click()
    await expect(card).to_contain_text("Policy in force: round_robin")
    await card.get_by_role("button", name="Take back").click()
    await expect(card).to_contain_text("Policy in force: cost")
    await card.get_by_role("button", name="End shadow").click()
    await expect(card.get_by_role("button", name="Start shadow")).to_be_visible()


async def test_policies_are_compared_on_what_went_through(visit: Visit, fleet: Rig, axe: Axe) -> None:
    await fleet.send(90, at_once=16)
    page = await visit("policies")
    card = page.get_by_role("region", name="Compare on recent traffic")
    await card.get_by_label("Model").select_option("chat")
    await card.get_by_label("power_of_two").check()
    await card.get_by_role("button", name="Compare").click()
    table = card.get_by_role("table", name="Policies compared for chat")
    await expect(table).to_be_visible(timeout=45_000)
    for policy in ("cost", "least_outstanding", "round_robin", "power_of_two"):
        await expect(table.get_by_role("row", name=policy)).to_have_count(1)
    await expect(table.get_by_role("row", name="cost")).to_contain_text("in force")
    await expect(card).to_contain_text("What these figures do not know")
    await expect(card).to_contain_text("Measured of the same requests, by cost")
    await axe(page)
