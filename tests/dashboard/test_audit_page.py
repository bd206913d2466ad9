"""The page Audit: who did what, found and read; and the warning that entries are missing."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable

from playwright.async_api import Page, expect

from tests.support.browsing import Visit, every_look
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


@every_look
async def test_what_was_done_is_listed_and_opened_with_its_diff(visit: Visit, fleet: Rig, axe: Axe) -> None:
    made = (await fleet.admin("POST", "/admin/keys", {"tenant": "acme", "name": "for the audit"})).json()
    await fleet.admin("PATCH", f"/admin/keys/{made['id']}", {"name": "<b>renamed</b>"})
    page = await visit("audit")
    row = page.get_by_role("row").filter(has_text=made["id"]).filter(has_text="key.update")
    await expect(row).to_contain_text("for the audit → <b>renamed</b>")
    await row.get_by_role("button").first.click()
    entry = page.get_by_role("region", name="Entry")
    await expect(entry.get_by_role("row", name="name")).to_contain_text("<b>renamed</b>")
    await expect(entry.locator("b")).to_have_count(0)
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    await fleet.admin("DELETE", f"/admin/keys/{made['id']}")


async def test_entries_are_filtered_and_a_filter_is_an_address(visit: Visit, fleet: Rig) -> None:
    made = (await fleet.admin("POST", "/admin/keys", {"tenant": "globex"}, **{"x-tidegate-actor": "zoe"})).json()
    page = await visit("audit")
    await page.get_by_label("Actor").fill("ZOE")
    await page.get_by_role("button", name="Filter").click()
    table = page.get_by_role("table")
    await expect(table.get_by_text("admin:zoe").first).to_be_visible()
    await expect(table.get_by_text("session:admin")).to_have_count(0)
    await page.get_by_label("Action").select_option(label="Tenants")
    await expect(page.get_by_text("No entry is like that")).to_be_visible()
    await page.get_by_role("button", name="Show everything").click()
    await expect(table.get_by_text("session:admin").first).to_be_visible()
    page = await visit(f"audit?object={made['id']}&action=key.")
    await expect(page.get_by_label("Object")).to_have_value(made["id"])
    await expect(table.get_by_text("key.create")).to_be_visible()
    await fleet.admin("DELETE", f"/admin/keys/{made['id']}")


async def test_one_turns_the_pages(visit: Visit, fleet: Rig) -> None:
    made = (await fleet.admin("POST", "/admin/keys", {"tenant": "acme", "name": "0"})).json()
    for index in range(1, 56):
        await fleet.admin("PATCH", f"/admin/keys/{made['id']}", {"name": str(index)})
    page = await visit(f"audit?object={made['id']}")
    await expect(page.get_by_text("name: 54 → 55")).to_be_visible()
    await expect(page.get_by_role("button", name="Newer")).to_be_disabled()
    await page.get_by_role("button", name="Older").click()
    await expect(page.get_by_text("key.create")).to_be_visible()
    await expect(page.get_by_role("button", name="Older")).to_be_disabled()
    await page.get_by_role("button", name="Newer").click()
    await expect(page.get_by_text("name: 54 → 55")).to_be_visible()
    await fleet.admin("DELETE", f"/admin/keys/{made['id']}")


async def test_what_somebody_has_taken_out_is_missed(visit: Visit, fleet: Rig) -> None:
    answer = (await fleet.admin("GET", "/admin/audit?limit=3")).json()
    assert answer["missing"] == []
    gone = answer["data"][1]["id"]
    file = fleet.gateway.config.parent / "tidegate.db"
    with sqlite3.connect(file, timeout=20) as own:
        (row,) = own.execute("SELECT * FROM tidegate_audit WHERE id = ?", (gone,)).fetchall()
        (trigger,) = own.execute("SELECT sql FROM sqlite_master WHERE name = 'tidegate_audit_delete'").fetchone()
        own.execute("DROP TRIGGER tidegate_audit_delete")
        own.execute("DELETE FROM tidegate_audit WHERE id = ?", (gone,))
    try:
        page = await visit("audit")
        warning = page.get_by_role("alert")
        await expect(warning).to_contain_text("Entries are missing.")
        await expect(warning).to_contain_text(str(gone))
    finally:
        with sqlite3.connect(file, timeout=20) as own:
            own.execute(f"INSERT INTO tidegate_audit VALUES ({','.join('?' * len(row))})", row)
            own.execute(trigger)
        own.close()
    await page.get_by_role("button", name="Refresh").click()
    await expect(page.get_by_role("alert")).to_have_count(0)
