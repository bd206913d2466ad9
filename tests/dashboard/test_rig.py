"""That the rig itself notices what its tests are to fail for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from playwright.async_api import Page

from tests.support.browsing import Problems, Visit, refused_by_policy


async def test_what_goes_wrong_in_a_page_is_found(
    visit: Visit, problems: Problems, axe: Callable[..., Awaitable[None]]
) -> None:
    page: Page = await visit("fleet")
    await axe(page)
    assert problems.found == []
    await page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    with pytest.raises(AssertionError, match="button-name"):
        await axe(page)
    await page.evaluate("console.error('planted')")
    await page.evaluate("setTimeout(() => { throw new Error('thrown'); })")
    await page.evaluate("document.body.setAttribute('style', 'color: red')")
    await page.evaluate("new Image().src = 'http://example.org/x.png'")
    await page.wait_for_timeout(200)
    for pattern in ("planted", "thrown", "example.org", "[Cc]ontent.[Ss]ecurity.[Pp]olicy"):
        problems.expect(pattern)
    assert problems.unexpected == []
    for said in ("planted", "thrown", "a foreign request: http://example.org/x.png"):
        assert any(said in each for each in problems.found), (said, problems.found)
    refused = await refused_by_policy(page)
    assert any("style-src" in each for each in refused), refused
    problems.expect("^CSP: ")
