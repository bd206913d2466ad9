"""Experiment 39: the admin listener in a browser, with somebody signed in and a page of another site open beside it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.async_api import Browser, Page
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from gateway.listener import admin_listener, bind_tcp, listen
from loadtests.engine import FakeEngine
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.security.hostile_texts import HOSTILE
from tests.support.browsing import NO_BROWSER, headless
from tests.support.command import ServeProcess, serve_process

TOKEN = "owner-token-of-the-experiment-39"
COOKIE = "__Host-tidegate"
WITHIN_MS = 15_000
ATTACKS = """
async (admin) => {
  const tried = {};
  const order = JSON.stringify({ tenant: "evil" });
  const ask = async (name, path, options) => {
    try {
      const answer = await fetch(admin + path, { credentials: "include", ...options });
      tried[name] = answer.type === "opaque" ? "opaque" : answer.status;
    } catch (error) { tried[name] = "refused"; }
  };
  const json = { "content-type": "application/json", "x-tidegate-csrf": "1" };
  await ask("simple POST", "/admin/keys", { method: "POST", mode: "no-cors", body: order });
  await ask("JSON POST", "/admin/keys", { method: "POST", headers: json, body: order });
  await ask("DELETE", "/admin/sessions", { method: "DELETE", headers: json });
  await ask("login", "/admin/session", { method: "POST", mode: "no-cors", body: '{"token": "x"}' });
  await ask("read", "/admin/keys", {});
  await ask("read without asking", "/admin/keys", { mode: "no-cors" });
  tried.script = await new Promise((done) => {
    const script = document.createElement("script");
    script.onload = () => done("loaded"); script.onerror = () => done("refused");
    script.src = admin + "/admin/fleet"; document.body.append(script);
  });
  return tried;
}
"""
"""What a page can try, whatever its site: each with the browser's cookies, where it sends them."""


async def _evil(request: Request) -> Response:
    admin, inside = request.query_params["admin"], request.query_params.get("do", "")
    body = {
        "form": f"<form id=f method=post action='{admin}/admin/keys'><input name=tenant value=evil></form>",
        "text": f"<form id=f method=post enctype=text/plain action='{admin}/admin/keys'>"
        '<input name=\'{"tenant": "evil", "x": "\' value=\'"}\'></form>',
        "frame": f"<iframe name=inside src='{admin}/admin/'></iframe>",
    }.get(inside, "")
    return HTMLResponse(f"<!doctype html><title>a page of another site</title><body>{body}</body>")


@asynccontextmanager
async def another_site() -> AsyncIterator[int]:
    """Its port: it is another site at 127.0.0.1, and the same site with another origin at localhost."""
    sock = bind_tcp("127.0.0.1", 0, "admin.port")
    listen([sock])
    listener = admin_listener(Starlette(routes=[Route("/", _evil)]))
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    try:
        yield sock.getsockname()[1]
    finally:
        listener.cut()
        listener.should_exit = True
        await task


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[tuple[ServeProcess, str]]:
    """A real one with keys, and where its admin listener is, by the name that the cookie will belong to."""
    async with FakeEngine() as engine:
        sections: dict[str, Any] = {
            "admin": {"port": 0, "token": {"env": "ADMIN_TOKEN"}},
            "auth": "keys",
            "database": f"sqlite:///{folder}/tidegate.db",
            "models": {"m": {"backend": "pool"}},
            "backends": {"pool": {"engine": "openai", "replicas": [{"url": engine.url}]}},
        }
        async with serve_process(folder, [], environ={"ADMIN_TOKEN": TOKEN}, **sections) as process:
            found = await process.logged(r"admin on http://127\.0\.0\.1:(\d+)")
            await process.logged("serving on")
            yield process, f"http://localhost:{found[1]}"


async def signed_in(browser: Browser, admin: str) -> Page:
    """By the form, which is what a person does."""
    context = await browser.new_context()
    page = await context.new_page()
    page.set_default_timeout(WITHIN_MS)
    await page.goto(f"{admin}/admin/")
    await page.locator("input[type=password]").fill(TOKEN)
    await page.keyboard.press("Enter")
    await page.locator("nav").first.wait_for()
    return page


async def cookie_of(page: Page) -> str:
    found = [each for each in await page.context.cookies() if each["name"] == COOKIE]
    return found[0]["value"] if found else ""


async def tried_from(page: Page, admin: str, site: str) -> dict[str, object]:
    """What came of each attack from a page of this site, in the browser that is signed in."""
    other = await page.context.new_page()
    await other.goto(f"{site}/?admin={admin}")
    tried: dict[str, object] = await other.evaluate(ATTACKS, admin)
    for how in ("form", "text"):
        sending = await page.context.new_page()
        await sending.goto(f"{site}/?admin={admin}&do={how}")
        async with sending.expect_navigation() as sent:
            await sending.evaluate("document.getElementById('f').submit()")
        tried[f"{how} POST"] = (await sent.value).status
        await sending.close()
    await other.goto(f"{site}/?admin={admin}&do=frame")
    await other.wait_for_load_state("load")
    frame = next((each for each in other.frames if each.name == "inside"), None)
    tried["frame"] = "shown" if frame is not None and frame.url.startswith(admin) else "refused"
    await other.close()
    return tried


@pytest.mark.skipif(os.environ.get(NO_BROWSER) == "1", reason="no browser here")
async def test_39_the_admin_listener_in_a_browser(tmp_path: Path, report: Report) -> None:
    failures: list[str] = []
    async with gateway(tmp_path) as (_, admin), another_site() as port, headless("localhost") as browser:
        client = httpx2.AsyncClient(base_url=admin, trust_env=False, timeout=20.0, headers={"accept": "*/*"})
        bearer = {"authorization": f"Bearer {TOKEN}"}
        page = await signed_in(browser, admin)
        tries = 0
        for site in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
            tried = await tried_from(page, admin, site)
            tries += len(tried)
            failures += [
                f"{what} from {site}: {came}"
                for what, came in tried.items()
                if came not in ("refused", "opaque", 401, 403)
            ]
        keys = (await client.get("/admin/keys", headers=bearer)).json()["data"]
        failures += [f"{len(keys)} keys were made" for _ in keys[:1]]
        await page.reload()
        await page.locator("nav").first.wait_for()  # nobody has ended the session either

        failures += await fixation(page, browser, admin)
        failures += await replay(page, client)
        ran = await script_in_names(await signed_in(browser, admin), client, bearer)
        failures += ran
        await client.aclose()
    finding = Finding(
        "admin in a browser",
        "somebody signed in; pages of another site and of another port post forms and JSON, read, frame and embed; a "
        "planted session; a copied cookie after signing out; script in names",
        "nothing is done, read or framed; a new id at each login; signed out means out; no script runs",
        f"{tries} cross-site tries, {len(HOSTILE)} hostile names: "
        + ("all refused or shown as text" if not failures else "; ".join(failures)[:300]),
        not failures,
        {"tries": tries, "failures": failures},
    )
    report("test_39_the_admin_listener_in_a_browser", finding)
    assert failures == []


async def fixation(page: Page, browser: Browser, admin: str) -> list[str]:
    """A session that somebody else knows must not become one's own by signing in."""
    known = await cookie_of(page)
    context = await browser.new_context()
    other = await context.new_page()
    other.set_default_timeout(WITHIN_MS)
    await context.add_cookies(
        [{"name": COOKIE, "value": "p" * 43, "url": admin.replace("http:", "https:"), "secure": True}]
    )
    await other.goto(f"{admin}/admin/")
    await other.locator("input[type=password]").fill(TOKEN)
    await other.keyboard.press("Enter")
    await other.locator("nav").first.wait_for()
    now = await cookie_of(other)
    await context.close()
    return [] if len(now) == 43 and now not in (known, "p" * 43) else ["a planted session was taken over"]


async def replay(page: Page, client: httpx2.AsyncClient) -> list[str]:
    """A copy of the cookie is worth nothing once its owner has signed out, and what streams to it ends."""
    copied = {"cookie": f"{COOKIE}={await cookie_of(page)}"}
    failures = []
    before = await client.get("/admin/fleet", headers=copied)
    if before.status_code != 200:
        failures.append(f"the session was worth nothing before: {before.status_code}")
    async with client.stream("GET", "/admin/events?topics=overview", headers=copied) as stream:
        await page.get_by_role("button", name="Sign out").click()
        await page.locator("input[type=password]").wait_for()
        try:
            async with asyncio.timeout(10):
                async for _ in stream.aiter_bytes():
                    pass
        except TimeoutError:
            failures.append("a stream of events went on after signing out")
        except httpx2.HTTPError:
            pass  # cut off is ended too
    after = await client.get("/admin/fleet", headers=copied)
    if after.status_code != 401:
        failures.append(f"a copied cookie was good after signing out: {after.status_code}")
    return failures


async def script_in_names(page: Page, client: httpx2.AsyncClient, bearer: dict[str, str]) -> list[str]:
    """In a key's alias; model names and prompts have tests of their own with the whole dashboard."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "canary" in request.url else None)
    for text in HOSTILE.values():
        name = text.encode("utf-8", "replace").decode()
        await client.post("/admin/keys", content=json.dumps({"tenant": "acme", "name": name}), headers=bearer)
    failures = []
    for place in ("tenants", "audit", "overview"):
        await page.goto(f"{page.url.partition('#')[0]}#{place}")
        await page.reload()
        await page.locator("main h1").wait_for()
        await page.wait_for_load_state("load")
        if await page.evaluate("window.__canary") is not None:
            failures.append(f"a script ran on {place}")
    return failures + [f"something was loaded from {url}" for url in asked[:1]]
