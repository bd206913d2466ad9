"""The page Requests in a browser: lists, filters, one request opened, and one ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from playwright.async_api import Page, expect

from loadtests.behaviour import Behaviour
from tests.support.browsing import WITHIN_MS, Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


async def explained(fleet: Rig, tenant: str) -> str:
    """The id of a request of which it is kept why it went where it went: on a busy machine not of every one."""
    for _ in range(50):
        reply = await fleet.ask(tenant, model="code", messages=[{"role": "user", "content": "why " * 300}])
        id: str = reply.headers["x-request-id"]
        if (await fleet.admin("GET", f"/admin/requests/{id}")).json()["decisions"]:
            return id
        await asyncio.sleep(0.1)
    raise AssertionError("no request was explained")


@every_look
async def test_requests_are_listed_and_one_is_opened(visit: Visit, fleet: Rig, axe: Axe) -> None:
    id = await explained(fleet, "globex")
    page = await visit("requests?tenant=globex&model=code")
    table = page.get_by_role("table", name="Settled requests")
    await expect(table.locator("tbody tr").first).to_be_visible(timeout=WITHIN_MS)
    tenants = await table.locator("tbody tr td:nth-child(5)").all_inner_texts()
    assert set(tenants) == {"globex"}
    await axe(page)
    await table.get_by_role("button", name=id[-8:]).click()
    await expect(page.get_by_role("table", name="Phases of the request")).to_be_visible(timeout=WITHIN_MS)
    await expect(page.get_by_role("region", name="Why it went there")).to_contain_text("code-")
    await expect(page.get_by_role("table", name="Attempts")).to_contain_text("code-pool/")
    await expect(page.get_by_text("x-request-id: req_")).to_be_visible()
    await axe(page)
    track = await page.locator(".tl-track").first.bounding_box()
    assert track is not None
    assert track["width"] > 100


async def test_a_decision_shows_every_candidate_with_its_terms(visit: Visit, fleet: Rig) -> None:
    page = await visit(f"requests/{await explained(fleet, 'acme')}")
    candidates = page.get_by_role("table", name="Candidates, the cheapest first")
    await expect(candidates.get_by_role("row")).to_have_count(3, timeout=WITHIN_MS)
    await expect(candidates.get_by_text("chosen")).to_have_count(1)
    bars = candidates.locator(".term-stack")
    assert "Produce the answer" in (await bars.first.get_attribute("aria-label") or "")
    widths = [await bar.bounding_box() for bar in await bars.first.locator(".term-part").all()]
    assert any(box is not None and box["width"] > 2 for box in widths)
    await page.get_by_text("Every term as a figure").click()
    await expect(page.get_by_role("table", name="Milliseconds by term")).to_contain_text("Compute the prompt")


async def test_filters_are_in_the_address_and_can_be_cleared(visit: Visit, fleet: Rig) -> None:
    page = await visit("requests")
    await page.get_by_label("Outcome").select_option("rejected")
    await page.wait_for_url("**/#requests?outcome=rejected", timeout=WITHIN_MS)
    table = page.get_by_role("table", name="Settled requests")
    await expect(table.locator("tbody tr").first).to_contain_text("rejected", timeout=WITHIN_MS)
    await page.get_by_label("Tenant").fill("nobody-of-this-name")
    await expect(page.get_by_text("No request matches.")).to_be_visible(timeout=WITHIN_MS)
    await page.get_by_role("button", name="Clear", exact=True).click()
    await page.wait_for_url("**/#requests", timeout=WITHIN_MS)
    await expect(table.locator("tbody tr").first).to_be_visible(timeout=WITHIN_MS)


async def test_new_requests_come_by_themselves_until_it_is_paused(visit: Visit, fleet: Rig) -> None:
    page = await visit("requests?tenant=initech&model=code")
    first = (await fleet.ask("initech", model="code")).headers["x-request-id"][-8:]
    table = page.get_by_role("table", name="Settled requests")
    await expect(table.get_by_text(first)).to_be_visible(timeout=WITHIN_MS)
    await page.get_by_role("button", name="Pause").click()
    second = (await fleet.ask("initech", model="code")).headers["x-request-id"][-8:]
    await expect(table.get_by_text(second)).to_have_count(0)
    await page.get_by_role("button", name="Go on").click()
    await expect(table.get_by_text(second)).to_be_visible(timeout=WITHIN_MS)


async def test_a_request_under_way_is_ended_by_keyboard(visit: Visit, fleet: Rig) -> None:
    async def hang() -> None:
        for name in ("code-eu", "code-us"):
            fleet.engines[name].queue.append(Behaviour(hang_mid=1))

    async def let_go() -> None:
        for name in ("code-eu", "code-us"):
            fleet.engines[name].queue.clear()

    await fleet.trickle(None)
    await fleet.run(hang)
    try:
        asking = asyncio.create_task(fleet.ask("acme", model="code", stream=True))
        page = await visit("requests")
        table = page.get_by_role("table", name="Requests under way")
        await expect(table.get_by_text("streaming")).to_be_visible(timeout=WITHIN_MS)
        await table.get_by_role("button", name="End request").focus()
        await page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("ended_by_operator")
        await dialog.get_by_role("button", name="Cancel").click()
        assert not asking.done()
        await table.get_by_role("button", name="End request").click()
        await dialog.get_by_role("button", name="End request").click()
        reply = await asking
        assert "ended_by_operator" in reply.text
        await expect(page.get_by_role("table", name="Settled requests").get_by_text("ended_by_operator")).to_be_visible(
            timeout=WITHIN_MS
        )
    finally:
        await fleet.run(let_go)


async def test_an_unknown_request_says_where_older_ones_are(visit: Visit, problems: object, fleet: Rig) -> None:
    problems.expect("status of 404")  # type: ignore[attr-defined]
    page = await visit("requests/req_unknown")
    await expect(page.get_by_text("This request is not known here any more.")).to_be_visible(timeout=WITHIN_MS)
