"""The operators' listener: who gets in, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin.app import admin_app, private_app
from gateway.admin.guard import Guard
from gateway.edges.hosts import host_name
from gateway.listener import admin_listener, bind_tcp, bind_uds, listen
from gateway.owner import StateError, state_directory, stored_token
from gateway.sources import RemoteSource, Silent, Source
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from tests.support.serving import Serving, serving, settings_for

TOKEN = "tg_admin_" + "t" * 43
BEARER = {"authorization": f"Bearer {TOKEN}"}
CHAT = {"model": "m", "messages": []}


@contextlib.asynccontextmanager
async def served(app: ASGIApp, uds: str | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of this app on a real socket."""
    sock = bind_tcp("127.0.0.1", 0, "admin.port") if uds is None else bind_uds(uds, "test")
    listen([sock])
    listener = admin_listener(app)
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    base_url = "http://localhost" if uds else "http://{}:{}".format(*sock.getsockname()[:2])
    transport = httpx2.AsyncHTTPTransport(uds=uds)
    try:
        async with httpx2.AsyncClient(transport=transport, base_url=base_url) as client:
            yield client
    finally:
        listener.cut()
        listener.should_exit = True
        await task


@contextlib.asynccontextmanager
async def gateway_and_admin() -> AsyncIterator[tuple[Serving, httpx2.AsyncClient]]:
    """A gateway with one engine behind it, and a client of its admin listener that has the token."""
    token = SecretStr(TOKEN)
    async with FakeEngine() as engine, serving(_settings(engine.url)) as gateway:
        app = admin_app([LocalSource(gateway.runtime)], host="127.0.0.1", token=token)
        async with served(app) as client:
            client.headers.update(BEARER)
            yield gateway, client


def _settings(url: str) -> Any:
    return settings_for(
        [url],
        backend={"api_key": SecretStr("sk-engine-key-of-the-test")},
        admin={"token": SecretStr(TOKEN)},
        models={"m": {"backend": "pool", "aliases": ["gpt-x"], "upstream_model": "weights"}},
    )


async def chat(gateway: Serving, count: int) -> None:
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(count):
            await client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
    await gateway.settled(count)


# -- who gets in


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_every_route_is_closed_without_the_token(host: str) -> None:
    routes = [route for route in private_app([]).routes if isinstance(route, Route)]
    assert {route.path for route in routes} == {
        "/metrics",
        "/admin/fleet",
        "/admin/usage",
        "/admin/explain",
        "/admin/replicas",
        "/admin/replicas/{pool}/{replica}",
        "/admin/replicas/{pool}/{replica}/drain",
        "/admin/replicas/{pool}/{replica}/undrain",
        "/admin/replicas/{pool}/{replica}/cordon",
        "/admin/replicas/{pool}/{replica}/uncordon",
        "/admin/adapters",
        "/admin/adapters/{pool}/{name:path}",
        "/admin/openapi.json",
    }
    async with served(admin_app([], host=host, token=SecretStr(TOKEN))) as client:
        for path in [*(route.path for route in routes), "/admin", "/admin/", "/", "/admin/fleet/", "/metrics/", "//x"]:
            for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
                answer = await client.request(method, path)
                opened = path == "/metrics" and host == "127.0.0.1"
                assert (answer.status_code != 401) == opened, (method, path)
                assert opened or answer.headers["www-authenticate"] == "Bearer"
        for route in routes:
            # With the token each is reached: what is asked for does not exist, and that is said.
            for method in (route.methods or set()) - {"HEAD"}:
                answer = await client.request(method, route.path, headers=BEARER)
                expected = 404 if "{" in route.path else 400 if method == "POST" else 200
                assert answer.status_code == expected, (method, route.path)


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([f"Bearer {TOKEN}"], None),
        ([f"bearer {TOKEN}"], None),
        ([f"BEARER   {TOKEN} "], None),
        ([], 401),
        ([""], 401),
        (["Bearer"], 401),
        (["Bearer "], 401),
        ([TOKEN], 401),
        ([f"Basic {TOKEN}"], 401),
        ([f"Bearer {TOKEN}x"], 401),
        ([f"Bearer {TOKEN[:-1]}"], 401),
        ([f"Bearer {TOKEN.upper()}"], 401),
        ([f"Bearer {TOKEN}, Bearer {TOKEN}"], 401),
        ([f"Bearer {TOKEN}", f"Bearer {TOKEN}"], 401),
        (["Bearer \u00e9\u00ff"], 401),
    ],
)
def test_only_the_whole_token_opens(values: Sequence[str], status: int | None) -> None:
    guard = Guard(private_app([]), host="127.0.0.1", token=SecretStr(TOKEN))
    headers = [(b"host", b"localhost"), *((b"authorization", value.encode("latin-1")) for value in values)]
    problem = guard.problem("/admin/fleet", headers)
    assert (None if problem is None else problem.status) == status


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Bearer None", "Bearer x"])
def test_without_a_token_nothing_opens_but_local_metrics(value: str) -> None:
    headers = [(b"host", b"localhost:7401"), (b"authorization", value.encode())]
    local = Guard(private_app([]), host="::1", token=None)
    problem = local.problem("/admin/usage", headers)
    assert problem is not None
    assert problem.status == 401
    assert local.problem("/metrics", headers) is None
    assert Guard(private_app([]), host="10.0.0.1", token=None).problem("/metrics", headers) is not None


@pytest.mark.parametrize(
    ("listening", "named", "welcome"),
    [
        ("127.0.0.1", "127.0.0.1:7401", True),
        ("127.0.0.1", "localhost:7401", True),
        ("127.0.0.1", "LOCALHOST.", True),
        ("127.0.0.1", "[::1]:7401", True),
        ("127.0.0.1", "127.8.8.8", True),
        ("localhost", "localhost", True),
        ("127.0.0.1", "rebound.example:7401", False),
        ("127.0.0.1", "localhost.example", False),
        ("127.0.0.1", "127.0.0.1.example", False),
        ("127.0.0.1", "10.0.0.7:7401", False),
        ("127.0.0.1", "localhost:7401@x", False),
        ("127.0.0.1", "[::1]x", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", ":7401", False),
        ("0.0.0.0", "gateway.internal:7401", True),
        ("10.0.0.7", "10.0.0.7:7401", True),
    ],
)
def test_a_local_listener_answers_only_to_local_names(listening: str, named: str, welcome: bool) -> None:
    guard = Guard(private_app([]), host=listening, token=SecretStr(TOKEN))
    problem = guard.problem("/metrics", [(b"host", named.encode()), (b"authorization", f"Bearer {TOKEN}".encode())])
    assert (problem is None) == welcome
    assert problem is None or problem.status == 421


def test_a_request_names_one_host() -> None:
    guard = Guard(private_app([]), host="127.0.0.1", token=SecretStr(TOKEN))
    for hosts in ([], [(b"host", b"localhost"), (b"host", b"localhost")]):
        problem = guard.problem("/metrics", hosts)
        assert problem is not None
        assert problem.status == 421


@pytest.mark.parametrize(
    ("value", "name"), [("a:1", "a"), ("[::1]", "::1"), ("a:b", ""), ("[::1]:", "::1"), ("::1", "")]
)
def test_the_name_in_a_host_header(value: str, name: str) -> None:
    assert host_name(value) == name


async def test_errors_have_openais_shape() -> None:
    async with served(admin_app([], host="127.0.0.1", token=SecretStr(TOKEN))) as client:
        closed = await client.get("/admin/fleet")
        missing = await client.get("/admin/nothing", headers=BEARER)
        wrong_method = await client.post("/admin/fleet", headers=BEARER)
        wrong_limit = await client.get("/admin/usage?limit=0", headers=BEARER)
    assert [each.status_code for each in (closed, missing, wrong_method, wrong_limit)] == [401, 404, 405, 400]
    for answer in (closed, missing, wrong_method, wrong_limit):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert wrong_limit.json()["error"]["param"] == "limit"


# -- what it tells


async def test_the_fleet_is_shown_without_secrets() -> None:
    async with gateway_and_admin() as (gateway, admin):
        await chat(gateway, 1)
        answer = await admin.get("/admin/fleet")
    (worker,) = answer.json()["workers"]
    assert (worker["worker"], worker["up"], worker["draining"], worker["in_flight"]) == (0, True, False, 0)
    assert abs(worker["started_unix_s"] - time.time()) < 60
    assert worker["models"] == {"m": {"aliases": ["gpt-x"], "backend": "pool", "upstream_model": "weights"}}
    (replica,) = worker["pools"][0]["replicas"]
    assert replica["connections"] == {"idle": 1, "active": 0, "waiting": 0}
    assert (replica["failures"], replica["in_flight_bytes"], replica["available"]) == (0, 0, True)
    assert worker["config"]["server"]["edge"] == "protocol"
    for secret in (TOKEN, "sk-engine-key", '"token"', "api_key"):
        assert secret not in answer.text
    assert answer.headers["cache-control"] == "no-store"


async def test_metrics_carry_the_worker_and_can_be_parsed() -> None:
    async with gateway_and_admin() as (gateway, admin):
        await chat(gateway, 3)
        text = (await admin.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels["worker"] == "0" for sample in samples)
    (requests,) = [sample for sample in samples if sample.name == "tidegate_requests_total"]
    assert (requests.value, requests.labels["outcome"]) == (3, "completed")


async def test_usage_comes_newest_first_and_bounded() -> None:
    async with gateway_and_admin() as (gateway, admin):
        await chat(gateway, 5)
        everything = (await admin.get("/admin/usage")).json()["data"]
        two = (await admin.get("/admin/usage?limit=2")).json()["data"]
        statuses = [
            (await admin.get(f"/admin/usage?limit={limit}")).status_code
            for limit in ("1000", "1001", "-1", "x", "", "9" * 30)
        ]
    assert [record["id"] for record in everything] == [each.request_id for each in reversed(gateway.records)]
    assert two == everything[:2]
    assert statuses == [200, 400, 400, 400, 400, 400]


async def test_a_remote_worker_shows_what_a_local_one_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    uds = str(tmp_path_factory.mktemp("s") / "w.sock")
    async with FakeEngine() as engine, serving(_settings(engine.url)) as gateway:
        await chat(gateway, 2)
        local: Source = LocalSource(gateway.runtime, index=1)
        async with served(private_app([local]), uds):
            remote: Source = RemoteSource(1, uds)
            assert await remote.fleet() == await local.fleet()
            assert await remote.usage(1) == (await local.usage(2))[:1]
            names = {family.name for family in await local.metrics()}
            assert {family.name for family in await remote.metrics()} == names


async def test_a_worker_that_does_not_answer_is_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    (queue := bind_uds(str(folder / "stuck.sock"), "test")).listen()
    sources = [RemoteSource(0, str(folder / "none.sock")), RemoteSource(1, str(folder / "stuck.sock"), timeout_s=0.1)]
    async with served(private_app(sources)) as client:
        assert (await client.get("/admin/fleet")).json()["workers"] == [
            {"worker": 0, "up": False},
            {"worker": 1, "up": False},
        ]
        assert (await client.get("/admin/usage")).json() == {"data": []}
        text = (await client.get("/metrics")).text
    assert 'tidegate_worker_up{worker="1"} 0.0' in text
    queue.close()


async def test_half_an_answer_counts_as_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    uds = str(tmp_path_factory.mktemp("s") / "w.sock")

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n# HELP half")
        writer.close()

    async with await asyncio.start_unix_server(cut, uds):
        with pytest.raises(Silent):
            await RemoteSource(0, uds).metrics()


async def test_a_defect_is_answered_without_its_text() -> None:
    class Broken(RemoteSource):
        async def fleet(self) -> dict[str, Any]:
            raise ValueError("a prompt")

    async with served(private_app([Broken(0, "nowhere")])) as client:
        answer = await client.get("/admin/fleet")
    assert answer.status_code == 500
    assert "a prompt" not in answer.text


async def test_other_protocols_are_not_spoken() -> None:
    """A websocket or lifespan scope never reaches the app behind the guard."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("reached")

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    await Guard(app, host="127.0.0.1", token=None)({"type": "websocket"}, receive, send)


# -- the owner's token


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    environ = {"TIDEGATE_STATE_DIR": str(tmp_path / "a" / "state")}
    token, path = stored_token(environ)
    assert path == tmp_path / "a" / "state" / "admin-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert token.get_secret_value().startswith("tg_admin_")
    assert len(token.get_secret_value()) == 52
    assert stored_token(environ)[0] == token
    assert [each.name for each in path.parent.iterdir()] == ["admin-token"]
    assert token.get_secret_value() not in repr(token)


@pytest.mark.parametrize("damage", ["empty", "malformed", "readable by others", "a link"])
def test_a_token_that_cannot_be_trusted_is_replaced(tmp_path: Path, damage: str) -> None:
    environ = {"TIDEGATE_STATE_DIR": str(tmp_path)}
    before, path = stored_token(environ)
    if damage == "readable by others":
        path.chmod(0o644)
    elif damage == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("" if damage == "empty" else before.get_secret_value() + "x")
    after, _ = stored_token(environ)
    assert after != before
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert stored_token(environ)[0] == after


def test_the_state_directory_follows_the_environment() -> None:
    assert state_directory({"TIDEGATE_STATE_DIR": "/s", "HOME": "/h"}) == Path("/s")
    assert state_directory({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/x/tidegate")
    assert state_directory({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path("/h/.local/state/tidegate")
    with pytest.raises(StateError, match="neither TIDEGATE_STATE_DIR, XDG_STATE_HOME nor HOME is set"):
        state_directory({})


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="file/state: Not a directory"):
        stored_token({"TIDEGATE_STATE_DIR": str(tmp_path / "file" / "state")})
