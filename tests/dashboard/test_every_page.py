"""What is true of every page: nothing for axe-core to find on either screen in either theme, no error, nothing from
elsewhere, at most three calls, nothing that scrolls sideways. With SCREENSHOTS=folder the same run takes the pictures
of the documentation (`make screenshots`)."""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.async_api import Browser, Page, Request

from tests.support.browsing import (
    LOOKS,
    NARROW,
    WIDE,
    Problems,
    Visit,
    new_context,
    refused_by_policy,
    settled,
    sign_in,
    watched_page,
)
from tests.support.fleet_rig import Rig, fleet_rig

Axe = Callable[..., Awaitable[None]]
PAGES = (
    "fleet",
    "requests",
    "playground",
    "tenants",
    "limits",
    "cost",
    "policies",
    "scaling",
    "audit",
    "settings",
    "overview",  # the last, so that its charts have something to show in the picture
)
MAX_CALLS = 3
PICTURES = os.environ.get("SCREENSHOTS")
PICTURED = {*(f"{name}-light" for name in PAGES), "overview-dark", "overview-narrow-dark", "fleet-narrow-light"}
COLOURS = 256
"""A picture of a page has few; so it takes fewer bytes. Those of a thin line count as much as the others."""


async def picture(page: Page, name: str) -> None:
    if not PICTURES:
        return
    taken = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    path = Path(PICTURES) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    taken.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


@pytest.mark.parametrize("name", PAGES)
async def test_a_page_is_sound_on_both_screens_and_in_both_themes(
    name: str, visit: Visit, page: Page, fleet: Rig, axe: Axe
) -> None:
    calls: list[str] = []

    def called(request: Request) -> None:
        path = urlsplit(request.url).path
        if "/static/" not in path and path != "/admin/":
            calls.append(f"{request.method} {path}")

    page.on("request", called)
    if PICTURES:
        await fleet.send(100, at_once=16)
        await fleet.trickle(40.0)
    await visit(name)
    await page.wait_for_load_state("load")
    assert len(calls) <= MAX_CALLS, calls
    for width, height in (WIDE, NARROW):
        await page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            await page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
            # In another theme only the colours differ.
            await axe(page, "color-contrast" if theme == "dark" else None)
            place = "" if (width, height) == WIDE else "narrow-"
            if f"{name}-{place}{theme}" in PICTURED:
                await picture(page, f"{name}-{place}{theme}")
        sideways = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert sideways <= 0, f"{name} scrolls sideways by {sideways} px on a screen of {width}"
    assert await page.locator("h1").count() == 1
    assert await page.title() == f"{await page.locator('h1').inner_text()} · Tidegate"


# -- a gateway that has just been set up


@pytest.fixture(scope="module")
def new_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Nobody has asked it anything yet."""
    with fleet_rig(tmp_path_factory.mktemp("new"), traffic=False) as rig:
        yield rig


async def test_pages_without_anything_to_show_teach(browser: Browser, new_gateway: Rig, axe: Axe) -> None:
    context = await new_context(browser, LOOKS[0])
    problems = Problems(new_gateway.admin_url.removeprefix("http://"))
    problems.expect("status of 401")
    opened = await watched_page(context, problems)
    await sign_in(opened, new_gateway)
    for name in PAGES:
        await opened.goto(f"{new_gateway.dashboard}#{name}")
        await settled(opened)
        await axe(opened)
        text = await opened.locator("main").inner_text()
        assert len(text.split()) > 8, f"{name} says nothing: {text!r}"
        assert "NaN" not in text, f"{name}: {text}"
        assert "undefined" not in text, f"{name}: {text}"
    problems.found += await refused_by_policy(opened)
    await context.close()
    assert problems.unexpected == []
