"""S5: a web page cannot have a browser talk to a listener that asks for no key: DNS rebinding, simple requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admin.app import private_app
from gateway.admin.guard import Guard
from gateway.config import Settings
from gateway.edges.hosts import HostList, host_name, hosts_of
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.gateway.admission.keyed import KEY, admitting, keyed
from tests.support.client import connect
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": []})
OURS = [
    *("localhost", "LOCALHOST", "localhost.", "localhost:7400", "127.0.0.1", "127.0.0.1:1", "127.1.2.3", "[::1]:7400"),
    *("[::1]", "[0:0:0:0:0:0:0:1]:80"),
]
FOREIGN = [
    *("evil.example", "evil.example:7400", "localhost.evil.example", "127.0.0.1.evil.example", "1270.0.1", "127.1"),
    *("10.0.0.1", "169.254.169.254", "0.0.0.0", "[::]", "[::ffff:10.0.0.1]", "2130706433", "0x7f000001", "a.localhost"),
    *("localhost:x", "localhost:1:2", "[::1", "::1", "", ".", "localhost..", "gateway"),
]
MALFORMED = ["user@localhost", "localhost/x", "localhost?x", "local host", "localhost\\x", "localhost#x"]


@asynccontextmanager
async def gateway(**sections: Any) -> AsyncIterator[tuple[Serving, FakeEngine]]:
    async with FakeEngine() as engine, serving(settings_for([engine.url], **sections)) as found:
        yield found, engine


async def ask(gateway: Serving, host: str, *headers: str, target: str = CHAT, method: str = "POST") -> Reply:
    body = BODY if method == "POST" else ""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers, "", body]
    async with connect(gateway.host, gateway.port) as client:
        await client.send("\r\n".join(lines).encode())
        return await client.reply()


def code_of(reply: Reply) -> str | None:
    code: str | None = json.loads(reply.body)["error"]["code"]
    return code


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_without_keys_only_this_machines_names_are_answered(edge: str) -> None:
    async with gateway(edge=edge) as (found, engine):
        for host in OURS:
            assert (await ask(found, host)).status == 200, host
        served = engine.served
        for host in FOREIGN:
            for target, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/livez", "GET"), ("/nowhere", "GET")):
                reply = await ask(found, host, target=target, method=method)
                assert (reply.status, code_of(reply)) in [(421, "invalid_host"), (400, "invalid_host")], host
        for host in MALFORMED:
            assert (await ask(found, host)).status == 400, host
        assert engine.served == served


@pytest.mark.parametrize("target", ["http://localhost", "http://evil.example", "http://evil@localhost:1"])
async def test_a_target_that_names_a_host_changes_nothing(target: str) -> None:
    """The Host header decides, and for routes the path: RFC 9112 would have the target's host count."""
    async with gateway() as (found, engine):
        assert (await ask(found, "evil.example", target=target + CHAT)).status == 421
        reply = await ask(found, "localhost", target=target + "/v1/models", method="GET")
        assert reply.status in (200, 400, 404)
        assert engine.served == 0


async def test_no_page_of_another_origin_may_ask() -> None:
    """A POST of text/plain needs no permission of the browser's: the reply stays hidden, but the engine has worked."""
    async with gateway() as (found, engine):
        text = "Content-Type: text/plain"
        for origin in ("https://evil.example", "null", "http://localhost.evil.example", "file://", "http://", "x"):
            reply = await ask(found, "localhost", text, f"Origin: {origin}")
            assert (reply.status, code_of(reply)) == (403, "foreign_origin"), origin
        assert engine.served == 0
        for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443"):
            assert (await ask(found, "localhost", text, f"Origin: {origin}")).status == 200, origin
        assert (await ask(found, "localhost", "Sec-Fetch-Site: cross-site", "Origin: https://x.org")).status == 403


async def test_the_operator_lists_other_names() -> None:
    async with gateway(server={"allowed_hosts": ["gw.example.com", ".apps.example.com", "10.0.0.1"]}) as (found, _):
        for host in (
            "gw.example.com",
            "GW.example.com:7400",
            "a.apps.example.com",
            "a.b.apps.example.com.",
            "10.0.0.1:1",
        ):
            assert (await ask(found, host)).status == 200, host
        for host in ("localhost", "apps.example.com", "xapps.example.com", "agw.example.com", "10.0.0.10"):
            assert (await ask(found, host)).status == 421, host
        assert (await ask(found, "gw.example.com", "Origin: https://gw.example.com")).status == 200
        assert (await ask(found, "gw.example.com", "Origin: https://evil.example")).status == 403


async def test_with_keys_any_name_is_answered_and_pages_have_no_key(tmp_path: Path) -> None:
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url])) as found:
        assert (await ask(found, "api.example.com", f"Authorization: Bearer {KEY}")).status == 200
        assert (await ask(found, "evil.example", "Origin: https://evil.example")).status == 401


def test_where_there_is_nothing_to_check_it_costs_nothing(tmp_path: Path) -> None:
    assert hosts_of(settings_for(["http://127.0.0.1:1"])) is not None
    assert hosts_of(settings_for(["http://127.0.0.1:1"], server={"uds": "/run/x.sock"})) is None
    assert hosts_of(keyed(tmp_path, ["http://127.0.0.1:1"])) is None
    assert hosts_of(keyed(tmp_path, ["http://127.0.0.1:1"], server={"allowed_hosts": ["x"]})) is not None


@pytest.mark.parametrize(
    "name",
    ["a b", "http://x", "x:80", "", "x/y", "-x", "*.x.org", "10.0.0.5:7400", "[::1]:7400", ".", "[::1", "::1]", "a::g"],
)
def test_names_in_the_settings_are_names(name: str) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        Settings(server={"allowed_hosts": [name]})  # type: ignore[arg-type]


def test_an_address_in_the_settings_is_compared_as_browsers_write_it() -> None:
    for written in ("fd00:0:0::5", "[FD00::5]"):
        listed = Settings(server={"allowed_hosts": [written]}).server.allowed_hosts  # type: ignore[arg-type]
        assert HostList(listed, own="::1").allows(host_name("[fd00::5]:7400")), written


def test_the_admin_listener_takes_listed_names_too() -> None:
    guard = Guard(private_app([]), host="0.0.0.0", token=None, allowed_hosts=["ops.example.com"])
    named = {
        host: guard.problem("/x", [(b"host", host.encode())]) for host in ("ops.example.com:1", "localhost", "x.org")
    }
    assert [problem and problem.status for problem in named.values()] == [401, 421, 421]


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_any_text_is_one_of_the_names_or_refused(text: str) -> None:
    hosts = HostList(own="127.0.0.1")
    name = host_name(text)
    problem = hosts.host_problem(text.encode("latin-1"))
    assert (problem is None) == hosts.allows(name)
    if problem is None:
        assert name == "localhost" or name.startswith("127.") or ":" in name
    assert hosts.host_problem(text.encode("latin-1")) is None or problem is not None


@given(st.sampled_from(OURS), st.text(st.sampled_from("aé.:@/\\[]%0 \t#?"), min_size=1, max_size=4), st.booleans())
def test_what_stands_beside_a_name_makes_another_one(name: str, extra: str, before: bool) -> None:
    text = extra + name if before else name + extra
    allowed = HostList(own="127.0.0.1").allows(host_name(text))
    if allowed:  # a dot at the end, another port, another loopback address
        rest = text.lower().replace("localhost", "").lstrip("[")
        assert all(letter in "0123456789.:]" for letter in rest), text


def test_values_that_were_let_in_are_remembered_up_to_a_bound() -> None:
    hosts = HostList(own="127.0.0.1")
    for port in range(5000):
        assert hosts.host_problem(b"localhost:%d" % port) is None
    assert len(hosts.seen) <= 1000


@pytest.mark.parametrize("origin", [b"null", b"tauri://localhost", b"chrome-extension://abc", b"https://evil.example"])
def test_any_origin_is_any(origin: bytes) -> None:
    assert HostList(["*"], own="127.0.0.1").origin_problem(origin) is None
    for listed in ((), ["localhost", "abc"]):
        assert HostList(listed, own="127.0.0.1").origin_problem(origin) is not None
