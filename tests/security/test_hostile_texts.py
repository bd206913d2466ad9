"""S14: hostile texts as names, actors, user agents and prompts; what the admin API answers with them is JSON, as text.

What a browser makes of it is in tests/dashboard/test_hostile_texts_on_pages.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest

from gateway.admin.audit import Wanted
from gateway.database.database import Database
from gateway.key_routes import key_routes
from tests.gateway.keys.records_of_tests import PEPPER
from tests.security.hostile_texts import HOSTILE, sent_as_json
from tests.support.admin_desk import OWNER, admin_side, bearer


async def test_a_name_is_kept_as_the_text_that_it_is_or_refused_and_never_a_defect(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/keys.db")

    async def changed() -> None: ...

    routes = key_routes(lambda: database, PEPPER, changed)
    kept = 0
    async with admin_side(tmp_path, database=database, routes=routes) as side:
        side.client.headers.update(bearer(OWNER))
        for what, hostile in HOSTILE.items():
            text = sent_as_json(hostile)
            order = {"tenant": "acme", "name": text, "metadata": {text[:100]: text[:1000]}}
            made = await side.client.post("/admin/keys", content=json.dumps(order).encode())
            assert made.status_code in (201, 400), (what, made.text)
            assert made.headers["content-type"] == "application/json", what
            assert made.headers["x-content-type-options"] == "nosniff", what
            if made.status_code == 201:
                kept += 1
                assert made.json()["name"] == text, what
            tenant = await side.client.post("/admin/keys", content=json.dumps({"tenant": text}).encode())
            assert tenant.status_code == (201 if text == "constructor" else 400), what
        assert kept > 25
        for path in ("/admin/keys", "/admin/tenants", "/admin/audit?limit=1000"):
            shown = await side.client.get(path)
            assert (shown.status_code, shown.headers["content-type"]) == (200, "application/json")
            assert "<script>" in shown.text or path != "/admin/keys"
            assert "default-src 'none'" in shown.headers["content-security-policy"]
    database.close()


async def test_what_is_asked_for_comes_back_as_json_whatever_it_is(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        side.client.headers.update(bearer(OWNER))
        for what, hostile in HOSTILE.items():
            text = sent_as_json(hostile)[:2000]
            for path, query in (
                ("/admin/audit", {"actor": text[:200], "object": text[:200], "action": text[:200]}),
                ("/admin/audit", {"limit": text}),
                ("/admin/fleet", {text: text}),
            ):
                answer = await side.client.get(path, params=query, headers={"accept": "text/html"})
                assert answer.status_code in (200, 400), (what, answer.text)
                assert answer.headers["content-type"] == "application/json"
            answer = await side.client.get(f"/admin/{quote(text, safe='')}", headers={"accept": "text/html"})
            assert answer.headers["content-type"] == "application/json", what
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.status_code in (200, 400, 404), (what, answer.text)


@pytest.mark.parametrize("what", sorted(HOSTILE))
async def test_the_audit_keeps_it_on_one_line(tmp_path: Path, what: str) -> None:
    async with admin_side(tmp_path) as side:
        await side.desk.audit.note(None, "thing.done", HOSTILE[what], {HOSTILE[what]: ["", HOSTILE[what]]})
        assert side.desk.audit.unwritten == 0
        (entry,) = await side.desk.audit.list(Wanted())
        assert entry.object.isprintable()
        assert len(entry.object) <= 200
