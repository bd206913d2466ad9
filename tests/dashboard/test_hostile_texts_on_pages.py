"""S14 in a browser: hostile texts in everything that people, clients and models can name or say, on every page.

A gateway of its own, since it has models that are called such things. Nothing may run, nothing may be asked of another
host, and none of it may have become an element.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, StorageState, expect

from gateway.keys.format import new_id
from loadtests.behaviour import Behaviour
from tests.security.hostile_texts import HOSTILE, sent_as_json
from tests.support.browsing import WITHIN_MS, Problems, Visit, sign_in
from tests.support.fleet_rig import FOUND_FILE, Rig, fleet_rig, fleet_sections

PAGES = (
    *("overview", "fleet", "requests", "playground", "tenants", "limits", "cost", "policies", "scaling"),
    *("audit", "settings", "fleet/chat-pool/eu-0", "requests?model=code", "nowhere"),
)
MODELS = [text for text in HOSTILE.values() if text.isascii() and text.isprintable() and " " not in text][:12]
"""Those that a configuration takes as the name of a model."""
INJECTED = (
    "main script, main iframe, main object, main base, main meta, main style, main math, main form[action^=http], "
    "main img:not([src^=static]), main details[ontoggle], main input[onfocus], main [onerror], main [onload], "
    "a[href^=javascript], a[href^=data], a[href^=http], a[href^='//']"
)
"""What markup in one of the texts would have made."""


@pytest.fixture(scope="session")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    nowhere: Any = defaultdict(lambda: SimpleNamespace(url="http://127.0.0.1:9"))
    models = fleet_sections(Path("/nowhere"), nowhere)["models"]
    price = {"input": 0.5, "output": 1.5}
    models |= {name[:200]: {"backend": "code-pool", "upstream_model": "code", "price": price} for name in MODELS}
    with fleet_rig(tmp_path_factory.mktemp("hostile"), traffic=False, models=models) as rig:
        yield rig


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def signed_in(browser: Browser, whole_fleet: Rig) -> StorageState:
    context = await browser.new_context()
    page = await context.new_page()
    await sign_in(page, whole_fleet)
    state = await context.storage_state()
    await context.close()
    return state


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def planted(whole_fleet: Rig) -> int:
    """Keys, audit entries and requests with the texts; how many names were taken."""
    rig, kept = whole_fleet, 0
    for what, hostile in HOSTILE.items():
        text = sent_as_json(hostile)
        made = await rig.admin(
            "POST", "/admin/keys", {"tenant": "acme", "name": text, "metadata": {"note": text[:900]}}
        )
        assert made.status_code in (201, 400), (what, made.text)
        kept += made.status_code == 201
        acting = {"x-tidegate-actor": text} if text.isascii() and text.isprintable() and len(text) <= 64 else {}
        changed = await rig.admin("PATCH", f"/admin/keys/{new_id()}", {"name": text}, **acting)
        assert changed.status_code in (400, 404), (what, changed.text)
        if made.status_code == 201:
            named = await rig.admin("PATCH", f"/admin/keys/{made.json()['id']}", {"class": "batch"}, **acting)
            assert named.status_code == 200, named.text
    messages = [[{"role": "user", "content": sent_as_json(text)}] for text in HOSTILE.values()]
    await asyncio.gather(*(rig.ask(model="code", messages=each, user=each[0]["content"][:200]) for each in messages))
    for name in MODELS:
        answer = await rig.ask(model=name[:200], max_tokens=2)
        assert answer.status_code == 200, answer.text
        await rig.ask(model=name[:150] + "?")  # one that does not exist
    return kept


async def nothing_happened(page: Page) -> None:
    assert await page.evaluate("window.__canary") is None
    found = await page.evaluate(
        "(query) => [...document.querySelectorAll(query)].map((each) => each.outerHTML)", INJECTED
    )
    assert found == [], found[:3]


@pytest.mark.parametrize("path", PAGES)
async def test_no_page_takes_a_text_for_anything_else(visit: Visit, planted: int, path: str) -> None:
    assert planted > 25
    page = await visit(path)
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
    await page.wait_for_load_state("load")
    await nothing_happened(page)
    for name in ("Keys", "Everything", "Model", "model"):  # what is behind the tabs of some pages
        tab = page.get_by_role("button", name=name, exact=True)
        if await tab.count() == 1:
            await tab.click()
            await nothing_happened(page)


async def test_names_are_there_to_be_read_as_they_were_written(visit: Visit, planted: int) -> None:
    page = await visit("audit?action=key.create")
    await expect(page.get_by_text(HOSTILE["handler"]).first).to_be_visible()
    await page.get_by_role("row").nth(1).get_by_role("button").first.click()
    await nothing_happened(page)


async def test_a_request_with_such_a_model_opens(visit: Visit, planted: int, fleet: Rig) -> None:
    for name in MODELS[:3]:  # those planted at first may have left the list by now
        await fleet.ask(model=name[:200], max_tokens=2)
    listed = (await fleet.admin("GET", "/admin/requests?limit=100")).json()
    hostile = [each for each in listed["settled"] if each.get("model") in MODELS]
    assert hostile
    for each in hostile[:3]:
        page = await visit(f"requests/{each['id']}")
        await nothing_happened(page)


async def test_what_a_model_says_is_text(visit: Visit, planted: int, fleet: Rig, problems: Problems) -> None:
    said = "\n".join(sent_as_json(text)[:300] for text in HOSTILE.values())
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "code"}
    events = [
        {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": said}, "finish_reason": None}]},
        {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    raw = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}"

    async def scripted(script: Behaviour) -> None:
        for name in ("code-eu", "code-us"):
            fleet.engines[name].script = script

    before = fleet.engines["code-eu"].script
    await fleet.run(lambda: scripted(Behaviour(raw=raw)))
    try:
        page = await visit("playground")
        await page.get_by_label("Model").select_option("code")
        await page.get_by_label("Prompt", exact=True).fill(said[:5000])
        await page.get_by_role("button", name="Send").click()
        answer = page.get_by_role("log")
        await expect(answer).to_contain_text(HOSTILE["handler"], timeout=WITHIN_MS)
        await nothing_happened(page)
    finally:
        await fleet.run(lambda: scripted(before))


async def test_what_replicas_and_agents_say_of_themselves_is_text(visit: Visit, fleet: Rig) -> None:
    """They need no more than a registrar's token, and what they say is shown to owners."""
    texts = [sent_as_json(text)[:4000] for text in HOSTILE.values()]
    page = await visit("fleet")
    for number, text in enumerate(texts):
        body = {
            **{"url": f"http://127.0.0.1:{9000 + number}", "state": "starting", "progress": 0.5},
            **{"phase": text, "detail": text, "agent": text, "restarts": 1},
        }
        answer = await fleet.admin("PUT", f"/admin/registrations/chat-pool/start-{number}", body)
        assert answer.status_code == 200, answer.text
    await expect(page.get_by_text(f"All {len(texts)}")).to_be_visible()
    await page.get_by_text(f"All {len(texts)}").click()
    starting = page.get_by_role("region", name="Starting", exact=True)
    await expect(starting.get_by_role("listitem")).to_have_count(len(texts))
    await expect(starting).to_contain_text(HOSTILE["handler"])
    await nothing_happened(page)
    (fleet.folder / FOUND_FILE).write_text(json.dumps([{HOSTILE["handler"]: 1}]))
    await expect(page.get_by_role("alert").filter(has_text=HOSTILE["handler"])).to_be_visible()
    await nothing_happened(page)
    (fleet.folder / FOUND_FILE).write_text("[]")
    page = await visit("scaling")
    pools = {text: {"launched": 1, "ready": 1, "max": 2} for text in texts}
    for _ in range(2):  # whoever is not heard of is forgotten soon
        assert (await fleet.admin("PUT", "/admin/agents/gpu1", {"pools": pools})).status_code == 200
    await expect(page.get_by_role("table", name="Agents")).to_contain_text(HOSTILE["handler"])
    await nothing_happened(page)
