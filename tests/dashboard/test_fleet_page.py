"""The map of the fleet: what its cells and its panel say, and what can be ordered by click."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.support.browsing import LOOKS, NARROW, WIDE, Problems, Visit, every_look, new_context, sign_in
from tests.support.fleet_rig import FOUND_FILE, OWN, READER_TOKEN, Rig, paced_engine

Axe = Callable[..., Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="session")
async def restored(fleet: Rig) -> AsyncIterator[None]:
    """What a test drains takes work again afterwards, whatever has become of the test."""
    yield
    for replica in (await fleet.admin("GET", "/admin/replicas")).json()["replicas"]:
        if replica["draining"]:
            await fleet.admin("POST", f"/admin/replicas/{replica['pool']}/{replica['replica']}/undrain")
        if replica["cordoned"]:
            await fleet.admin("POST", f"/admin/replicas/{replica['pool']}/{replica['replica']}/uncordon")


@pytest_asyncio.fixture(loop_scope="session")
async def newcomer(fleet: Rig) -> AsyncIterator[FakeEngine]:
    """An engine that no gateway knows; what has registered in a test is gone afterwards."""
    engine = paced_engine(OWN["eu-0"][1], "chat", native=True)
    await fleet.run(engine.__aenter__)
    yield engine
    for each in (await fleet.admin("GET", "/admin/members")).json()["pools"]:
        for member in each["members"]:
            if member["source"] == "registration":
                await fleet.admin("DELETE", f"/admin/registrations/{each['pool']}/{member['name']}")
    await fleet.run(lambda: engine.__aexit__(None, None, None))


@pytest_asyncio.fixture(loop_scope="session")
async def found_file(fleet: Rig) -> AsyncIterator[Callable[[str], None]]:
    """Writes the file in which `code-pool` looks for more replicas; it is as before afterwards."""
    path = fleet.folder / FOUND_FILE

    def write(text: str) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(path)

    yield write
    write("[]")


@every_look
async def test_the_map_shows_every_replica_in_its_region_and_the_panel_all_about_one(
    visit: Visit, fleet: Rig, axe: Axe
) -> None:
    page = await visit("fleet")
    for region, names in (("eu-west", ("eu-0", "code-eu")), ("us-east", ("us-0", "code-us", "rented-0"))):
        card = page.get_by_role("region", name=region)
        for name in names:
            await expect(card.locator(".cell", has_text=name)).to_have_count(1)
    await expect(page.locator(".lead")).to_contain_text("5 replicas in 2 regions: all take work")
    await page.locator(".cell", has_text="eu-0").click()
    panel = page.get_by_role("complementary", name="Replica eu-0")
    await expect(panel.get_by_role("heading", name="eu-0")).to_be_focused()
    for text in ("It takes work.", "support-v3", "sglang 0.5.23", "Warm prefixes", "tokens/s", "1 of 4"):
        await expect(panel).to_contain_text(text)
    await axe(page)
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"


async def test_what_engines_hold_comes_from_requests_through_the_inference_port(visit: Visit, fleet: Rig) -> None:
    page = await visit("fleet")
    state = (await fleet.admin("GET", "/admin/fleet/replicas/chat-pool/eu-0")).json()
    assert state["prefix_index"]["tokens"] > 1000
    assert state["load"]["kv_use"] > 0
    said = await page.locator(".cell", has_text="eu-0").get_attribute("aria-label")
    assert said is not None
    assert re.search(r"eu-0: taking work, \d+ of 16 in flight, KV cache \d+ %, [\d.,]+ ?k? warm tokens", said), said


async def test_a_replica_is_drained_and_undrained_by_click(visit: Visit, fleet: Rig, restored: None) -> None:
    page = await visit("fleet/chat-pool/us-0")
    panel = page.get_by_role("complementary")
    await panel.get_by_role("button", name="Drain").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("button", name="Cancel").click()
    await expect(dialog).to_have_count(0)
    await panel.get_by_role("button", name="Drain").click()
    await dialog.get_by_role("button", name="Drain").click()
    await expect(panel).to_contain_text("Drained by an operator")
    await expect(page.locator(".cell", has_text="us-0")).to_contain_text("drained")
    assert (await fleet.admin("GET", "/admin/replicas/chat-pool/us-0")).json()["draining"] is True
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(page.locator(".cell", has_text="us-0")).to_contain_text("taking work")
    await panel.get_by_role("button", name="Drain").click()
    await dialog.get_by_role("button", name="Drain").click()
    await panel.get_by_role("button", name="Undrain").click()
    await expect(page.locator(".cell", has_text="us-0")).to_contain_text("taking work")
    assert (await fleet.admin("GET", "/admin/replicas/chat-pool/us-0")).json()["draining"] is False


async def test_the_last_replica_of_a_pool_is_drained_only_by_writing_its_name(
    visit: Visit, fleet: Rig, restored: None
) -> None:
    page = await visit("fleet/rented/rented-0")
    await page.get_by_role("button", name="Drain").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("the last replica of rented")
    await expect(dialog.get_by_role("button", name="Drain")).to_be_disabled()
    await dialog.get_by_role("textbox").fill("rented-0")
    await dialog.get_by_role("button", name="Drain").click()
    await expect(page.get_by_role("button", name="Undrain")).to_be_visible()


async def test_a_weight_is_set_and_undone(visit: Visit, fleet: Rig) -> None:
    page = await visit("fleet/code-pool/code-us")
    await page.get_by_role("button", name="Weight 1").click()
    await page.get_by_label("Weight").fill("2.5")
    await page.get_by_role("button", name="Set").click()
    await expect(page.get_by_role("button", name="Weight 2.5")).to_be_visible()
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(page.get_by_role("button", name="Weight 1")).to_be_visible()


async def test_adapters_are_loaded_and_unloaded_and_a_refusal_is_shown(
    visit: Visit, fleet: Rig, problems: Problems
) -> None:
    problems.expect("status of 409")
    page = await visit("fleet/chat-pool/us-0")
    panel = page.get_by_role("complementary")
    await panel.get_by_role("button", name="Load an adapter").click()
    await panel.get_by_label("Name").fill("poet")
    await panel.get_by_label("Path").fill("/missing/poet")
    await panel.get_by_role("button", name="Load", exact=True).click()
    await expect(panel.get_by_role("alert")).to_contain_text("does not exist")
    await panel.get_by_label("Path").fill("/adapters/poet")
    await panel.get_by_role("button", name="Load", exact=True).click()
    await expect(panel.get_by_role("listitem").filter(has_text="poet")).to_be_visible()
    await panel.get_by_role("button", name="Unload poet").click()
    await page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    await expect(panel.get_by_role("listitem").filter(has_text="poet")).to_have_count(0)


async def test_a_replica_that_is_not_well_says_why_by_itself(visit: Visit, fleet: Rig) -> None:
    page = await visit("fleet")
    engine = fleet.engines["code-us"]

    async def fall_ill() -> None:
        engine.probe = Behaviour(status=503)

    async def recover() -> None:
        engine.probe = Behaviour()

    await fleet.run(fall_ill)
    try:
        await expect(page.locator(".cell", has_text="code-us")).to_contain_text("not used")
        await page.locator(".cell", has_text="code-us").click()
        await expect(page.get_by_role("complementary")).to_contain_text("Look at the engine's log")
    finally:
        await fleet.run(recover)
    await expect(page.locator(".cell", has_text="code-us")).not_to_contain_text("not used")


async def test_the_map_is_searched_and_shown_as_a_table_and_walked_by_arrows(visit: Visit) -> None:
    page = await visit("fleet")
    await page.get_by_role("searchbox").fill("us-east chat")
    await expect(page.locator(".cell")).to_have_count(1)
    await page.get_by_role("searchbox").fill("no such thing")
    await expect(page.get_by_text("Nothing matches")).to_be_visible()
    await page.get_by_role("searchbox").fill("")
    await page.get_by_role("button", name="Table").click()
    await expect(page.get_by_role("row")).to_have_count(6)
    await page.get_by_role("columnheader", name="Load").get_by_role("button").click()
    await page.get_by_role("button", name="code-eu").click()
    await expect(page.get_by_role("complementary", name="Replica code-eu")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("complementary")).to_have_count(0)


async def test_an_unknown_replica_is_told_with_those_that_there_are(visit: Visit, problems: Problems) -> None:
    problems.expect("status of 404")
    page = await visit("fleet/chat-pool/none")
    await expect(page.get_by_role("complementary")).to_contain_text("has no replica 'none'; there are: eu-0, us-0")


async def test_who_may_only_look_is_offered_nothing_to_order(browser: Browser, fleet: Rig) -> None:
    context = await new_context(browser, LOOKS[0])
    page = await context.new_page()
    await sign_in(page, fleet, READER_TOKEN)
    await page.goto(f"{fleet.dashboard}#fleet/chat-pool/eu-0")
    panel = page.get_by_role("complementary", name="Replica eu-0")
    await expect(panel).to_contain_text("support-v3")
    assert await panel.get_by_role("button").all_inner_texts() == ["Close", "Copy"]
    await context.close()


async def sound_in_every_look(page: Page, axe: Axe) -> None:
    for width, height in (NARROW, WIDE):
        await page.set_viewport_size({"width": width, "height": height})
        for theme in ("dark", "light"):
            await page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
            await axe(page, "color-contrast" if theme == "dark" else None)
        sideways = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert sideways <= 0, f"it scrolls sideways by {sideways} px on a screen of {width}"


async def test_a_replica_that_registers_is_seen_while_it_starts_and_then_takes_work(
    visit: Visit, fleet: Rig, newcomer: FakeEngine, axe: Axe
) -> None:
    async def register(state: str, **more: Any) -> None:
        body = {"url": newcomer.url, "state": state, "agent": "gpu7", **more}
        answer = await fleet.admin("PUT", "/admin/registrations/chat-pool/new-0", body)
        assert answer.status_code == 200, answer.text

    page = await visit("fleet")
    await register("starting", phase="loading", progress=0.4, detail="shard 2 of 5", restarts=2)
    starting = page.get_by_role("region", name="Starting", exact=True)
    for text in ("new-0", "chat-pool", "loading weights, 40 %", "shard 2 of 5", "launched by gpu7", "again 2 times"):
        await expect(starting).to_contain_text(text)
    await expect(page.locator(".lead")).to_contain_text("1 more replica is starting")
    await expect(page.locator(".cell", has_text="new-0")).to_have_count(0)
    await sound_in_every_look(page, axe)
    await register("starting", phase="compiling", progress=0.9)
    await expect(starting.get_by_role("meter", name="Start of new-0")).to_have_attribute("aria-valuenow", "90")
    await expect(starting).to_contain_text("compiling, 90 %")
    await register("ready", started_in_s=41.5)
    # A new one gets a growing part of what the others get.
    await expect(page.locator(".cell", has_text="new-0")).to_contain_text(re.compile("coming back|taking work"))
    await expect(starting).to_have_count(0)
    sources = page.get_by_role("region", name="Where replicas come from")
    await expect(sources.get_by_role("listitem").filter(has_text="Registration").last).to_contain_text("1 replica")
    await page.locator(".cell", has_text="new-0").click()
    panel = page.get_by_role("complementary", name="Replica new-0")
    for text in ("Registration, by themselves", "gpu7", "41.5 s", "unless it is renewed"):
        await expect(panel).to_contain_text(text)
    await fleet.admin("DELETE", "/admin/registrations/chat-pool/new-0")
    await expect(page.locator(".cell", has_text="new-0")).to_have_count(0)
    await expect(panel).to_contain_text("no longer in the pool")
    await expect(panel.get_by_role("button", name="Drain")).to_have_count(0)


async def test_a_source_in_trouble_says_so_and_what_it_left_out_says_why(
    visit: Visit, fleet: Rig, found_file: Callable[[str], None], axe: Axe
) -> None:
    page = await visit("fleet")
    found_file(json.dumps([{"url": fleet.engines["code-eu"].url, "name": "twin"}]))
    left_out = page.get_by_role("region", name="Left out")
    await expect(left_out).to_contain_text("twin")
    await expect(left_out).to_contain_text("the configuration calls it code-eu")
    found_file('[{"url": ')
    trouble = page.get_by_role("alert").filter(has_text="code-pool")
    await expect(trouble).to_contain_text("The replicas of code-pool cannot be looked up (File)")
    await expect(trouble).to_contain_text("not valid JSON")
    await expect(trouble).to_contain_text("holds: 1 replica")
    await sound_in_every_look(page, axe)
    found_file("[]")
    await expect(trouble).to_have_count(0)
    await expect(left_out).to_have_count(0)


async def test_a_replica_is_cordoned_and_uncordoned_by_click(visit: Visit, fleet: Rig, restored: None) -> None:
    async def cordoned() -> list[str]:
        listed = (await fleet.admin("GET", "/admin/replicas")).json()["replicas"]
        return [each["replica"] for each in listed if each["cordoned"]]

    page = await visit("fleet/chat-pool/us-0")
    panel, cell = page.get_by_role("complementary"), page.locator(".cell", has_text="us-0")
    await expect(panel).to_contain_text("Configuration")
    await panel.get_by_role("button", name="Cordon").click()
    await expect(panel).to_contain_text("Cordoned by an operator")
    await expect(cell).to_contain_text("cordoned")
    assert await cordoned() == ["us-0"]
    await page.locator(".notice").get_by_role("button", name="Undo").click()
    await expect(cell).to_contain_text("taking work")
    await panel.get_by_role("button", name="Cordon").click()
    await panel.get_by_role("button", name="Uncordon").click()
    await expect(cell).to_contain_text("taking work")
    assert await cordoned() == []
