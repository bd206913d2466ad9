"""Keys, tenants and the audit over HTTP: on a real admin listener, behind its guard, on a real database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.admin.audit import AuditLog, audit_routes
from gateway.admin.guard import Guard
from gateway.database.database import Database
from gateway.error_replies import ERROR_HANDLERS
from gateway.errors import GatewayError
from gateway.key_routes import key_routes
from gateway.keys.directory import Directory, Freshness
from gateway.keys.sync import KeySync
from tests.gateway.keys.records_of_tests import PEPPER, bearing, directory_of, made
from tests.gateway.test_admin import BEARER, TOKEN, served
from tests.support.client import until
from tests.support.command import PATIENCE_S


class Office:
    """An admin listener with keys, the database behind it, and how often it has told of a change."""

    def __init__(self, database: Database | None, client: httpx2.AsyncClient) -> None:
        self.database = database
        self.client = client
        self.told = 0

    async def on_changed(self) -> None:
        self.told += 1

    async def ask(self, method: str, path: str, content: Any = None, status: int = 200, **headers: str) -> Any:
        answer = await self.client.request(method, path, json=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert status >= 400 or answer.headers["cache-control"] == "no-store"
        return answer.json()

    async def create(self, **fields: Any) -> Any:
        return await self.ask("POST", "/admin/keys", {"tenant": "acme", **fields}, 201)

    async def refused(self, method: str, path: str, content: Any, status: int) -> Any:
        answer = await self.ask(method, path, content, status)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return answer["error"]


@asynccontextmanager
async def office(folder: Path, *, keys: bool = True) -> AsyncIterator[Office]:
    database = Database.open(f"sqlite:///{folder / 'keys.db'}") if keys else None
    told: list[Office] = []

    async def on_changed() -> None:
        await told[0].on_changed()

    routes = [*key_routes(lambda: database, PEPPER, on_changed), *audit_routes(AuditLog(lambda: database))]
    app = Starlette(routes=routes, exception_handlers=ERROR_HANDLERS)
    guarded: ASGIApp = Guard(app, host="127.0.0.1", token=SecretStr(TOKEN))
    async with served(guarded) as client:
        client.headers.update(BEARER)
        told.append(Office(database, client))
        yield told[0]
    if database is not None:
        database.close()


def opens(office: Office, key: str, after_s: float = 0.0) -> bool:
    assert office.database is not None
    known = Directory(PEPPER, freshness=Freshness.CURRENT)
    known.apply(office.database.keys.changed_since(0))
    try:
        known.authenticate(bearing(key), time.time() + after_s)
    except GatewayError:
        return False
    return True


# -- keys


async def test_a_key_is_shown_once_and_can_do_what_it_was_given(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        fields = {
            "models": ["chat"],
            "class": "batch",
            "limits": {"requests_per_minute": 60},
            "expires": "2099-01-01T00:00:00Z",
            "metadata": {"team": "x"},
        }
        answer = await desk.create(**fields)
        key = answer.pop("key")
        assert opens(desk, key)
        assert {name: answer[name] for name in fields} == fields
        assert await desk.ask("GET", f"/admin/keys/{answer['id']}") == answer
        assert await desk.ask("GET", "/admin/keys") == {"data": [answer], "has_more": False}
        for path in ("/admin/keys", f"/admin/keys/{answer['id']}", "/admin/audit", "/admin/tenants"):
            text = (await desk.client.get(path)).text
            assert key not in text
            assert "digest" not in text
        assert desk.told == 1


async def test_what_was_shown_can_be_sent_back(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        answer = await desk.create(limits={"usd_per_day": 5.0}, expires="30d")
        names = {*answer} - {"id", "key", "hint", "state", "created", "replaced_by", "version"}
        path = f"/admin/keys/{answer['id']}"
        again = await desk.ask("PATCH", path, {name: answer[name] for name in names})
        del again["audit_id"]
        assert again.pop("version") >= answer.pop("version")  # a time in words is rounded, which may change it
        key = answer.pop("key")
        assert again == answer
        assert opens(desk, key)


async def test_a_patch_changes_what_is_named(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        answer = await desk.create(models=["chat"], limits={"requests_per_minute": 5, "tokens_per_minute": 7})
        path = f"/admin/keys/{answer['id']}"
        changed = await desk.ask("PATCH", path, {"limits": {"requests_per_minute": None}, "class": "critical"})
        assert (changed["limits"], changed["class"]) == ({"tokens_per_minute": 7}, "critical")
        assert changed["models"] == ["chat"]
        changed = await desk.ask("PATCH", path, {"models": None, "limits": None, "class": None})
        assert (changed["models"], changed["limits"], changed["class"]) == (None, {}, "standard")
        raised = {"limits": {"usd_per_day": 9.0}, "until": "2099-01-01T00:00:00Z"}
        assert (await desk.ask("PATCH", path, {"raises": [raised]}))["raises"] == [raised]
        assert (await desk.ask("PATCH", path, {"disabled": True}))["state"] == "disabled"
        assert not opens(desk, answer["key"])
        await desk.ask("PATCH", path, {"disabled": False})
        assert opens(desk, answer["key"])


async def test_rotation_leaves_the_old_key_its_overlap(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        first = await desk.create(models=["chat"])
        path = f"/admin/keys/{first['id']}"
        second = await desk.ask("POST", f"{path}/rotate", {"overlap": "1h"}, 201)
        assert second["models"] == ["chat"]
        assert (opens(desk, first["key"]), opens(desk, first["key"], 3601)) == (True, False)
        assert opens(desk, second["key"], 3601)
        error = await desk.refused("POST", f"{path}/rotate", {}, 409)
        assert (error["code"], second["id"] in error["message"]) == ("key_conflict", True)
        answer = await desk.client.post(f"/admin/keys/{second['id']}/rotate")  # no body: a day
        assert answer.status_code == 201
        assert opens(desk, second["key"], 86_000)
        error = await desk.refused("POST", f"{path}/rotate", {"overlap": "soon"}, 400)
        assert error["param"] == "overlap"


async def test_a_deleted_key_is_revoked_for_good(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        answer = await desk.create()
        path = f"/admin/keys/{answer['id']}"
        assert (await desk.ask("DELETE", path))["state"] == "revoked"
        assert not opens(desk, answer["key"])
        for method, content in (("GET", None), ("DELETE", None), ("PATCH", {"disabled": False})):
            error = await desk.refused(method, path, content, 404)
            assert error["code"] == "unknown_key"
        assert desk.told == 2


async def test_the_list_is_paged(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        ids = sorted([(await desk.create(tenant=f"t{number % 2}"))["id"] for number in range(7)])
        seen: list[str] = []
        more: list[bool] = []
        for _ in range(3):
            after = seen[-1] if seen else ""
            page = await desk.ask("GET", f"/admin/keys?limit=3&after={after}")
            seen += [each["id"] for each in page["data"]]
            more.append(page["has_more"])
        assert (seen, more) == (ids, [True, True, False])
        page = await desk.ask("GET", "/admin/keys?tenant=t1")
        assert {each["tenant"] for each in page["data"]} == {"t1"}
        assert len(page["data"]) == 3
        for limit in ("0", "1001", "x", "-1", ""):
            assert (await desk.refused("GET", f"/admin/keys?limit={limit}", None, 400))["param"] == "limit"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"tenant": "acme", "colour": "red"}, "colour"),
        ({"tenant": "acme", "key": "chosen"}, "key"),
        ({"tenant": "acme", "digest": "00"}, "digest"),
        ({"tenant": "acme", "id": "key_chosen"}, "id"),
        ({}, "tenant"),
        ({"tenant": 5}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "acme", "class": "urgent"}, "class"),
        ({"tenant": "acme", "models": "chat"}, "models"),
        ({"tenant": "acme", "models": ["a b"]}, "models"),
        ({"tenant": "acme", "limits": {"requests": 5}}, "limits.requests"),
        ({"tenant": "acme", "limits": {"requests_per_minute": "5"}}, "limits.requests_per_minute"),
        ({"tenant": "acme", "limits": {"requests_per_minute": True}}, "limits.requests_per_minute"),
        ({"tenant": "acme", "deadline_ms": 0}, "deadline_ms"),
        ({"tenant": "acme", "deadline_ms": True}, "deadline_ms"),
        ({"tenant": "acme", "max_output_tokens": 1.5}, "max_output_tokens"),
        ({"tenant": "acme", "expires": "whenever"}, "expires"),
        ({"tenant": "acme", "expires": 5}, "expires"),
        ({"tenant": "acme", "metadata": {"a": {"deep": 1}}}, "metadata.a"),
        ({"tenant": "acme", "raises": [{"limits": {}, "until": "2099-01-01", "x": 1}]}, "raises[0].x"),
        ({"tenant": "acme", "name": "two\nlines"}, "name"),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_made(tmp_path: Path, content: Any, param: str) -> None:
    async with office(tmp_path) as desk:
        error = await desk.refused("POST", "/admin/keys", content, 400)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, error
        assert await desk.ask("GET", "/admin/keys") == {"data": [], "has_more": False}
        assert desk.told == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b'{"tenant": "a", "tenant"', b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(tmp_path: Path, body: bytes) -> None:
    async with office(tmp_path) as desk:
        answer = await desk.client.post("/admin/keys", content=body)
        assert answer.status_code in (400, 413), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_key_never_goes_to_another_tenant(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        answer = await desk.create()
        error = await desk.refused("PATCH", f"/admin/keys/{answer['id']}", {"tenant": "other"}, 400)
        assert error["param"] == "tenant"


# -- tenants, the audit


async def test_tenants_are_put_field_by_field(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        put = await desk.ask("PUT", "/admin/tenants/acme", {"weight": 2, "limits": {"usd_per_month": 100}})
        assert (put["weight"], put["limits"]) == (2.0, {"usd_per_month": 100.0})
        put = await desk.ask("PUT", "/admin/tenants/acme", {"model_limits": {"chat": {"concurrent_requests": 2}}})
        assert (put["weight"], put["model_limits"]) == (2.0, {"chat": {"concurrent_requests": 2}})
        entry = put.pop("audit_id")
        assert await desk.ask("GET", "/admin/tenants/acme") == put
        put = await desk.ask("PUT", "/admin/tenants/acme", {"model_limits": {"chat": None}, "disabled": True})
        assert (put["model_limits"], put["disabled"], put.pop("audit_id")) == ({}, True, entry + 1)
        assert (await desk.ask("GET", "/admin/tenants"))["data"] == [put]
        assert (await desk.refused("GET", "/admin/tenants/nobody", None, 404))["code"] == "unknown_tenant"
        for content, param in (({"weight": 0}, "weight"), ({"name": "x"}, "name"), ({"limits": 5}, "limits")):
            assert (await desk.refused("PUT", "/admin/tenants/acme", content, 400))["param"] == param
        assert desk.told == 3


async def test_the_audit_says_who_did_what(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        headers = {"x-tidegate-actor": "jo@example.org"}
        answer = await desk.ask("POST", "/admin/keys", {"tenant": "acme"}, 201, **headers)
        await desk.ask("PATCH", f"/admin/keys/{answer['id']}", {"class": "batch"})
        entries = (await desk.ask("GET", "/admin/audit"))["data"]
        assert [(each["actor"], each["action"]) for each in entries] == [
            ("admin", "key.update"),
            ("admin:jo@example.org", "key.create"),
            ("admin:jo@example.org", "tenant.put"),
        ]
        assert entries[0]["diff"] == {"priority_class": ["standard", "batch"]}
        older = (await desk.ask("GET", f"/admin/audit?before={entries[0]['id']}&limit=1"))["data"]
        assert older == [entries[1]]
        await desk.refused("GET", "/admin/audit?before=x", None, 400)


@pytest.mark.parametrize("actor", ["", "x" * 65, "a\tb", "\u00e9"])
async def test_an_actor_that_cannot_be_written_down_is_refused(tmp_path: Path, actor: str) -> None:
    async with office(tmp_path) as desk:
        headers = [(b"x-tidegate-actor", actor.encode("latin-1")), (b"content-type", b"application/json")]
        answer = await desk.client.post("/admin/keys", content=b'{"tenant": "acme"}', headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_header"
        assert (await desk.ask("GET", "/admin/keys"))["data"] == []


# -- without keys, without a database


async def test_a_gateway_without_keys_says_so(tmp_path: Path) -> None:
    async with office(tmp_path, keys=False) as desk:
        for method, path, content in (
            ("GET", "/admin/keys", None),
            ("POST", "/admin/keys", {"tenant": "acme"}),
            ("DELETE", "/admin/keys/key_x", None),
            ("PUT", "/admin/tenants/acme", {}),
        ):
            error = await desk.refused(method, path, content, 409)
            assert (error["code"], "auth: keys" in error["message"]) == ("keys_off", True)


async def test_a_database_that_is_away_is_503(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        assert desk.database is not None
        desk.database.close()
        (tmp_path / "keys.db").rename(tmp_path / "away.db")
        (tmp_path / "keys.db").mkdir()
        answer = await desk.client.get("/admin/keys")
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "database_unavailable"
        assert answer.headers["retry-after"] in ("1", "2")
        assert desk.told == 0


# -- who may do what


async def test_every_route_is_closed_to_keys_and_open_to_the_owner(tmp_path: Path) -> None:
    """Role by object: an API key is no owner token, whatever it may do elsewhere."""
    async with office(tmp_path) as desk:
        answer = await desk.create(**{"class": "critical"})
        routes = key_routes(lambda: None, None, desk.on_changed)
        assert len(routes) >= 9
        for route in routes:
            path = route.path.format(id=answer["id"], name="acme", entry="1")
            for method in (route.methods or set()) - {"HEAD"}:
                for headers in (
                    {"authorization": f"Bearer {answer['key']}"},
                    {"authorization": "", "x-api-key": answer["key"]},
                    {"authorization": "", "api-key": TOKEN},
                    {"authorization": ""},
                ):
                    refused = await desk.client.request(method, path, json={}, headers=headers)
                    assert refused.status_code == 401, (method, path)
                    assert refused.json()["error"]["code"] == "invalid_token"
        assert opens(desk, answer["key"])
        assert desk.told == 1


def test_the_owner_token_is_no_key() -> None:
    directory = directory_of(made()[1])
    for headers in (bearing(TOKEN), [(b"x-api-key", TOKEN.encode())]):
        with pytest.raises(GatewayError) as refused:
            directory.authenticate(headers, time.time())
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


async def test_a_change_over_http_reaches_a_gateway_by_its_nudge(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        assert desk.database is not None
        directory = Directory(PEPPER)
        sync = KeySync(directory, desk.database.keys.changed_since, poll_s=3600.0)
        sync.start()
        try:
            assert await sync.first_load(PATIENCE_S)
            answer = await desk.create()
            assert desk.told == 1
            sync.nudge()
            await until(lambda: len(directory) == 1, PATIENCE_S)
            assert directory.authenticate(bearing(answer["key"]), time.time()).key_id == answer["id"]
        finally:
            await sync.aclose()


async def test_orders_at_the_same_time_are_all_carried_out(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        answers = await asyncio.gather(*(desk.create(name=str(number)) for number in range(12)))
        assert len({each["key"] for each in answers}) == 12
        assert len((await desk.ask("GET", "/admin/keys"))["data"]) == 12
        assert all(isinstance(route, Route) for route in key_routes(lambda: None, None, desk.on_changed))


async def test_a_key_in_the_place_of_something_else_is_not_repeated(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        key = (await desk.create())["key"]
        for method, path, content, status in (
            ("GET", f"/admin/keys/{key}", None, 404),
            ("DELETE", f"/admin/keys/{key[:50]}", None, 404),
            ("PATCH", f"/admin/keys/{key}", {"name": "x"}, 404),
            ("GET", f"/admin/tenants/{key}", None, 404),
            ("PUT", f"/admin/tenants/{key}", {"weight": 2}, 400),
            ("POST", "/admin/keys", {"tenant": "acme", key: 1}, 400),
            ("POST", "/admin/keys", {"tenant": "acme", "limits": {key: 1}}, 400),
            ("POST", "/admin/keys", {"tenant": "acme", "class": key}, 400),
            ("POST", "/admin/keys", {"tenant": "acme", "expires": key}, 400),
        ):
            error = await desk.refused(method, path, content, status)
            assert key[8:30] not in str(error), error


async def test_a_name_of_a_note_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    async with office(tmp_path) as desk:
        for name in ("a\nb", "\x1b[31m", "\x00"):
            for method, path, rest in (
                ("POST", "/admin/keys", {"tenant": "acme"}),
                ("PUT", "/admin/tenants/acme", {}),
            ):
                error = await desk.refused(method, path, {**rest, "metadata": {name: "x"}}, 400)
                assert error["param"] == "metadata"
                assert "printable characters" in error["message"]
