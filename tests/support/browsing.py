"""A headless Chromium for the tests of the dashboard, and what goes wrong in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Request,
    StorageState,
    async_playwright,
)

from tests.support.effort import LONG
from tests.support.fleet_rig import Rig

Visit = Callable[[str], Awaitable[Page]]
"""Goes to a page of the dashboard: the fixture `visit`."""
WITHIN_MS = 15_000
"""For everything that is waited for in a page."""
NO_BROWSER = "TESTS_NO_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_RECORDER = """
window.__refused = [];
document.addEventListener("securitypolicyviolation", (event) => {
  const place = `${event.sourceFile}:${event.lineNumber}`;
  window.__refused.push(`${event.effectiveDirective} refused ${event.blockedURI} in ${place}`);
});
"""
"""Before any script of the page's own: what its content security policy has refused."""


@dataclass(frozen=True)
class Look:
    """A screen."""

    width: int
    height: int
    theme: str

    def __str__(self) -> str:
        return f"{'wide' if self.width > 800 else 'narrow'}-{self.theme}"


WIDE, NARROW = (1440, 900), (390, 844)
LOOKS = tuple(Look(*size, theme) for size in (WIDE, NARROW) for theme in ("light", "dark"))
every_look = pytest.mark.parametrize("look", LOOKS if LONG else (LOOKS[0], LOOKS[-1]), indirect=True, ids=str)
"""Runs a test on both screens and in both themes: in the short run a wide light and a narrow dark one, as
`test_every_page` looks at every page in all four. A test without it has the first."""


def chromium() -> str | None:
    """The browser that is there; None: Playwright's own, if that is."""
    wanted = os.environ.get("CHROMIUM")
    return wanted or next((path for name in _NAMES if (path := shutil.which(name))), None)


@asynccontextmanager
async def headless(*names: str) -> AsyncIterator[Browser]:
    """A Chromium that speaks to this machine only: to 127.0.0.1, and to these names."""
    arguments = [
        "--disable-gpu",
        "--font-render-hinting=none",
        "--host-resolver-rules=MAP * ~NOTFOUND" + "".join(f", EXCLUDE {name}" for name in ("127.0.0.1", *names)),
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses to be root's
    async with async_playwright() as playwright:
        try:
            browser = await playwright.chromium.launch(executable_path=chromium(), args=arguments)
        except Error as error:
            pytest.fail(f"no Chromium starts ({error.message.splitlines()[0]}): run scripts/browser.sh", pytrace=False)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Problems:
    """What went wrong in a page by itself. A test that provokes something says so with `expect`."""

    host: str
    found: list[str] = field(default_factory=list)
    _expected: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """A regular expression; what it matches is no problem. Chromium reports every refused call on its console:
        ``problems.expect("status of 409")``."""
        self._expected.append(pattern)

    @property
    def unexpected(self) -> list[str]:
        return [each for each in self.found if not any(re.search(pattern, each) for pattern in self._expected)]

    def watch(self, page: Page) -> None:
        """From now on."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.found.append(f"page error: {error}"))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.found.append(f"console {message.type}: {message.text} ({message.location.get('url', '')})")

    def _request(self, request: Request) -> None:
        split = urlsplit(request.url)
        if split.scheme not in ("data", "blob") and split.netloc != self.host:
            self.found.append(f"a foreign request: {request.url}")


async def refused_by_policy(page: Page) -> list[str]:
    """What the content security policy of the page has refused so far."""
    refused: list[str] = await page.evaluate("window.__refused ?? []")
    return [f"CSP: {each}" for each in refused]


async def recorded(page: Page) -> None:
    await page.context.add_init_script(_RECORDER)


def findings(results: dict[str, Any]) -> list[str]:
    """The serious and critical findings of an axe run, each with where."""
    return [
        f"{each['id']} ({each['impact']}): {each['help']}\n"
        + "\n".join(f"    {node['html'][:200]}\n      {node.get('failureSummary', '')}" for node in each["nodes"][:4])
        for each in results["violations"]
        if each["impact"] in ("serious", "critical")
    ]


async def sign_in(page: Page, rig: Rig, token: str | None = None) -> None:
    """Through the form, with this token or the owner's."""
    await page.goto(rig.dashboard)
    await page.locator("input[type=password]").fill(token or rig.token, timeout=WITHIN_MS)
    await page.keyboard.press("Enter")
    await page.locator("nav").first.wait_for(timeout=WITHIN_MS)


async def new_context(browser: Browser, look: Look, state: StorageState | None = None) -> BrowserContext:
    context = await browser.new_context(
        viewport={"width": look.width, "height": look.height},
        color_scheme="dark" if look.theme == "dark" else "light",
        reduced_motion="reduce",
        locale="en-US",
        timezone_id="UTC",
        storage_state=state,
    )
    context.set_default_timeout(WITHIN_MS)
    return context


async def watched_page(context: BrowserContext, problems: Problems) -> Page:
    opened = await context.new_page()
    await recorded(opened)
    problems.watch(opened)
    return opened


async def settled(page: Page) -> None:
    """Until the page has its heading, and nothing in it is being fetched for the first time."""
    await page.locator("main h1").first.wait_for()
    await page.locator("main [aria-busy=true]").first.wait_for(state="detached")
