"""S5 and S6: who may use which route. The real route tables are walked and compared with those that stand here."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from gateway.admin.app import private_app
from gateway.admin.guard import Guard
from gateway.admin.sessions import COOKIE
from gateway.admin.throttle import Throttle
from gateway.api import RequestId, build_app
from gateway.database.answers import Changes
from gateway.edges.protocol import _HOT_PATHS
from gateway.error_replies import ERROR_HANDLERS
from gateway.key_routes import key_routes
from gateway.keys.directory import Freshness
from gateway.keys.errors import Forbidden, KeysUnavailable, TooManyFailedKeys, Unauthenticated
from gateway.keys.failures import FailedKeys
from gateway.keys.format import digest, mint
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.policy import GuardedRoute, UnguardedRoute, Who, guarded
from gateway.scaling.agents import PoolReport, Report
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.gateway.admission.keyed import KEY, admitting, keyed
from tests.support.admin_desk import OPERATOR as OPERATORS_TOKEN
from tests.support.admin_desk import OWNER as ADMIN_TOKEN
from tests.support.admin_desk import READER as READERS_TOKEN
from tests.support.admin_desk import REGISTRAR as REGISTRARS_TOKEN
from tests.support.admin_desk import SAME_ORIGIN, AdminSide, admin_side, bearer
from tests.support.client import connect
from tests.support.serving import Serving

LOOPS = ("uvloop",)
PEPPER = b"0123456789abcdef0123456789abcdef"
TOKEN = "tg_admin_" + "t" * 43
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
BODY = json.dumps({"model": "m", "messages": [], "prompt": "x", "input": "x"})

CLIENTS = {
    "/v1/chat/completions": Who.KEY,
    "/v1/completions": Who.KEY,
    "/v1/embeddings": Who.KEY,
    "/v1/models": Who.KEY,
    "/v1/models/{model:path}": Who.KEY,
    "/livez": Who.ANYONE,
    "/readyz": Who.ANYONE,
    "/openapi.json": Who.ANYONE,
    # The gateway's own playground, by a secret of its own: without that these do not exist.
    "/tidegate/playground/v1/chat/completions": Who.LOCAL,
    "/tidegate/playground/v1/completions": Who.LOCAL,
}
ANYONE, LOCAL, READER, OPERATOR, OWNER = Who.ANYONE, Who.LOCAL, Who.READER, Who.OPERATOR, Who.OWNER
REGISTRAR = Who.REGISTRAR
OPERATORS: dict[str, dict[str, Who]] = {
    "/metrics": {"GET": LOCAL},
    # The dashboard's files and the way in: they say nothing of this gateway.
    "/admin": {"GET": ANYONE},
    "/admin/": {"GET": ANYONE},
    "/admin/static/{path:path}": {"GET": ANYONE},
    "/admin/session": {"GET": ANYONE, "POST": ANYONE, "DELETE": READER},
    "/admin/session/ways": {"GET": ANYONE},
    "/admin/session/oidc": {"GET": ANYONE},
    "/admin/session/oidc/callback": {"GET": ANYONE},
    "/admin/sessions": {"GET": OWNER, "DELETE": OWNER},
    "/admin/openapi.json": {"GET": READER},
    "/admin/audit": {"GET": READER},
    # What there is, and what happens.
    "/admin/fleet": {"GET": READER},
    "/admin/fleet/map": {"GET": READER},
    "/admin/fleet/replicas/{pool}/{replica}": {"GET": READER},
    "/admin/usage": {"GET": READER},
    "/admin/overview": {"GET": READER},
    "/admin/events": {"GET": READER},
    "/admin/requests": {"GET": READER},
    "/admin/requests/{id}": {"GET": READER, "DELETE": OPERATOR},
    "/admin/explain": {"POST": OPERATOR},
    "/admin/playground": {"GET": READER, "POST": OPERATOR},
    # Where replicas come from.
    "/admin/members": {"GET": READER},
    "/admin/registrations/{pool}/{name}": {"PUT": REGISTRAR, "DELETE": REGISTRAR},
    # What is steered.
    "/admin/replicas": {"GET": READER},
    "/admin/replicas/{pool}/{replica}": {"GET": READER},
    "/admin/replicas/{pool}/{replica}/drain": {"POST": OPERATOR},
    "/admin/replicas/{pool}/{replica}/undrain": {"POST": OPERATOR},
    "/admin/replicas/{pool}/{replica}/cordon": {"POST": OPERATOR},
    "/admin/replicas/{pool}/{replica}/uncordon": {"POST": OPERATOR},
    "/admin/replicas/{pool}/{replica}/weight": {"PUT": OPERATOR, "DELETE": OPERATOR},
    "/admin/scaling": {"GET": READER},
    "/admin/scaling/{pool}": {"GET": READER, "PUT": OPERATOR, "DELETE": OPERATOR},
    "/admin/agents": {"GET": READER},
    "/admin/agents/{agent}": {"PUT": REGISTRAR},
    "/admin/pools/{pool}/roll": {"POST": OPERATOR},
    "/admin/adapters": {"GET": READER, "POST": OPERATOR},
    "/admin/adapters/{pool}/{name:path}": {"DELETE": OPERATOR},
    "/admin/settings": {"GET": READER},
    "/admin/reload": {"POST": OPERATOR},
    "/admin/overrides": {"GET": READER, "PATCH": OPERATOR, "DELETE": OPERATOR},
    "/admin/overrides/restore": {"POST": OPERATOR},
    "/admin/policies": {"GET": READER},
    "/admin/policies/compare": {"GET": READER, "POST": OPERATOR, "DELETE": OPERATOR},
    "/admin/models/{model:path}/policy": {"PUT": OPERATOR, "DELETE": OPERATOR},
    "/admin/models/{model:path}/shadow": {"PUT": OPERATOR, "DELETE": OPERATOR},
    # Who gets in, how much of it, and what it costs.
    "/admin/models/{model:path}/price": {"PUT": OWNER, "DELETE": OWNER},
    "/admin/keys": {"GET": READER, "POST": OWNER},
    "/admin/keys/{id}": {"GET": READER, "PATCH": OWNER, "DELETE": OWNER},
    "/admin/keys/{id}/rotate": {"POST": OWNER},
    "/admin/tenants": {"GET": READER},
    "/admin/tenants/{name}": {"GET": READER, "PUT": OWNER, "DELETE": OWNER},
    "/admin/undo/{entry}": {"POST": OWNER},
    "/admin/limits": {"GET": READER},
    "/admin/cost": {"GET": READER},
    "/admin/cost.csv": {"GET": READER},
}
NOWHERE = (
    "/",
    "/admin/x",
    "/admin/x/",
    "/v1",
    "/v1/responses",
    "/metrics/x",
    "/docs",
    "/v1/chat/completions/",
    "/%2e%2e/",
)


def routes_of(app: ASGIApp) -> dict[str, Who]:
    """Every path of an application with whom it is for; fails on anything that is no guarded route."""
    while not isinstance(app, Starlette):
        assert isinstance(app, RequestId | Guard)
        app = app._app if isinstance(app, RequestId) else app.app
    found = {}
    for route in app.routes:
        assert isinstance(route, GuardedRoute), route
        assert route.path not in found
        found[route.path] = route.who
    return found


def keys_of(found: Serving) -> dict[str, str]:
    """What each role shows: a header, or none."""
    gone, expired, disabled, orphan = mint(), mint(), mint(), mint()
    directory = found.runtime.gate.directory
    assert directory is not None
    records = (
        KeyRecord("key_expired", digest(PEPPER, expired.encode()), "acme", expires_unix_s=time.time() - 1),
        KeyRecord("key_disabled", digest(PEPPER, disabled.encode()), "acme", disabled=True),
        KeyRecord("key_orphan", digest(PEPPER, orphan.encode()), "closed"),
        KeyRecord("key_gone", digest(PEPPER, gone.encode()), "acme"),
    )
    directory.apply(Changes(1, keys=records, tenants=(TenantRecord("closed", disabled=True),)))
    directory.apply(Changes(2, gone=("key_gone",)))
    return {
        "nobody": "X-Nothing: x",
        "empty": "Authorization: Bearer ",
        "wrong": f"Authorization: Bearer {mint()}",
        "nonsense": "Authorization: Basic YTpi",
        "revoked": f"Authorization: Bearer {gone}",
        "expired": f"Authorization: Bearer {expired}",
        "disabled": f"Authorization: Bearer {disabled}",
        "of a closed tenant": f"Authorization: Bearer {orphan}",
        "operator": f"Authorization: Bearer {TOKEN}",
        "client": f"Authorization: Bearer {KEY}",
    }


@asynccontextmanager
async def with_keys(folder: Path, edge: str = "protocol") -> AsyncIterator[Serving]:
    """A gateway with keys."""
    async with FakeEngine() as engine, admitting(keyed(folder, [engine.url], edge=edge)) as found:
        # A walk shows more keys that open nothing than anybody may.
        found.runtime.gate._failed_keys = FailedKeys(per_s=1e9, burst=1e9)
        yield found


async def ask(address: tuple[str, int], method: str, path: str, header: str) -> Reply:
    body = BODY if method in ("POST", "PUT", "PATCH") else ""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", header]
    lines += [f"Content-Length: {len(body)}", "", body]
    async with connect(*address) as client:
        await client.send("\r\n".join(lines).encode())
        if method == "HEAD":  # which has the length of a body and no body
            return Reply(int((await client.rest()).split(b" ", 2)[1]), {}, b"", True)
        return await client.reply()


def filled(path: str) -> str:
    """A path as somebody would ask for it."""
    return re.sub(r"\{(\w+)(:path)?\}", r"\1", path)


def paths(table: Iterable[str]) -> list[str]:
    return [
        path.replace("{pool}", "pool").replace("{model:path}", "m").replace("{", "").replace("}", "") for path in table
    ]


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_every_route_of_clients_by_role_and_method(tmp_path: Path, edge: str) -> None:
    async with with_keys(tmp_path, edge) as found:
        assert routes_of(build_app(found.runtime)) == CLIENTS
        assert set(_HOT_PATHS.values()) <= {path for path, who in CLIENTS.items() if who is Who.KEY}
        address = (found.host, found.port)
        for role, header in keys_of(found).items():
            for path, who in zip(paths(CLIENTS), CLIENTS.values(), strict=True):
                for method in METHODS:
                    status = (await ask(address, method, path, header)).status
                    served = (method == "POST") == ("completions" in path or "embeddings" in path)
                    served = served and method in ("POST", "GET", "HEAD")
                    case = (role, method, path)
                    if who is Who.LOCAL:
                        assert status in (404, 405), (*case, status)
                    elif status == 405:
                        assert not served, case
                    elif role == "client" or who is Who.ANYONE:
                        assert (status == 200) == served, (*case, status)
                    else:
                        assert status == 401, (*case, status)
            for path in NOWHERE:
                assert (await ask(address, "GET", path, header)).status in (401, 404, 405)


def table_of(app: ASGIApp) -> dict[str, dict[str, Who]]:
    """Every path of the admin listener, with whom each method is for; fails on anything that is no guarded route."""
    inner = app.app if isinstance(app, Guard) else app
    assert isinstance(inner, Starlette)
    found: dict[str, dict[str, Who]] = {}
    for route in inner.routes:
        assert isinstance(route, GuardedRoute), route
        for method in (route.methods or set()) - {"HEAD"}:
            assert method not in found.setdefault(route.path, {}), (method, route.path)
            found[route.path][method] = route.who
    return found


async def status_of(app: ASGIApp, method: str, path: str, headers: dict[str, str]) -> int:
    """The status of an answer; what follows it is not waited for."""
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    messages = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and not started.done():
            started.set_result(message["status"])

    given = [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": given, "client": ("127.0.0.1", 1), "server": ("localhost", 1), "scheme": "http"}
    scope |= {"root_path": "", "http_version": "1.1"}
    task: asyncio.Future[Any] = asyncio.ensure_future(app(scope, receive, send))
    await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED, timeout=30)
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
    return started.result()


def shown_by(side: AdminSide, role: str) -> dict[str, str]:
    """What somebody of this role shows. Sessions are opened anew, since some routes end them."""
    kind, _, name = role.partition(" ")
    tokens = {"owner": ADMIN_TOKEN, "operator": OPERATORS_TOKEN, "reader": READERS_TOKEN, "registrar": REGISTRARS_TOKEN}
    if kind == "token" and name in tokens:
        return bearer(tokens[name])
    if name in tokens:
        id, _ = side.desk.access.sessions.open(f"session:{name}", Who(name))
        site = SAME_ORIGIN if kind == "session" else {"sec-fetch-site": "cross-site", "x-tidegate-csrf": "1"}
        return {"cookie": f"{COOKIE}={id}", **site}
    id, session = side.desk.access.sessions.open("ended", Who.OWNER)
    side.desk.access.sessions.end(session)
    return {
        "nobody": {},
        "empty": bearer(""),
        "wrong": bearer("w" * 43),
        "nonsense": {"authorization": "Basic YTpi"},
        "client": bearer(KEY),
        "another header": {"x-api-key": ADMIN_TOKEN},
        "ended session": {"cookie": f"{COOKIE}={id}", **SAME_ORIGIN},
        "made up session": {"cookie": f"{COOKIE}={'x' * 43}", **SAME_ORIGIN},
        "token as a cookie": {"cookie": f"{COOKIE}={ADMIN_TOKEN}", **SAME_ORIGIN},
    }[role]


KNOWN = (
    *(f"{kind} {role}" for kind in ("token", "session") for role in ("reader", "operator", "owner")),
    "token registrar",
)
UNKNOWN = (
    *("nobody", "empty", "wrong", "nonsense", "client", "another header"),
    *("ended session", "made up session", "token as a cookie"),
)


@pytest.mark.parametrize("role", [*KNOWN, *UNKNOWN, "foreign owner"])
async def test_every_route_of_operators_by_role_and_method(tmp_path: Path, role: str) -> None:
    async def changed() -> None: ...

    routes = key_routes(lambda: None, None, changed)
    async with admin_side(tmp_path, routes=routes) as side:
        assert table_of(side.app) == OPERATORS
        has = Who(role.partition(" ")[2]) if role in KNOWN else None
        for path, table in OPERATORS.items():
            for method in METHODS:
                side.desk.access.throttle = Throttle(0.0)
                who = table.get("GET" if method == "HEAD" else method)
                status = await status_of(side.app, method, filled(path), shown_by(side, role))
                case = (role, method, path, status)
                is_open = {LOCAL, ANYONE} & set(table.values()) and (who is None or who in (LOCAL, ANYONE))
                if is_open:
                    assert (status == 405) == (who is None), case
                    assert status != 401 or path == "/admin/session", case  # which is also what a wrong token gets
                elif has is None:
                    assert status == (403 if role == "foreign owner" else 401), case
                elif who is None:
                    assert status == 405, case
                elif has.includes(who):
                    assert status not in (401, 403, 405), case
                else:
                    assert status == 403, case
        for path in NOWHERE:
            expected = 404 if has is not None else 403 if role == "foreign owner" else 401
            assert await status_of(side.app, "POST", path, shown_by(side, role)) == expected, (role, path)


async def test_a_refusal_names_the_role_that_is_needed(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        refused = await side.client.delete("/admin/sessions", headers=bearer(READERS_TOKEN))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (403, "role_required")
        assert error["message"] == "This needs the role owner; you are token:rita, a reader."
        wrong = await side.client.put("/admin/session", headers=bearer(READERS_TOKEN))
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "DELETE, GET, HEAD, POST")


def test_a_role_includes_those_below_it_and_no_other() -> None:
    roles = [Who.READER, Who.OPERATOR, Who.OWNER]
    for has in roles:
        for needed in roles:
            assert has.includes(needed) == (roles.index(has) >= roles.index(needed))
        assert has.includes(Who.LOCAL)
        assert has.includes(Who.ANYONE)
    for nobody in (Who.ANYONE, Who.KEY, Who.LOCAL, Who.REGISTRAR):
        assert not any(nobody.includes(needed) for needed in [*roles, Who.LOCAL, Who.KEY])


def test_a_registrar_registers_and_looks_at_nothing_and_a_reader_does_not_register() -> None:
    able = [role for role in Who if role.includes(Who.REGISTRAR)]
    assert able == [Who.REGISTRAR, Who.OPERATOR, Who.OWNER]
    assert [needed for needed in Who if Who.REGISTRAR.includes(needed)] == [Who.ANYONE, Who.REGISTRAR]


OF_A_TEAM = {"team": {"role": "registrar", "token": SecretStr("team-registrar-0123456789"), "pools": ["own", "also"]}}


async def test_a_registrar_of_some_pools_says_nothing_about_others(tmp_path: Path) -> None:
    """Whatever route of a registrar's names a pool in its path."""
    async with admin_side(tmp_path, tokens=OF_A_TEAM) as side:
        headers = bearer("team-registrar-0123456789")
        routes = [(path, method) for path, table in OPERATORS.items() for method in table if table[method] is REGISTRAR]
        assert len(routes) == 3
        for path, method in routes:
            if "{pool}" not in path:
                assert path == "/admin/agents/{agent}", "it has to look at its body: see the next test"
                continue
            for pool in ("own", "also", "own%2F..%2Fother", "other", "OWN", "own%20"):
                at = re.sub(r"{\w+}", "x", path.replace("{pool}", pool))
                answer = await side.client.request(method, at, json={"url": "http://127.0.0.1:1"}, headers=headers)
                if pool in ("own", "also"):
                    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_pool")
                elif answer.status_code != 404 or answer.json()["error"]["code"] == "unknown_pool":
                    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "pool_refused"), at
                    assert "token:team may speak for also, own only" in answer.json()["error"]["message"]
        assert (await side.client.get("/admin/members", headers=headers)).json()["error"]["code"] == "role_required"


async def test_an_agent_of_some_pools_reports_no_others_nor_for_an_agent_that_has_them(tmp_path: Path) -> None:
    async with admin_side(tmp_path, tokens=OF_A_TEAM) as side:

        async def report(agent: str, *pools: str) -> tuple[str, str]:
            body = {"pools": {pool: {"launched": 1, "max": 2} for pool in pools}}
            headers = bearer("team-registrar-0123456789")
            error = (await side.client.put(f"/admin/agents/{agent}", json=body, headers=headers)).json()["error"]
            return error["code"], error["message"]

        assert (await report("box", "own"))[0] == "no_worker_answers", "there is none here; it was let in"
        refused = "This is about the pool 'other', and token:team may speak for also, own only"
        for pools in (("other",), ("own", "other")):
            code, message = await report("box", *pools)
            assert (code, message.startswith(refused)) == ("pool_refused", True)
        side.desk.scaling.agents = {"theirs": Report({"other": PoolReport()}), "ours": Report({"own": PoolReport()})}
        for body in ((), ("own",)):
            assert (await report("theirs", *body))[0] == "pool_refused"
            assert (await report("ours", *body))[0] == "no_worker_answers"


async def test_a_route_with_a_role_is_closed_where_nobody_has_found_out_who_asks() -> None:
    async def endpoint(request: Any) -> Any:
        raise AssertionError("it was reached")

    routes = guarded([GuardedRoute("/x", endpoint, Who.READER, methods=["GET"])])
    app = Starlette(routes=routes, exception_handlers=ERROR_HANDLERS)
    assert await status_of(app, "GET", "/x", {}) == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "gateway.internal"])
def test_outside_loopback_nothing_is_open(host: str) -> None:
    guard = Guard(private_app([]), host=host, token=SecretStr(TOKEN))
    for path in [*map(filled, OPERATORS), *NOWHERE]:
        problem = guard.problem(path, [(b"host", b"localhost")])
        assert problem is not None, path
        assert problem.status == 401


async def test_a_private_socket_serves_the_same_table(tmp_path: Path) -> None:
    table = table_of(private_app([]))
    assert table
    for path, methods in table.items():
        for method, who in methods.items():
            assert OPERATORS[path][method] is who, (method, path)


@pytest.mark.parametrize("route", [Route("/x", private_app), Mount("/x", Starlette())])
def test_an_application_with_a_route_that_says_nothing_is_not_built(route: Route | Mount) -> None:
    with pytest.raises(UnguardedRoute, match="who may use it"):
        guarded([GuardedRoute("/y", private_app, Who.KEY, methods=["GET"]), route])
    with pytest.raises(UnguardedRoute):
        private_app([], [route])  # type: ignore[list-item]


# -- S6: what cannot be checked lets nobody in


@pytest.mark.parametrize("freshness", [Freshness.AGED, Freshness.STALE])
@pytest.mark.parametrize("path", [path for path, who in CLIENTS.items() if who is Who.KEY])
async def test_where_keys_cannot_be_checked_nobody_becomes_somebody(
    tmp_path: Path, freshness: Freshness, path: str
) -> None:
    async with with_keys(tmp_path) as found:
        directory = found.runtime.gate.directory
        assert directory is not None
        method = "GET" if "models" in path else "POST"
        for role, header in keys_of(found).items():
            directory.mark(freshness)
            status = (await ask((found.host, found.port), method, paths([path])[0], header)).status
            known = role == "client" and freshness is Freshness.AGED
            assert status in ((200,) if known else (401, 503)), role


def test_every_refusal_of_a_key_is_401_403_429_or_503() -> None:
    statuses = {error: error("x").status for error in (Unauthenticated, TooManyFailedKeys, KeysUnavailable, Forbidden)}
    assert list(statuses.values()) == [401, 429, 503, 403]


async def test_a_defect_in_the_check_lets_nobody_in(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as found:
        directory = found.runtime.gate.directory
        assert directory is not None

        def broken(key: bytes) -> bytes:
            raise RuntimeError("a defect")

        directory._digest = broken
        for path, who in CLIENTS.items():
            if who is Who.KEY:
                method = "GET" if "models" in path else "POST"
                reply = await ask((found.host, found.port), method, paths([path])[0], f"Authorization: Bearer {KEY}")
                assert reply.status == 500, path
                assert json.loads(reply.body)["error"]["code"] == "internal_error"
