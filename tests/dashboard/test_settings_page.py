"""The page Settings: the effective configuration with origins, overrides and their undoing, a reload."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest_asyncio
import yaml
from playwright.async_api import Page, expect

from tests.support.browsing import Problems, Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]
WEIGHT = "/admin/replicas/chat-pool/eu-0/weight"
NAME = "backends.chat-pool.replicas.eu-0.weight"


@pytest_asyncio.fixture(loop_scope="session")
async def as_configured(fleet: Rig) -> AsyncIterator[None]:
    """Neither an override nor a changed file is left, whatever has become of the test."""
    text = fleet.gateway.config.read_text()
    yield
    version = (await fleet.admin("GET", "/admin/overrides")).json()["version"]
    await fleet.admin("DELETE", "/admin/overrides", **{"if-match": f'"{version}"'})
    fleet.gateway.config.write_text(text)
    assert (await fleet.admin("POST", "/admin/reload")).status_code == 200


async def override(fleet: Rig, path: str, body: Any) -> None:
    version = (await fleet.admin("GET", "/admin/overrides")).json()["version"]
    assert (await fleet.admin("PUT", path, body, **{"if-match": f'"{version}"'})).status_code == 200


@every_look
async def test_every_value_says_where_it_comes_from(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("settings")
    table = page.get_by_role("table", name="Settings")
    await expect(page.get_by_text("Nothing is changed")).to_be_visible()
    await page.get_by_role("searchbox", name="Search").fill("models.code.backend")
    row = table.get_by_role("row", name="models.code.backend")
    await expect(row).to_contain_text("code-pool")
    await expect(row).to_contain_text("tidegate.yaml:")
    await page.get_by_label("Where from").select_option("Everything")
    await page.get_by_role("searchbox", name="Search").fill("server.port")
    await expect(table.get_by_role("row", name="server.port")).to_contain_text("after a restart")
    await table.get_by_role("button", name="server.port").click()
    await expect(page.locator(".setting-detail")).to_contain_text("TCP port.")
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_no_secret_is_on_the_page(visit: Visit, fleet: Rig) -> None:
    page = await visit("settings")
    await page.get_by_label("Where from").select_option("Everything")
    await page.get_by_role("searchbox", name="Search").fill("token")
    row = page.get_by_role("table", name="Settings").get_by_role("row", name="admin.token not set")
    await expect(row).to_contain_text("(secret)")
    assert fleet.token not in await page.content()


async def test_an_override_is_listed_taken_back_and_undone(
    visit: Visit, fleet: Rig, axe: Axe, as_configured: None
) -> None:
    await override(fleet, WEIGHT, {"weight": 3})
    page = await visit("settings")
    card = page.get_by_role("region", name="Changed while running")
    row = card.get_by_role("table", name="Overrides", exact=True).get_by_role("row", name=NAME)
    for text in ("3", "1", "admin", "ago"):
        await expect(row).to_contain_text(text)
    await axe(page)
    await row.get_by_role("button", name=f"Take back {NAME}").click()
    await expect(row).to_have_count(0)
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(row).to_have_count(1)
    await card.get_by_role("button", name="Take back all").click()
    await page.get_by_role("dialog").get_by_role("button", name="Take back all").click()
    await expect(row).to_have_count(0)
    await card.get_by_text("Versions before").click()
    await card.get_by_role("button", name="Restore version").first.click()
    await page.get_by_role("dialog").get_by_role("button", name="Restore").click()
    await expect(row).to_have_count(1)


async def test_a_change_meanwhile_is_not_run_over(
    visit: Visit, fleet: Rig, problems: Problems, as_configured: None
) -> None:
    problems.expect("status of 412")
    await override(fleet, WEIGHT, {"weight": 3})
    page = await visit("settings")
    await override(fleet, WEIGHT, {"weight": 5})
    row = page.get_by_role("table", name="Overrides", exact=True).get_by_role("row", name=NAME)
    await row.get_by_role("button", name=f"Take back {NAME}").click()
    await expect(page.locator(".notice")).to_contain_text("Somebody else has changed something meanwhile")
    await expect(row).to_contain_text("5")


async def test_a_reload_says_what_changed_and_what_is_wrong(
    visit: Visit, fleet: Rig, problems: Problems, as_configured: None
) -> None:
    problems.expect("status of 409")
    config = fleet.gateway.config
    content = yaml.safe_load(config.read_text())
    content["models"]["code"]["policy"] = "least_outstanding"
    content.setdefault("server", {})["max_connections"] = 77
    config.write_text(yaml.safe_dump(content))
    page = await visit("settings")
    await page.get_by_role("button", name="Reload configuration").click()
    done = page.get_by_role("region", name="Reloaded")
    await expect(done.get_by_role("row", name="models.code.policy")).to_contain_text("least_outstanding")
    await expect(done).to_contain_text("Waits for a restart: server.max_connections")
    config.write_text(config.read_text() + "modls: {}\n")
    await page.get_by_role("button", name="Reload configuration").click()
    refused = page.get_by_role("region", name="Not reloaded")
    await expect(refused).to_contain_text("modls")
    await expect(refused).to_contain_text("did you mean models?")
