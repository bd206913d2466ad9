"""Signing in and out in a browser: what the page says, what the cookie is, and what is left of either."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.browsing import Look, Problems, every_look, new_context, refused_by_policy, sign_in, watched_page
from tests.support.fleet_rig import Rig

Axe = Callable[[Page], Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="session")
async def stranger(browser: Browser, fleet: Rig, look: Look, problems: Problems) -> AsyncIterator[Page]:
    """A page of a browser in which nobody has signed in."""
    context = await new_context(browser, look)
    opened = await watched_page(context, problems)
    yield opened
    problems.found += await refused_by_policy(opened)
    await context.close()
    assert problems.unexpected == []


@every_look
async def test_a_stranger_sees_the_form_and_a_wrong_token_is_said_to_be(
    stranger: Page, fleet: Rig, problems: Problems, axe: Axe, look: Look
) -> None:
    await stranger.goto(fleet.dashboard)
    await expect(stranger.get_by_label("Token", exact=True)).to_be_focused()
    await axe(stranger)
    if str(look) == "wide-light":  # a few wrong ones from here, and nobody signs in for a while
        problems.expect("status of 401")
        await stranger.get_by_label("Token", exact=True).fill("not-the-token-of-this-gateway")
        await stranger.get_by_role("button", name="Sign in").click()
        await expect(stranger.get_by_role("alert")).to_contain_text("This is not a token of this gateway.")
        await axe(stranger)
    await expect(stranger.locator("nav")).to_have_count(0)


async def test_the_session_is_a_cookie_that_scripts_cannot_read_and_ends_with_signing_out(
    stranger: Page, fleet: Rig, problems: Problems
) -> None:
    await sign_in(stranger, fleet)
    (cookie,) = await stranger.context.cookies(fleet.admin_url)
    assert cookie["name"] == "__Host-tidegate"
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Strict")
    assert await stranger.evaluate("document.cookie") == ""
    stored = await stranger.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert fleet.token not in stored
    assert cookie["value"] not in stored
    await stranger.get_by_role("button", name="Sign out").click()
    await expect(stranger.get_by_label("Token", exact=True)).to_be_visible()
    assert await stranger.context.cookies(fleet.admin_url) == []
    secure = fleet.admin_url.replace("http:", "https:")
    kept: Any = {"name": cookie["name"], "value": cookie["value"], "secure": True, "url": secure}
    await stranger.context.add_cookies([kept])
    await stranger.reload()
    await expect(stranger.get_by_label("Token", exact=True)).to_be_visible()


async def test_whoever_comes_back_from_elsewhere_unknown_is_told_why(stranger: Page, fleet: Rig) -> None:
    for reason, said in (
        ("no_role", "have no role here"),
        ("expired", "too long ago"),
        ("%3Cimg%20src=x%3E", "did not work"),
    ):
        await stranger.goto(f"{fleet.dashboard}?signin={reason}")
        await expect(stranger.get_by_role("alert")).to_contain_text(said)
        await expect(stranger).to_have_url(fleet.dashboard)
