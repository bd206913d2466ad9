"""Logging in and out over HTTP, and what a browser may do with a session."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.admin.guard import session_of
from gateway.admin.sessions import COOKIE
from gateway.admin.throttle import PER_ADDRESS_BURST
from gateway.policy import GuardedRoute, Who
from tests.support.admin_desk import OPERATOR, OWNER, READER, SAME_ORIGIN, admin_side, bearer
from tests.support.client import until


async def test_a_token_is_changed_for_a_session_that_says_who_one_is(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        nobody = await side.client.get("/admin/session")
        assert (nobody.status_code, nobody.content) == (204, b"")
        for token, name, role in (
            (OWNER, "admin", "owner"),
            (OPERATOR, "olga", "operator"),
            (READER, "rita", "reader"),
        ):
            answer = await side.login(token)
            assert answer.status_code == 201
            assert answer.json() == {
                "name": f"session:{name}", "role": role, "how": "session", "expires_in_s": 28799, "idle_s": 3600,
            }  # fmt: skip
            assert token not in answer.text + str(answer.headers)
            cookie = answer.headers["set-cookie"].partition(";")[0]
            who = (await side.client.get("/admin/session", headers={"cookie": cookie})).json()
            assert (who["name"], who["role"]) == (f"session:{name}", role)
        assert (await side.client.get("/admin/session", headers=bearer(READER))).json() == {
            "name": "token:rita", "role": "reader", "how": "token", "expires_in_s": None, "idle_s": None,
        }  # fmt: skip
        assert (await side.client.get("/admin/session/ways")).json() == {
            "token": True,
            "oidc": False,
            "oidc_name": None,
        }


async def test_logging_in_gives_a_new_id_whatever_the_browser_came_with(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        planted = "p" * 43
        first = await side.login(OWNER, cookie=f"{COOKIE}={planted}")
        assert planted not in first.headers["set-cookie"]
        assert (await side.client.get("/admin/session", headers={"cookie": f"{COOKIE}={planted}"})).status_code == 204
        held = first.headers["set-cookie"].partition(";")[0]
        second = await side.login(OWNER, cookie=held)
        assert second.headers["set-cookie"].partition(";")[0] != held
        assert (await side.client.get("/admin/session", headers={"cookie": held})).status_code == 204
        assert len(side.desk.access.sessions) == 1


async def test_logging_out_ends_the_session_here_and_in_the_browser(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        mine, others = await side.logged_in(), await side.logged_in(READER)
        gone = await side.client.delete("/admin/session", headers=mine)
        assert gone.status_code == 204
        assert gone.headers["set-cookie"].startswith(f"{COOKIE}=; ")
        assert "Max-Age=0" in gone.headers["set-cookie"]
        again = await side.client.get("/admin/fleet", headers=mine)
        assert (again.status_code, again.json()["error"]["code"]) == (401, "invalid_token")
        assert (await side.client.get("/admin/fleet", headers=others)).status_code == 200
        token = await side.client.delete("/admin/session", headers=bearer(OWNER))
        assert (token.status_code, token.json()["error"]["code"]) == (409, "no_session")


async def test_a_page_of_another_port_cannot_have_a_browser_forget_its_session(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        mine = await side.logged_in()
        answer = await side.client.get("/admin/session", headers={**mine, "sec-fetch-site": "same-site"})
        assert (answer.status_code, answer.content) == (204, b"")
        assert "set-cookie" not in answer.headers
        await side.client.delete("/admin/session", headers=mine)
        gone = await side.client.get("/admin/session", headers=mine)
        assert "Max-Age=0" in gone.headers["set-cookie"]


async def test_the_owner_ends_all_sessions_and_nobody_else_does(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        readers, owners = await side.logged_in(READER), await side.logged_in()
        refused = await side.client.delete("/admin/sessions", headers=readers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "role_required")
        shown = (await side.client.get("/admin/sessions", headers=owners)).json()["data"]
        assert [(each["name"], each["yours"]) for each in shown] == [("session:rita", False), ("session:admin", True)]
        assert (await side.client.delete("/admin/sessions", headers=owners)).json() == {"ended": 2}
        for headers in (readers, owners):
            assert (await side.client.get("/admin/fleet", headers=headers)).status_code == 401


async def test_a_stream_can_end_with_its_session(tmp_path: Path) -> None:
    async def stream(request: Request) -> Response:
        session = session_of(request)
        assert session is not None

        async def events() -> Any:
            yield b"data: 1\n\n"
            await session.ended.wait()

        return StreamingResponse(events(), media_type="text/event-stream")

    route = GuardedRoute("/admin/stream", stream, Who.READER, methods=["GET"])
    async with admin_side(tmp_path, routes=[route]) as side:
        mine = await side.logged_in(READER)
        async with side.client.stream("GET", "/admin/stream", headers=mine) as answer:
            pieces = answer.aiter_bytes()
            assert await anext(pieces) == b"data: 1\n\n"
            await side.client.delete("/admin/session", headers=mine)
            async with asyncio.timeout(5):
                assert [piece async for piece in pieces] == []


async def test_wrong_tokens_are_throttled_and_the_owners_bearer_token_never_is(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        for index in range(int(PER_ADDRESS_BURST)):
            refused = await side.login(f"wrong-{index}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "login_refused")
            assert "www-authenticate" not in refused.headers
        for token in ("wrong", OWNER):
            late = await side.login(token)
            assert (late.status_code, late.json()["error"]["code"]) == (429, "login_throttled")
            assert 1 <= int(late.headers["retry-after"]) <= 12
        assert (await side.client.get("/admin/fleet", headers=bearer(OWNER))).status_code == 200
        for _ in range(20):
            assert (await side.client.get("/admin/fleet", headers=bearer("wrong"))).status_code == 401
        assert (await side.client.get("/admin/fleet", headers=bearer(OWNER))).status_code == 200
        await until(lambda: side.desk.audit.unwritten == 0)
        entries = (await side.client.get("/admin/audit", headers=bearer(OWNER))).json()["data"]
        assert [(each["actor"], each["action"]) for each in entries] == [("nobody", "login.failed")]
        assert "wrong" not in str(entries)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"token": 1}', b'{"token": "x", "role": "owner"}', b"\xff"])
async def test_a_body_that_is_no_login_is_refused(tmp_path: Path, body: bytes) -> None:
    async with admin_side(tmp_path) as side:
        answer = await side.client.post("/admin/session", content=body, headers=SAME_ORIGIN)
        assert answer.status_code == 400
        assert "set-cookie" not in answer.headers
        large = await side.client.post("/admin/session", content=b" " * 5000, headers=SAME_ORIGIN)
        assert large.status_code == 413


async def test_a_page_over_plain_http_from_elsewhere_is_told_why_it_gets_no_session(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        answer = await side.login(OWNER, origin="http://10.0.0.5:7401")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "insecure_origin")
        assert "TLS" in answer.json()["error"]["message"]
        for origin in ("https://tidegate.example.org", "http://localhost:7401", "http://[::1]:7401"):
            assert (await side.login(OWNER, origin=origin)).status_code == 201


# -- cross-site requests


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"sec-fetch-site": "same-origin", "x-tidegate-csrf": "1"}, True),
        ({"sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "same-origin", "x-tidegate-csrf": "0"}, False),
        ({"sec-fetch-site": "cross-site", "x-tidegate-csrf": "1"}, False),
        ({"sec-fetch-site": "same-site", "x-tidegate-csrf": "1"}, False),
        ({"sec-fetch-site": "none", "x-tidegate-csrf": "1"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "OWN", "x-tidegate-csrf": "1"}, False),
        ({"origin": "OWN", "x-tidegate-csrf": "1"}, True),
        ({"origin": "OWN"}, False),
        ({"origin": "null", "x-tidegate-csrf": "1"}, False),
        ({"origin": "http://127.0.0.1:1", "x-tidegate-csrf": "1"}, False),
        ({"origin": "http://evil.example", "x-tidegate-csrf": "1"}, False),
        ({"origin": "ftp://127.0.0.1", "x-tidegate-csrf": "1"}, False),
        ({"x-tidegate-csrf": "1"}, False),
        ({}, False),
    ],
)
async def test_a_session_changes_something_only_from_a_page_of_this_listener(
    tmp_path: Path, headers: dict[str, str], passes: bool
) -> None:
    async with admin_side(tmp_path) as side:
        held = {"cookie": (await side.logged_in())["cookie"]}
        sent = {name: side.url if value == "OWN" else value for name, value in headers.items()}
        answer = await side.client.delete("/admin/session", headers={**held, **sent})
        if passes:
            assert answer.status_code == 204
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site_request")
            assert (await side.client.get("/admin/fleet", headers=held)).status_code == 200


async def test_nobody_is_logged_in_from_another_site(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        for headers in (
            {"sec-fetch-site": "cross-site", "x-tidegate-csrf": "1"},
            {"origin": "http://evil.example", "x-tidegate-csrf": "1"},
            {"sec-fetch-site": "same-origin"},
        ):
            answer = await side.client.post("/admin/session", json={"token": OWNER}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site_request")
            assert "set-cookie" not in answer.headers


async def test_a_session_reads_nothing_for_another_site_either(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        held = {"cookie": (await side.logged_in())["cookie"]}
        for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
            answer = await side.client.get("/admin/fleet", headers={**held, "sec-fetch-site": site})
            assert answer.status_code == status, site


async def test_a_bearer_token_needs_none_of_that_and_counts_before_a_cookie(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        held = {"cookie": (await side.logged_in())["cookie"]}
        foreign = {"sec-fetch-site": "cross-site", **held}
        assert (await side.client.delete("/admin/sessions", headers={**foreign, **bearer(OWNER)})).status_code == 200
        held = {"cookie": (await side.logged_in())["cookie"]}
        wrong = await side.client.get("/admin/fleet", headers={**held, **bearer("wrong")})
        assert wrong.status_code == 401


async def test_every_answer_tells_browsers_to_be_careful(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        answers: list[httpx2.Response] = [
            await side.client.get("/admin/fleet"),
            await side.client.get("/admin/fleet", headers=bearer(OWNER)),
            await side.client.get("/admin/nowhere", headers=bearer(OWNER)),
            await side.client.get("/admin/fleet", headers={"host": "evil.example"}),
            await side.client.get("/metrics"),
            await side.client.get("/admin/"),
            await side.login(),
        ]
        for answer in answers:
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert answer.headers["cross-origin-opener-policy"] == "same-origin"
            assert answer.headers["cache-control"] in ("no-store", "no-cache")
            assert "access-control-allow-origin" not in answer.headers
