"""Logging in at an identity provider: the whole round, and every way in which it may be a lie."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from gateway.admin.oidc import MAX_PENDING, PENDING_S, Attempts, OidcError, person_of
from gateway.admin.oidc_routes import ATTEMPT_COOKIE
from gateway.config.operators import Oidc
from gateway.policy import Who
from tests.support.admin_desk import OWNER, AdminSide, admin_side, bearer
from tests.support.oidc_provider import CLIENT, SECRET, OidcProvider, oidc_provider, query_of

CALLBACK = "/admin/session/oidc/callback"
ROLES = {"oncall": "operator", "admins": "owner", "all": "reader"}


@dataclass
class Round:
    """A gateway, its provider, and a browser that has not done anything yet."""

    provider: OidcProvider
    side: AdminSide

    async def away(self) -> tuple[httpx2.Response, str]:
        """What the gateway sends the browser away with, and the cookie that it is to keep."""
        answer = await self.side.client.get("/admin/session/oidc")
        assert answer.status_code == 303
        return answer, answer.headers["set-cookie"].partition(";")[0]

    async def log_in(self, change: Callable[[str], str] = lambda url: url) -> httpx2.Response:
        """To the provider and back; `change` may spoil the address that the provider sends the browser to."""
        answer, cookie = await self.away()
        back = await self.side.client.get(answer.headers["location"])
        assert back.status_code == 302
        return await self.side.client.get(change(self.home(back)), headers={"cookie": cookie})

    def home(self, answer: httpx2.Response) -> str:
        """Where the provider sends the browser back to, without the proxy with TLS that would be in front."""
        location: str = answer.headers["location"]
        assert location.startswith("https://admin.example.org" + CALLBACK)
        return location.replace("https://admin.example.org", self.side.url)

    async def who(self, answer: httpx2.Response) -> dict[str, Any] | None:
        """Whom the answer has logged in."""
        for cookie in answer.headers.get_list("set-cookie"):
            if cookie.startswith("__Host-tidegate="):
                found = await self.side.client.get("/admin/session", headers={"cookie": cookie.partition(";")[0]})
                return dict(found.json())
        return None


@asynccontextmanager
async def round_trip(folder: Path, **settings: Any) -> AsyncIterator[Round]:
    async with oidc_provider() as provider:
        oidc = {
            "issuer": provider.issuer,
            "client_id": CLIENT,
            "client_secret": SecretStr(SECRET),
            "redirect_url": "https://admin.example.org" + CALLBACK,
            "roles": ROLES,
            **settings,
        }
        async with admin_side(folder, oidc=oidc) as side:
            found = Round(provider, side)
            yield found


@pytest.fixture
async def trip(tmp_path: Path) -> AsyncIterator[Round]:
    async with round_trip(tmp_path) as found:
        yield found


async def test_somebody_whom_the_provider_knows_gets_the_role_that_it_names(trip: Round) -> None:
    answer = await trip.log_in()
    assert (answer.status_code, answer.headers["location"]) == (303, "/admin/")
    who = await trip.who(answer)
    assert who is not None
    assert (who["name"], who["role"], who["how"]) == ("oidc:jo@example.org", "operator", "session")
    (asked,) = trip.provider.asked
    assert asked["redirect_uri"] == "https://admin.example.org" + CALLBACK
    assert SECRET not in str({name: value for name, value in asked.items() if name != "authorization"})
    entries = (await trip.side.client.get("/admin/audit", headers=bearer(OWNER))).json()["data"]
    assert [(each["actor"], each["action"], each["diff"]["by"]) for each in entries] == [
        ("oidc:jo@example.org", "login", "oidc")
    ]
    assert (await trip.side.client.get("/admin/session/ways")).json()["oidc_name"] == "127.0.0.1"


async def test_the_browser_is_sent_with_all_that_ties_the_login_to_it(trip: Round) -> None:
    answer, cookie = await trip.away()
    asked = query_of(answer.headers["location"])
    assert set(asked) == {
        "response_type", "client_id", "redirect_uri", "scope", "state", "nonce", "code_challenge",
        "code_challenge_method",
    }  # fmt: skip
    assert asked["scope"] == "openid email"
    assert cookie.startswith(f"{ATTEMPT_COOKIE}=")
    attributes = answer.headers["set-cookie"].partition("; ")[2]
    assert attributes == "Path=/; Max-Age=600; Secure; HttpOnly; SameSite=Lax"
    other, _ = await trip.away()
    again = query_of(other.headers["location"])
    assert not {again[name] for name in ("state", "nonce", "code_challenge")} & set(asked.values())


PAST, FUTURE = 1_600_000_000, 4_000_000_000


@pytest.mark.parametrize(
    "lies",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": ["another"]},
        {"aud": None},
        {"aud": [CLIENT, "another"]},
        {"aud": [CLIENT, "another"], "azp": "another"},
        {"azp": "another"},
        {"nonce": "of another login"},
        {"nonce": None},
        {"nonce": 7},
        {"exp": PAST},
        {"exp": None},
        {"exp": "soon"},
        {"exp": True},
        {"iat": FUTURE},
        {"iat": None},
        {"nbf": FUTURE},
        {"sub": None},
        {"sub": ""},
    ],
    ids=str,
)
async def test_a_token_that_is_not_for_us_for_this_login_and_for_now_lets_nobody_in(
    trip: Round, lies: dict[str, Any]
) -> None:
    trip.provider.lies = lies
    answer = await trip.log_in()
    assert (answer.status_code, answer.headers["location"]) == (303, "/admin/?signin=refused")
    assert await trip.who(answer) is None
    assert len(trip.side.desk.access.sessions) == 0


@pytest.mark.parametrize("alg", ["none", "HS256", "foreign"])
async def test_a_token_that_the_provider_has_not_signed_lets_nobody_in(trip: Round, alg: str) -> None:
    trip.provider.alg = alg
    answer = await trip.log_in()
    assert answer.headers["location"] == "/admin/?signin=refused"
    assert await trip.who(answer) is None


async def test_several_audiences_are_fine_when_the_token_was_issued_to_us(trip: Round) -> None:
    trip.provider.lies = {"aud": [CLIENT, "another"], "azp": CLIENT}
    assert await trip.who(await trip.log_in()) is not None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("state=", "state=x", "expired"),
        ("state=", "other=", "expired"),
        ("code=", "code=x", "refused"),
        ("code=", "error=access_denied&other=", "refused"),
        ("iss=http", "iss=https", "refused"),
    ],
)
async def test_an_answer_that_was_changed_on_the_way_lets_nobody_in(trip: Round, old: str, new: str, said: str) -> None:
    answer = await trip.log_in(lambda url: url.replace(old, new))
    assert answer.headers["location"] == f"/admin/?signin={said}"
    assert await trip.who(answer) is None


async def test_a_code_and_a_state_are_good_once_and_in_one_browser(trip: Round) -> None:
    answer, cookie = await trip.away()
    back = trip.home(await trip.side.client.get(answer.headers["location"]))
    _, others = await trip.away()
    for headers in ({}, {"cookie": others}):  # somebody else's browser, made to go there: login CSRF
        refused = await trip.side.client.get(back, headers=headers)
        assert refused.headers["location"] == "/admin/?signin=expired"
        assert await trip.who(refused) is None
    assert await trip.who(await trip.side.client.get(back, headers={"cookie": cookie})) is not None
    replayed = await trip.side.client.get(back, headers={"cookie": cookie})
    assert replayed.headers["location"] == "/admin/?signin=expired"
    used = query_of(back)["code"]
    again = await trip.log_in(lambda url: url.replace(query_of(url)["code"], used))
    assert again.headers["location"] == "/admin/?signin=refused"
    assert len(trip.provider.asked) == 2


async def test_whoever_has_no_role_gets_in_nowhere(trip: Round) -> None:
    for groups in (None, [], ["others"], "others", 7, {"oncall": True}):
        trip.provider.lies = {"groups": groups}
        answer = await trip.log_in()
        assert answer.headers["location"] in ("/admin/?signin=no_role", "/admin/?signin=throttled")
        assert await trip.who(answer) is None


async def test_who_fails_too_often_waits_here_too(trip: Round) -> None:
    trip.provider.alg = "none"
    said = [(await trip.log_in()).headers["location"] for _ in range(7)]
    assert said == [*["/admin/?signin=refused"] * 5, *["/admin/?signin=throttled"] * 2]


async def test_a_page_that_has_a_browser_come_back_from_nowhere_locks_nobody_out(trip: Round) -> None:
    for query in ("", "?state=x&code=y", "?error=access_denied") * 5:
        answer = await trip.side.client.get(CALLBACK + query)
        assert answer.headers["location"] == "/admin/?signin=expired"
    assert (await trip.side.login()).status_code == 201
    assert await trip.who(await trip.log_in()) is not None


async def test_a_provider_that_changes_its_keys_is_asked_for_them(trip: Round) -> None:
    assert await trip.who(await trip.log_in()) is not None
    trip.provider.rotate()
    late = await trip.log_in()
    assert late.headers["location"] == "/admin/?signin=refused"  # its keys were fetched just now
    provider = trip.side.app.app.routes  # type: ignore[attr-defined]
    (handlers,) = {route.endpoint.__self__ for route in provider if route.path == CALLBACK}
    handlers._made._keys_at -= 31
    assert await trip.who(await trip.log_in()) is not None


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.example"},
        {"token_endpoint": "http://evil.example/token"},
        {"jwks_uri": None},
        {"authorization_endpoint": "javascript:alert(1)"},
    ],
    ids=str,
)
async def test_a_provider_that_points_elsewhere_is_not_followed(trip: Round, discovery: dict[str, Any]) -> None:
    trip.provider.discovery = discovery
    answer = await trip.side.client.get("/admin/session/oidc")
    assert answer.headers["location"] == "/admin/?signin=unavailable"


async def test_a_provider_that_is_away_lets_nobody_in_and_others_log_in_by_token(tmp_path: Path) -> None:
    async with round_trip(tmp_path, issuer="http://127.0.0.1:9") as trip:
        answer = await trip.side.client.get("/admin/session/oidc")
        assert answer.headers["location"] == "/admin/?signin=unavailable"
        assert (await trip.side.login()).status_code == 201


async def test_without_a_provider_its_routes_say_so(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        for path in ("/admin/session/oidc", CALLBACK):
            answer = await side.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "oidc_off")


# -- roles


def settings(**more: Any) -> Oidc:
    fields: dict[str, Any] = {
        "issuer": "https://login.example.org",
        "client_id": CLIENT,
        "redirect_url": "https://admin.example.org" + CALLBACK,
        "roles": ROLES,
    }
    return Oidc(**{**fields, **more})


def test_the_highest_of_several_roles_counts() -> None:
    claims = {"sub": "u", "groups": ["all", "admins", "oncall", "admins ", 3]}
    assert person_of(claims, settings()).role is Who.OWNER
    assert person_of({"sub": "u", "groups": "all"}, settings()).role is Who.READER


def test_a_role_may_be_deep_in_a_claim_or_have_dots_in_its_name() -> None:
    deep = {"sub": "u", "realm_access": {"roles": ["oncall"]}}
    assert person_of(deep, settings(role_claim="realm_access.roles")).role is Who.OPERATOR
    named = {"sub": "u", "https://example.org/roles": ["oncall"]}
    assert person_of(named, settings(role_claim="https://example.org/roles")).role is Who.OPERATOR


@pytest.mark.parametrize(
    ("claims", "allowed"),
    [
        ({"email": "jo@example.org", "email_verified": True}, True),
        ({"email": "jo@EXAMPLE.org", "email_verified": True}, True),
        ({"email": "jo@example.org", "email_verified": False}, False),
        ({"email": "jo@example.org", "email_verified": "true"}, False),
        ({"email": "jo@example.org"}, False),
        ({"email": "jo@example.org.evil.com", "email_verified": True}, False),
        ({"email": "jo@sub.example.org", "email_verified": True}, False),
        ({"email": "example.org", "email_verified": True}, True),
        ({"email": ["jo@example.org"], "email_verified": True}, False),
        ({}, False),
    ],
)
def test_only_verified_addresses_of_allowed_domains_come_in(claims: dict[str, Any], allowed: bool) -> None:
    chosen = settings(allowed_domains=("example.org",))
    if allowed:
        person_of({"sub": "u", "groups": ["all"], **claims}, chosen)
    else:
        with pytest.raises(OidcError):
            person_of({"sub": "u", "groups": ["all"], **claims}, chosen)


def test_an_address_that_is_not_verified_names_nobody_in_the_audit() -> None:
    claims = {"sub": "u-7", "groups": ["all"], "email": "boss@example.org"}
    assert person_of(claims, settings()).name == "oidc:u-7"
    assert person_of({**claims, "email_verified": True}, settings()).name == "oidc:boss@example.org"
    hostile = {"sub": "a\nb\x1b[31m" + "x" * 500, "groups": ["all"]}
    name = person_of(hostile, settings()).name
    assert name.isprintable()
    assert len(name) <= 130


def test_logins_that_were_begun_are_bounded_and_end() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    first, kept, _ = attempts.begin()
    now[0] = PENDING_S + 1
    with pytest.raises(OidcError, match="too long ago"):
        attempts.finish(first, kept)
    for _ in range(MAX_PENDING + 9):
        attempts.begin()
    state, kept, _ = attempts.begin()
    assert len(attempts) == MAX_PENDING
    with pytest.raises(OidcError):
        attempts.finish(state, "another")
    attempts.finish(state, kept)
