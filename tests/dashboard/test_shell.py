"""The frame around every page: signing in and out, going from page to page with mouse and keys, themes, connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.browsing import LOOKS, Look, Problems, Visit, every_look, new_context, settled, sign_in, watched_page
from tests.support.fleet_rig import Rig


@pytest_asyncio.fixture(loop_scope="session")
async def stranger(browser: Browser, fleet: Rig, look: Look, problems: Problems) -> AsyncIterator[Page]:
    """A page of somebody who has not signed in."""
    problems.expect("status of 401")
    context = await new_context(browser, look)
    yield await watched_page(context, problems)
    await context.close()
    assert problems.unexpected == []


@every_look
async def test_a_stranger_is_asked_to_sign_in_and_can_sign_out_again(
    stranger: Page, fleet: Rig, axe: Callable[[Page], Awaitable[None]]
) -> None:
    await stranger.goto(fleet.dashboard)
    field = stranger.locator("input[type=password]")
    await field.wait_for()
    await axe(stranger)
    await field.fill("wrong")
    await stranger.keyboard.press("Enter")
    await expect(stranger.get_by_role("alert")).to_be_visible()
    await sign_in(stranger, fleet)
    await settled(stranger)
    if await stranger.get_by_role("button", name="More").is_visible():
        await stranger.get_by_role("button", name="More").click()
    await stranger.get_by_role("button", name="Sign out").click()
    await expect(stranger.locator("input[type=password]")).to_be_visible()
    await stranger.reload()
    await expect(stranger.locator("input[type=password]")).to_be_visible()


async def test_letters_after_g_go_to_pages(visit: Visit) -> None:
    page = await visit("overview")
    for letter, heading in (("f", "Fleet"), ("s", "Settings"), ("o", "Overview")):
        await page.keyboard.press("g")
        await page.keyboard.press(letter)
        await expect(page.locator("main h1")).to_have_text(heading)
        await expect(page.locator("nav a[aria-current=page]")).to_have_count(1)


async def test_the_keys_are_listed_and_do_nothing_while_somebody_writes(visit: Visit) -> None:
    page = await visit("fleet")
    await page.keyboard.press("?")
    shortcuts = page.get_by_role("dialog")
    await expect(shortcuts).to_contain_text("Search on this page")
    await page.keyboard.press("Escape")
    await expect(shortcuts).to_have_count(0)
    await page.keyboard.press("/")
    search = page.get_by_role("searchbox")
    await expect(search).to_be_focused()
    await page.keyboard.type("go?")
    await expect(search).to_have_value("go?")
    await expect(page.locator("main h1")).to_have_text("Fleet")


async def test_the_list_of_pages_is_walked_by_keys_and_leads_into_the_page(visit: Visit) -> None:
    page = await visit("overview")
    await page.keyboard.press("Tab")
    await expect(page.get_by_text("Skip to content")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("main")).to_be_focused()
    await page.get_by_role("link", name="Fleet").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("main h1")).to_have_text("Fleet")
    await expect(page.locator("main h1")).to_be_focused()


async def test_a_theme_is_kept_and_auto_follows_the_system(visit: Visit) -> None:
    page = await visit("overview")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = await page.evaluate(background)
    await page.get_by_label("Theme").select_option("dark")
    await page.wait_for_function(f"{background} !== '{light}'")
    dark = await page.evaluate(background)
    await page.reload()
    await settled(page)
    assert await page.evaluate(background) == dark
    await page.get_by_label("Theme").select_option("auto")
    await page.wait_for_function(f"{background} === '{light}'")
    await page.emulate_media(color_scheme="dark")
    await page.wait_for_function(f"{background} === '{dark}'")


async def test_the_state_of_the_event_stream_is_told(visit: Visit, problems: Problems) -> None:
    problems.expect("ERR_INTERNET_DISCONNECTED|net::|Failed to load resource")
    page = await visit("fleet")
    told = page.locator(".connection")
    await expect(told).to_contain_text("Live")
    await page.route("**/admin/events*", lambda route: route.abort())
    await page.evaluate("window.dispatchEvent(new Event('offline'))")
    await page.goto("about:blank")
    await page.go_back()
    await settled(page)
    await expect(told).to_contain_text("lost")


async def test_whoever_is_signed_out_elsewhere_signs_in_again_and_is_back_at_the_page(
    stranger: Page, fleet: Rig
) -> None:
    """As after a restart of the gateway, which forgets its sessions."""
    await sign_in(stranger, fleet)
    await stranger.goto(f"{fleet.dashboard}#fleet?shade=kv")
    await settled(stranger)
    await expect(stranger.locator(".connection")).to_contain_text("Live")
    await stranger.evaluate("fetch('session', {method: 'DELETE', headers: {'x-tidegate-csrf': '1'}})")
    await stranger.locator("input[type=password]").fill(fleet.token)
    await stranger.keyboard.press("Enter")
    await expect(stranger.locator("h1")).to_have_text("Fleet")
    await expect(stranger.locator(".connection")).to_contain_text("Live")
    assert stranger.url.endswith("#fleet?shade=kv")


async def test_a_page_that_does_not_change_by_itself_does_not_look_disconnected(visit: Visit) -> None:
    page = await visit("audit")
    await expect(page.locator(".connection")).to_have_text("")


async def test_a_page_that_does_not_exist_says_so(visit: Visit) -> None:
    page = await visit("nothing")
    await expect(page.get_by_role("alert")).to_contain_text("There is no page nothing")
    await expect(page.get_by_role("link", name="Overview", exact=True)).to_be_visible()


async def test_a_narrow_screen_has_the_further_pages_behind_a_button(
    visit: Visit, browser: Browser, page: Page, fleet: Rig
) -> None:
    narrow = next(look for look in LOOKS if look.width < 800)
    await page.set_viewport_size({"width": narrow.width, "height": narrow.height})
    await visit("overview")
    audit = page.get_by_role("link", name="Audit")
    await expect(audit).to_be_hidden()
    await page.get_by_role("button", name="More").click()
    await audit.click()
    await expect(page.locator("main h1")).to_have_text("Audit")
    await expect(audit).to_be_hidden()
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
