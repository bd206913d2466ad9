"""The page of tenants and keys: found among ten thousand, made, changed, taken back, and ended."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest_asyncio
from playwright.async_api import Page, expect

from tests.support.browsing import Problems, Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]
MANY = 10_000


@pytest_asyncio.fixture(loop_scope="session")
async def made(fleet: Rig) -> AsyncIterator[Callable[..., Awaitable[dict[str, Any]]]]:
    """Makes keys that are gone after the test."""
    tenants: list[str] = []

    async def make(**fields: Any) -> dict[str, Any]:
        tenants.append(fields["tenant"])
        answer = await fleet.admin("POST", "/admin/keys", fields)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    yield make
    for tenant in {*tenants, "fresh"}:
        for key in (await fleet.admin("GET", f"/admin/keys?tenant={tenant}")).json()["data"]:
            await fleet.admin("DELETE", f"/admin/keys/{key['id']}")
        await fleet.admin("DELETE", f"/admin/tenants/{tenant}")


@every_look
async def test_keys_and_tenants_are_listed(visit: Visit, fleet: Rig, axe: Axe) -> None:
    page = await visit("tenants")
    await expect(page.get_by_role("button", name="nightly batch")).to_have_count(1)
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    await page.get_by_role("button", name="nightly batch").click()
    await expect(page.get_by_label("Requests a minute")).to_have_value("1")
    await axe(page)
    await page.get_by_role("button", name="Tenants").click()
    await expect(page.get_by_role("button", name="initech")).to_have_count(1)
    await page.get_by_role("button", name="initech").click()
    await expect(page.get_by_label("Weight")).to_have_value("1")
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_a_key_is_made_shown_once_and_opens_the_gateway(visit: Visit, fleet: Rig, made: object) -> None:
    page = await visit("tenants")
    await page.get_by_role("button", name="New key").click()
    form = page.get_by_role("form", name="New key")
    await form.get_by_label("Tenant").fill("fresh")
    await form.get_by_label("Name", exact=True).fill("<b>made</b> in a browser")
    await form.get_by_label("Models").fill("chat, code")
    await form.get_by_label("Dollars a day").fill("2.5")
    await form.get_by_role("button", name="Create key").click()
    dialog = page.get_by_role("dialog")
    key = await dialog.locator("code").inner_text()
    await dialog.get_by_role("button", name="I have it").click()
    await expect(page.get_by_role("button", name="<b>made</b> in a browser")).to_have_count(1)
    assert key not in await page.content()
    (stored,) = (await fleet.admin("GET", "/admin/keys?tenant=fresh")).json()["data"]
    assert (stored["models"], stored["limits"]) == (["chat", "code"], {"usd_per_day": 2.5})
    fleet.keys["fresh"] = key
    assert (await fleet.ask("fresh")).status_code == 200


async def test_a_refused_field_says_why_beside_it(visit: Visit, problems: Problems, made: object) -> None:
    problems.expect("status of 400")
    page = await visit("tenants")
    await page.get_by_role("button", name="New key").click()
    form = page.get_by_role("form", name="New key")
    await form.get_by_label("Tenant").fill("fresh")
    await form.get_by_label("Expires").fill("whenever")
    await form.get_by_role("button", name="Create key").click()
    await expect(form.get_by_label("Expires")).to_have_attribute("aria-invalid", "true")
    await expect(form.get_by_role("alert")).to_contain_text("expires")


async def test_tenants_say_that_the_configuration_may_limit_them_too(visit: Visit) -> None:
    page = await visit("tenants?view=tenants")
    await expect(page.locator(".lead")).to_contain_text("what the configuration says")
    await page.locator(".lead").get_by_role("link", name="Limits").click()
    await expect(page.locator("h1")).to_have_text("Limits")


async def test_a_gateway_without_keys_says_so_and_offers_none(visit: Visit, page: Page, problems: Problems) -> None:
    problems.expect("status of 409")
    refusal = {"error": {"code": "keys_off", "message": "This gateway runs without API keys; set auth: keys."}}
    await page.route("**/admin/keys?*", lambda route: route.fulfill(status=409, json=refusal))
    await visit("tenants")
    await expect(page.get_by_text("Nobody is asked for a key")).to_be_visible()
    await expect(page.get_by_text("set auth: keys")).to_be_visible()
    await expect(page.get_by_role("alert")).to_have_count(0)
    await expect(page.get_by_role("button", name="New key")).to_have_count(0)


async def test_a_key_is_edited_disabled_and_taken_back(
    visit: Visit, fleet: Rig, made: Callable[..., Awaitable[dict[str, Any]]]
) -> None:
    key = await made(tenant="fresh", name="to edit", limits={"requests_per_minute": 9})
    path = f"/admin/keys/{key['id']}"
    page = await visit(f"tenants/{key['id']}")
    await page.get_by_label("Requests a minute").fill("")
    await page.get_by_label("Requests at once").fill("3")
    await page.get_by_role("button", name="Save changes").click()
    notice = page.locator(".notice", has_text="Saved to edit")
    await expect(notice).to_have_count(1)
    assert (await fleet.admin("GET", path)).json()["limits"] == {"concurrent_requests": 3}
    await notice.get_by_role("button", name="Undo").click()
    await expect(page.get_by_label("Requests a minute")).to_have_value("9")
    assert (await fleet.admin("GET", path)).json()["limits"] == {"requests_per_minute": 9}
    await page.get_by_role("button", name="Disable").click()
    await expect(page.locator(".key-line")).to_contain_text("disabled")
    assert (await fleet.admin("GET", path)).json()["disabled"] is True
    await page.get_by_role("button", name="Enable").click()
    await expect(page.locator(".key-line")).to_contain_text("valid")


async def test_whoever_was_slower_chooses(
    visit: Visit, fleet: Rig, problems: Problems, made: Callable[..., Awaitable[dict[str, Any]]]
) -> None:
    problems.expect("status of 412")
    key = await made(tenant="fresh", name="contested")
    path = f"/admin/keys/{key['id']}"
    page = await visit(f"tenants/{key['id']}")
    await page.get_by_label("Models").fill("chat")
    await fleet.admin("PATCH", path, {"class": "batch"})
    await page.get_by_role("button", name="Save changes").click()
    conflict = page.get_by_role("alert")
    await expect(conflict).to_contain_text('is now "batch"')
    assert (await fleet.admin("GET", path)).json()["models"] is None
    await conflict.get_by_role("button", name="Save mine on top").click()
    await expect(conflict).to_have_count(0)
    stored = (await fleet.admin("GET", path)).json()
    assert (stored["models"], stored["class"]) == (["chat"], "batch")
    await page.get_by_label("Models").fill("code")
    await fleet.admin("PATCH", path, {"class": "critical"})
    await page.get_by_role("button", name="Save changes").click()
    await conflict.get_by_role("button", name="Show theirs").click()
    await expect(page.get_by_label("Models")).to_have_value("chat")
    await expect(page.get_by_label("Class")).to_have_value("critical")


async def test_a_key_is_rotated_and_revoked(
    visit: Visit, fleet: Rig, made: Callable[..., Awaitable[dict[str, Any]]]
) -> None:
    key = await made(tenant="fresh", name="to end")
    page = await visit(f"tenants/{key['id']}")
    await page.get_by_role("button", name="Rotate").click()
    await page.get_by_role("dialog").get_by_role("button", name="Rotate").click()
    await page.get_by_role("dialog").get_by_role("button", name="I have it").click()
    await expect(page.locator(".key-line")).to_contain_text("replaced by")
    await page.get_by_role("button", name="Revoke").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("button", name="Revoke")).to_be_disabled()
    await dialog.get_by_role("textbox").fill("to end")
    await dialog.get_by_role("button", name="Revoke").click()
    await expect(page.locator(".notice")).to_contain_text(["takes the place of", "Revoked to end"])
    assert (await fleet.admin("GET", f"/admin/keys/{key['id']}")).status_code == 404


async def test_a_tenant_is_limited_and_disabled(
    visit: Visit, fleet: Rig, made: Callable[..., Awaitable[dict[str, Any]]]
) -> None:
    await made(tenant="fresh")
    page = await visit("tenants?view=tenants&name=fresh")
    await page.get_by_label("Weight").fill("4")
    await page.get_by_label("Dollars a month").first.fill("70")
    await page.get_by_role("button", name="Save changes").click()
    await expect(page.locator(".notice")).to_contain_text("Saved fresh")
    stored = (await fleet.admin("GET", "/admin/tenants/fresh")).json()
    assert (stored["weight"], stored["limits"], stored["user_limits"]) == (4.0, {"usd_per_month": 70.0}, {})
    await expect(page.get_by_role("button", name="Remove")).to_be_disabled()
    await page.get_by_role("button", name="Disable").click()
    await page.get_by_role("dialog").get_by_role("button", name="Disable").click()
    await expect(page.locator(".key-line")).to_contain_text("disabled")
    await page.get_by_role("button", name="Enable").click()
    await expect(page.locator(".key-line")).to_contain_text("enabled")


async def test_one_of_ten_thousand_keys_is_found_while_typing(visit: Visit, fleet: Rig) -> None:
    file = next(fleet.gateway.config.parent.glob("tidegate.db"))
    template = "SELECT * FROM tidegate_keys LIMIT 1"
    with sqlite3.connect(file, timeout=20) as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute(template).fetchone())
        rows = [
            {**row, "id": f"key_many{number:012d}", "digest": number.to_bytes(32, "big"), "name": f"many {number}",
             "created_unix_s": 1e9 + number, "version": 1, "tenant": f"many-{number % 100}"}
            for number in range(MANY)
        ]  # fmt: skip
        names = ", ".join(row)
        database.executemany(
            f"INSERT INTO tidegate_keys ({names}) VALUES ({', '.join(':' + name for name in row)})", rows
        )
    database.close()
    try:
        begun = time.monotonic()
        page = await visit("tenants")
        await expect(page.locator(".list-foot")).to_contain_text("100 of 10 k keys")
        shown_s = time.monotonic() - begun
        await page.get_by_label("Find").fill("many 9999")
        await expect(page.locator(".list-foot")).to_contain_text("1 of 1 keys")
        await expect(page.get_by_role("button", name="many 9999")).to_have_count(1)
        assert shown_s < 10  # 0.3 s on an idle machine
        await page.get_by_label("Find").fill("")
        await page.get_by_role("button", name="Show more").click()
        await expect(page.locator(".list-foot")).to_contain_text("200 of 10 k keys")
    finally:
        with sqlite3.connect(file, timeout=20) as database:
            database.execute("DELETE FROM tidegate_keys WHERE id LIKE 'key_many%'")
        database.close()
