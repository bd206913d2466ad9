"""S5 and S6: who may use which route. The real route tables are walked and compared with those that stand here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from gateway.admin import Guard, admin_app, private_app
from gateway.api import RequestId, build_app
from gateway.database.answers import Changes
from gateway.edges.protocol import _HOT_PATHS
from gateway.keys.directory import Freshness
from gateway.keys.errors import Forbidden, KeysUnavailable, TooManyFailedKeys, Unauthenticated
from gateway.keys.failures import FailedKeys
from gateway.keys.format import digest, mint
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.listener import admin_listener, bind_tcp, listen
from gateway.policy import GuardedRoute, UnguardedRoute, Who, guarded
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.gateway.admission.keyed import KEY, admitting, keyed
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
}
OPERATORS = {
    "/metrics": Who.LOCAL,
    "/admin/fleet": Who.OPERATOR,
    "/admin/usage": Who.OPERATOR,
    "/admin/explain": Who.OPERATOR,
    "/admin/replicas": Who.OPERATOR,
    "/admin/replicas/{pool}/{replica}": Who.OPERATOR,
    "/admin/replicas/{pool}/{replica}/drain": Who.OPERATOR,
    "/admin/replicas/{pool}/{replica}/undrain": Who.OPERATOR,
    "/admin/adapters": Who.OPERATOR,
    "/admin/adapters/{pool}/{name:path}": Who.OPERATOR,
    "/admin/keys": Who.OPERATOR,
    "/admin/keys/{id}": Who.OPERATOR,
    "/admin/keys/{id}/rotate": Who.OPERATOR,
    "/admin/tenants": Who.OPERATOR,
    "/admin/tenants/{name}": Who.OPERATOR,
    "/admin/audit": Who.OPERATOR,
}
NOWHERE = ("/", "/admin", "/admin/", "/v1", "/v1/responses", "/metrics/x", "/docs", "/v1/chat/completions/", "/%2e%2e/")


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
async def both(folder: Path, edge: str = "protocol") -> AsyncIterator[tuple[Serving, tuple[str, int], ASGIApp]]:
    """A gateway with keys, and its admin listener's address and application."""
    async with FakeEngine() as engine, admitting(keyed(folder, [engine.url], edge=edge)) as found:
        # A walk shows more keys that open nothing than anybody may.
        found.runtime.gate._failed_keys = FailedKeys(per_s=1e9, burst=1e9)
        routes = found.runtime.admission.admin_routes()
        app = admin_app([LocalSource(found.runtime)], host="127.0.0.1", token=SecretStr(TOKEN), routes=routes)
        sock = bind_tcp("127.0.0.1", 0, "admin.port")
        listen([sock])
        listener = admin_listener(app)
        task = asyncio.create_task(listener.serve([sock]))
        await listener.ready.wait()
        try:
            yield found, sock.getsockname()[:2], app
        finally:
            listener.cut()
            listener.should_exit = True
            await task


async def ask(address: tuple[str, int], method: str, path: str, header: str) -> Reply:
    body = BODY if method in ("POST", "PUT", "PATCH") else ""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", header]
    lines += [f"Content-Length: {len(body)}", "", body]
    async with connect(*address) as client:
        await client.send("\r\n".join(lines).encode())
        if method == "HEAD":  # which has the length of a body and no body
            return Reply(int((await client.rest()).split(b" ", 2)[1]), {}, b"", True)
        return await client.reply()


def paths(table: Iterable[str]) -> list[str]:
    return [
        path.replace("{pool}", "pool").replace("{model:path}", "m").replace("{", "").replace("}", "") for path in table
    ]


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_every_route_of_clients_by_role_and_method(tmp_path: Path, edge: str) -> None:
    async with both(tmp_path, edge) as (found, _, _app):
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
                    if status == 405:
                        assert not served, case
                    elif role == "client" or who is Who.ANYONE:
                        assert (status == 200) == served, (*case, status)
                    else:
                        assert status == 401, (*case, status)
            for path in NOWHERE:
                assert (await ask(address, "GET", path, header)).status in (401, 404, 405)


async def test_every_route_of_operators_by_role_and_method(tmp_path: Path) -> None:
    async with both(tmp_path) as (found, address, app):
        assert routes_of(app) == OPERATORS
        for role, header in keys_of(found).items():
            for path, who in zip(paths(OPERATORS), OPERATORS.values(), strict=True):
                for method in METHODS:
                    status = (await ask(address, method, path, header)).status
                    if role == "operator" or who is Who.LOCAL:
                        assert status != 401, (role, method, path)
                    else:
                        assert status == 401, (role, method, path)
            for path in NOWHERE:
                expected = 404 if role == "operator" else 401
                assert (await ask(address, "GET", path, header)).status == expected, (role, path)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "gateway.internal"])
def test_outside_loopback_nothing_is_open(host: str) -> None:
    guard = Guard(private_app([]), host=host, token=SecretStr(TOKEN))
    for path in [*paths(OPERATORS), *NOWHERE]:
        problem = guard.problem(path, [(b"host", b"localhost")])
        assert problem is not None, path
        assert problem.status == 401


async def test_a_private_socket_serves_the_same_table(tmp_path: Path) -> None:
    table = routes_of(private_app([]))
    assert table == {path: who for path, who in OPERATORS.items() if path in table}


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
    async with both(tmp_path) as (found, _, _app):
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
    async with both(tmp_path) as (found, _, _app):
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
