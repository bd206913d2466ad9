"""S4, S8, S9, S16 to S19: what is apart stays apart, and what must not be in the source is not there."""

from __future__ import annotations

import ast
import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.dialects import DIALECTS
from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS, Wish
from gateway.verdict import _ESSENTIAL
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import admitting, bearer, keyed, static
from tests.support.http import ask
from tests.support.redis_server import RedisServer

LOOPS = ("uvloop",)
ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("gateway", "backends", "routing") for path in (ROOT / folder).rglob("*.py"))
ONE, OTHER = "tgk-key-of-one-tenant-abcdef", "tgk-key-of-other-tenant-abcdef"


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


# -- S17: tenants' caches


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_a_salt_takes_the_place_of_the_callers(engine: str, path: str) -> None:
    fields = {"model": "m", "cache_salt": "another tenant's"}
    wish = Wish(path=path, fields=fields, request_id="r", stream=False, cache_salt="ab" * 16)
    values = DIALECTS[engine].prepare(wish).values
    if (engine, path) != ("sglang", EMBEDDINGS):  # which has no such field, and caches no prompts of embeddings
        assert values["cache_salt"] == b'"' + b"ab" * 16 + b'"'
    plain = Wish(path=path, fields=fields, request_id="r", stream=False)
    assert "cache_salt" not in DIALECTS[engine].prepare(plain).values


def test_an_engine_that_refuses_the_salt_is_not_asked_without_it() -> None:
    assert "cache_salt" in _ESSENTIAL


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("engine_name", ["vllm", "sglang"])
async def test_tenants_are_told_apart_at_the_engine_where_that_is_asked_for(
    tmp_path: Path, isolate: bool, engine_name: str
) -> None:
    keys = (static("a", ONE, tenant="one"), static("b", OTHER, tenant="other"))
    models = {"m": {"backend": "pool", "isolate_tenants": isolate}}
    async with FakeEngine() as engine:
        tenants: dict[str, Any] = {"one": {}, "other": {}}
        settings = keyed(tmp_path, [engine.url], *keys, engine=engine_name, models=models, tenants=tenants)
        async with admitting(settings) as gateway:
            for key in (ONE, OTHER, ONE):
                for salt in (None, "mine"):
                    body = {"model": "m", "messages": [], **({} if salt is None else {"cache_salt": salt})}
                    assert (await ask(gateway, body, CHAT, bearer(key))).status == 200
        salts = [json.loads(request.body).get("cache_salt") for request in engine.requests]
    if not isolate:
        assert salts == [None, "mine"] * 3
        return
    assert len(set(salts)) == 4
    assert salts[:2] == salts[4:]
    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)


async def test_no_reply_of_redis_goes_to_another_request_when_callers_leave() -> None:
    """ChatGPT, 2023-03-20: a cancelled request left its reply for the next one on the connection. Kept for ever."""
    from gateway.store.redis.address import parse_address
    from gateway.store.redis.client import RedisClient
    from gateway.store.redis.scripts import script

    echo = script("echo", "return ARGV[1]")
    rng = random.Random(17)
    with RedisServer() as server:
        client = RedisClient(parse_address(server.url), timeout_s=10.0)
        await client.connect()
        try:

            async def own(number: int) -> None:
                for _ in range(200):
                    said = b"%d-%d" % (number, rng.randrange(10**9))
                    assert await client.run(echo, ("k",), (said,)) == said
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(own(number)) for number in range(300)]
            for _ in range(250):
                await asyncio.sleep(rng.random() / 500)
                rng.choice(tasks).cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await client.aclose()
    wrong = [each for each in results if each is not None and not isinstance(each, asyncio.CancelledError)]
    assert wrong == []
    assert sum(isinstance(each, asyncio.CancelledError) for each in results) > 50


# -- S4, S9, S18: what the source may not do


def test_sql_is_never_put_together_from_text() -> None:
    """Statements are SQLAlchemy's, with bound parameters; literal text is only given to `text` and `execute` whole."""
    found = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("text", "execute", "executemany", "exec_driver_sql", "executescript"):
                    found += [f"{name}:{node.lineno}" for each in node.args[:1] if _is_made(each)]
    assert found == []


def _is_made(node: ast.expr) -> bool:
    """Whether text is formatted, joined or added up here, of anything but the module's own constants."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "sa.text":
        return any(_is_made(each) for each in node.args)
    if isinstance(node, ast.JoinedStr):
        names = {each.id for part in node.values for each in ast.walk(part) if isinstance(each, ast.Name)}
        return not all(name.isupper() or name == "int" for name in names)
    return isinstance(node, ast.BinOp) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join")
    )


def test_nothing_is_evaluated_and_no_shell_is_called() -> None:
    """Templates of models are the operator's, and run in Jinja's immutable sandbox."""
    found = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            if called in ("eval", "exec", "compile", "__import__"):
                found.append(f"{name}:{node.lineno} {called}")
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if attribute in ("system", "popen", "create_subprocess_shell", "getoutput"):
                found.append(f"{name}:{node.lineno} {attribute}")
            found += [f"{name}:{node.lineno} shell" for each in node.keywords if each.arg == "shell"]
    assert found == []
    templates = (ROOT / "gateway" / "templates.py").read_text()
    assert "ImmutableSandboxedEnvironment" in templates


def test_pickle_is_read_from_nobody_but_the_own_parent() -> None:
    users = {
        name
        for name, tree in trees()
        if "pickle" in {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    }
    assert users <= {
        "gateway/control.py",
        "gateway/store/server.py",
        "gateway/store/frames.py",
        "gateway/store/remote.py",
    }


def test_certificates_are_always_checked() -> None:
    """S18: there is no switch, neither in the settings nor in a request. `checking` is what `create_default_context`
    has made."""
    found = []
    for name, tree in trees():
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.keyword) else ""
            if re.search(r"CERT_NONE|CERT_OPTIONAL|_create_unverified|^verify=(?!checking$)|check_hostname$", text):
                found.append(f"{name} {text}")
    assert found == []


def test_clients_of_http_trust_no_environment_and_follow_nobody() -> None:
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("httpx2.AsyncClient", "httpx2.Client"):
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert given.get("trust_env") == "False", f"{name}:{node.lineno}"
                assert given.get("follow_redirects", "False") == "False", f"{name}:{node.lineno}"


def test_decisions_do_not_use_a_url_made_of_headers() -> None:
    """S5: `request.url` has the client's Host header in it (CVE-2026-48710)."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("url", "base_url"):
                assert not name.startswith("gateway/") or ast.unparse(node.value) != "request", f"{name}:{node.lineno}"
