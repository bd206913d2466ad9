"""The overview in a browser: its verdict, its figures, its charts, and how it follows what happens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from playwright.async_api import Page, Request, expect

from tests.support.browsing import LOOKS, Visit, every_look
from tests.support.fleet_rig import Rig

Check = Callable[[Page], Awaitable[None]]


def figure(page: Page, label: str) -> Any:
    """The tile of this name."""
    return page.locator(".stat", has=page.get_by_text(label, exact=True))


@every_look
async def test_the_overview_says_how_it_is_at_a_glance(visit: Visit, fleet: Rig, axe: Check) -> None:
    page = await visit("overview")
    await expect(page.get_by_label("Verdict")).to_contain_text("Healthy")
    await expect(page.get_by_label("Verdict")).to_contain_text(f"{len(fleet.engines)} of {len(fleet.engines)}")
    for name in ("Requests per second", "Error rate", "End to end", "Waiting in line", "Dollars per hour"):
        await expect(figure(page, name)).to_be_visible()
    for name in ("Requests per second", "Time to first token", "Dollars per hour"):
        await expect(page.get_by_role("img", name=re.compile(rf"^{name}\. \w+: now "))).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    await axe(page)


async def test_figures_are_those_of_the_requests_that_went_through(visit: Visit, fleet: Rig) -> None:
    page = await visit("overview?window=hour")
    before = (await fleet.admin("GET", "/admin/overview?window=hour")).json()["totals"]
    await fleet.send(12)
    async with asyncio.timeout(15):  # figures may be a second old
        while True:
            now = (await fleet.admin("GET", "/admin/overview?window=hour")).json()
            if now["totals"]["requests"] >= before["requests"] + 12:
                break
    assert now["totals"]["outcomes"]["completed"] >= before["outcomes"]["completed"] + 12
    assert now["totals"]["prompt_tokens"] > before["prompt_tokens"]
    assert 0 < now["totals"]["ttft_ms"]["p50"] <= now["totals"]["ttft_ms"]["p95"] <= now["totals"]["ttft_ms"]["p99"]
    assert {row["model"] for row in now["models"]} >= {"chat", "code"}
    await page.reload()
    shown = await figure(page, "Requests per second").locator(".stat-note").inner_text()
    assert int(shown.split()[0].replace(",", "")) >= now["totals"]["requests"]


async def test_it_follows_by_one_stream_and_asks_at_most_three_times(page: Page, fleet: Rig) -> None:
    asked: list[str] = []

    def note(request: Request) -> None:
        if request.resource_type in ("fetch", "xhr", "eventsource"):
            asked.append(request.url.rpartition("/admin/")[2])

    page.on("request", note)
    await page.goto(f"{fleet.dashboard}#overview")
    note_of_requests = figure(page, "Requests per second").locator(".stat-note")
    await note_of_requests.wait_for()
    before = await note_of_requests.inner_text()
    await expect(note_of_requests).not_to_have_text(before)  # nobody has asked again
    assert len(asked) <= 3, asked
    assert asked.count("events?topics=overview") == 1


async def test_another_time_is_chosen_by_keyboard_and_stays_in_the_address(visit: Visit) -> None:
    page = await visit("overview")
    for name in ("hour", "day", "week", "live"):
        button = page.get_by_role("button", name=name.capitalize(), exact=True)
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(button).to_have_attribute("aria-pressed", "true")
        await expect(page).to_have_url(re.compile(r"#overview$" if name == "live" else rf"window={name}$"))
        await expect(page.get_by_label("Models").last).to_be_visible()


@pytest.mark.parametrize("look", [LOOKS[0], LOOKS[-1]], indirect=True, ids=str)
async def test_trouble_is_named_with_a_way_to_it(visit: Visit, fleet: Rig, axe: Check) -> None:
    answer = await fleet.admin("POST", "/admin/replicas/code-pool/code-eu/drain")
    assert answer.status_code == 200, answer.text
    try:
        page = await visit("overview")
        finding = page.locator("[data-finding='replica code-pool/code-eu draining']")
        await expect(finding).to_contain_text("notice")
        await expect(finding).to_contain_text("Undrain it")
        await expect(page.get_by_label("Verdict")).to_contain_text("Healthy")  # somebody has meant to do it
        await axe(page)
        await finding.get_by_role("link").click()
        await expect(page).to_have_url(re.compile("#fleet/code-pool/code-eu$"))
    finally:
        await fleet.admin("POST", "/admin/replicas/code-pool/code-eu/undrain")
