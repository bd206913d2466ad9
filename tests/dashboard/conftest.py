"""What the tests of the dashboard share: one gateway with traffic, one browser, and for each test a page of its own.

    from tests.support.browsing import Visit, every_look
    from tests.support.fleet_rig import Rig

    @every_look
    async def test_a_drained_replica_says_so(visit: Visit, fleet: Rig) -> None:
        page = await visit("fleet")
        ...

All of them run in one event loop, because a browser belongs to the loop that it was started in.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, StorageState, expect

from tests.support.browsing import (
    LOOKS,
    NO_BROWSER,
    WITHIN_MS,
    Look,
    Problems,
    Visit,
    findings,
    headless,
    new_context,
    refused_by_policy,
    settled,
    sign_in,
    watched_page,
)
from tests.support.fleet_rig import Rig, fleet_rig

ROWS_LIKE_THE_OTHERS = ["tbody tr:nth-child(n+8)"]
"""Of a long table; looking at each takes axe-core seconds."""
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The gateway itself; tests ask for `fleet`."""
    with fleet_rig(tmp_path_factory.mktemp("fleet")) as rig:
        yield rig


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(whole_fleet: Rig) -> AsyncIterator[Rig]:
    """A running gateway with keys, two regions, engines and traffic that goes on, shared by all tests: whoever changes
    something in it changes it back."""
    await whole_fleet.trickle(4.0)
    yield whole_fleet
    await whole_fleet.trickle(None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if os.environ.get(NO_BROWSER) == "1":
        pytest.skip(f"{NO_BROWSER}=1: NOT TESTED, the dashboard needs a browser")
    expect.set_options(timeout=WITHIN_MS)
    async with headless() as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def signed_in(browser: Browser, whole_fleet: Rig) -> StorageState:
    """The cookies of somebody who has signed in as the owner, by the form."""
    context = await browser.new_context()
    page = await context.new_page()
    await sign_in(page, whole_fleet)
    state = await context.storage_state()
    await context.close()
    return state


@pytest.fixture
def look(request: pytest.FixtureRequest) -> Look:
    """The screen; `every_look` sets it."""
    wanted: Look = getattr(request, "param", LOOKS[0])
    return wanted


@pytest.fixture
def problems(fleet: Rig) -> Problems:
    """What has gone wrong in the page; what is left unexpected at the end fails the test."""
    return Problems(fleet.admin_url.removeprefix("http://"))


@pytest_asyncio.fixture(loop_scope="session")
async def page(
    browser: Browser, fleet: Rig, look: Look, problems: Problems, signed_in: StorageState
) -> AsyncIterator[Page]:
    """A page of a browser in which the owner has signed in; it has not gone anywhere yet.

    Errors on its console or in its scripts, whatever its content security policy refuses, and requests to other hosts
    fail the test.
    """
    context = await new_context(browser, look, signed_in)
    opened = await watched_page(context, problems)
    yield opened
    problems.found += await refused_by_policy(opened)
    await context.close()
    assert problems.unexpected == []


@pytest.fixture
def visit(page: Page, fleet: Rig) -> Visit:
    """``page = await visit("requests/req_1")``: goes there and waits until its data are on the screen."""

    async def go(path: str) -> Page:
        await page.goto(f"{fleet.dashboard}#{path}")
        await settled(page)
        return page

    return go


@pytest.fixture
def axe() -> Callable[..., Awaitable[None]]:
    """``await axe(page)`` fails with every serious and critical finding of axe-core."""

    async def check(page: Page, only: str | None = None) -> None:
        """`only`: one rule's name."""
        options = {"resultTypes": ["violations"], **({} if only is None else {"runOnly": [only]})}
        results = await Axe().run(page, context={"exclude": [ROWS_LIKE_THE_OTHERS]}, options=options)
        found = findings(results.response)
        assert not found, "\n".join([page.url, *found])

    return check
