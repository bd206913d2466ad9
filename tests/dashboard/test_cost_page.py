"""The page of costs: figures of requests that went through the gateway, added up by tenant, model and backend."""

from __future__ import annotations

import csv
from collections.abc import Awaitable, Callable
from pathlib import Path

from playwright.async_api import Page, expect

from tests.support.browsing import Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


@every_look
async def test_tokens_and_dollars_by_tenant(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("cost")
    for tenant in ("acme", "globex", "initech"):
        row = page.get_by_role("table", name="Cost by tenant").get_by_role("row").filter(has_text=tenant)
        await expect(row).to_have_count(1)
    await expect(page.locator(".stat").filter(has_text="Dollars").locator(".stat-value")).to_contain_text("$")
    await expect(page.get_by_role("img", name="Dollars, own and rented")).to_have_count(1)
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_figures_agree_with_the_api_whatever_they_are_added_up_by(visit: Visit, fleet: Rig) -> None:
    await fleet.trickle(None)
    await fleet.send(6)
    page = await visit("cost?window=hour")
    for choice, by in (("By model", "model"), ("By backend", "backend"), ("By tenant", "tenant")):
        await page.get_by_role("button", name=choice).click()
        await expect(page.get_by_role("table", name=f"Cost by {by}")).to_have_count(1)
        answer = (await fleet.admin("GET", f"/admin/cost?by={by}&window=hour")).json()
        names = await page.locator(".table-place tbody td:first-child").all_inner_texts()
        assert sorted(names) == sorted(row["name"] for row in answer["rows"])
        assert sum(round(row["usd"] * 1e6) for row in answer["rows"]) == round(answer["totals"]["usd"] * 1e6)
    await page.get_by_role("button", name="Week").click()
    await expect(page).to_have_url(f"{fleet.dashboard}#cost?by=tenant&window=week")


async def test_the_table_is_exported_as_csv(visit: Visit, fleet: Rig, tmp_path: Path) -> None:
    page = await visit("cost?by=model&window=day")
    async with page.expect_download() as waiting:
        await page.get_by_role("link", name="Export CSV").click()
    download = await waiting.value
    assert download.suggested_filename == "tidegate-cost-by-model-day.csv"
    await download.save_as(tmp_path / "cost.csv")
    with (tmp_path / "cost.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["chat"]["usd"]) > 0
    assert int(rows["chat"]["prompt_tokens"]) > 1000
