"""S13: whatever changes something leaves an entry in the audit that says who. The real route table is walked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2

from loadtests.engine import FakeEngine
from tests.support.command import serve_process

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
WEIGHT = ["backends", "pool", "replicas", "pool-1", "weight"]
UNWRITTEN = {"POST /admin/explain"}
"""What sends nothing and changes nothing."""
WRITES: tuple[tuple[str, str, Any, str], ...] = (
    ("POST", "/admin/keys", {"tenant": "acme"}, "key.create"),
    ("PATCH", "/admin/keys/{id}", {"name": "n"}, "key.update"),
    ("POST", "/admin/undo/{entry}", None, "key.update"),
    ("POST", "/admin/keys/{id}/rotate", {}, "key.rotate"),
    ("DELETE", "/admin/keys/{id}", None, "key.remove"),
    ("PUT", "/admin/tenants/{name}", {"weight": 2}, "tenant.put"),
    ("DELETE", "/admin/tenants/{name}", None, "tenant.remove"),
    ("PUT", "/admin/replicas/{pool}/{replica}/weight", {"weight": 2}, "config.override"),
    ("DELETE", "/admin/replicas/{pool}/{replica}/weight", None, "config.override"),
    ("PUT", "/admin/models/{model}/price", {"input": 1, "output": 2}, "config.override"),
    ("DELETE", "/admin/models/{model}/price", None, "config.override"),
    ("PUT", "/admin/models/{model}/policy", {"policy": "round_robin"}, "config.override"),
    ("DELETE", "/admin/models/{model}/policy", None, "config.override"),
    ("PUT", "/admin/models/{model}/shadow", {"policy": "round_robin"}, "config.override"),
    ("DELETE", "/admin/models/{model}/shadow", None, "config.override"),
    ("PATCH", "/admin/overrides", {"set": [{"path": WEIGHT, "value": 7}]}, "config.override"),
    ("POST", "/admin/overrides/restore", {"version": 2}, "config.override"),
    ("PATCH", "/admin/overrides", {"set": [{"path": WEIGHT, "value": 9}]}, "config.override"),
    ("DELETE", "/admin/overrides", None, "config.override"),
    ("POST", "/admin/reload", None, "config.reload"),
    ("POST", "/admin/replicas/{pool}/{replica}/drain", None, "replica.drain"),
    ("POST", "/admin/replicas/{pool}/{replica}/undrain", None, "replica.undrain"),
    ("POST", "/admin/replicas/{pool}/{replica}/cordon", None, "replica.cordon"),
    ("POST", "/admin/replicas/{pool}/{replica}/uncordon", None, "replica.uncordon"),
    ("PUT", "/admin/registrations/{pool}/{name}", {"url": "http://127.0.0.1:9"}, "replica.register"),
    ("DELETE", "/admin/registrations/{pool}/{name}", None, "replica.leave"),
    ("PUT", "/admin/scaling/{pool}", {"count": 3}, "scaling.hold"),
    ("DELETE", "/admin/scaling/{pool}", None, "scaling.release"),
    ("PUT", "/admin/agents/{agent}", {"pools": {"pool": {"max": 2}}}, "agent.report"),
    ("POST", "/admin/pools/{pool}/roll", None, "pool.roll"),
    ("POST", "/admin/adapters", {"pool": "pool", "name": "a", "path": "/a"}, "adapter.load"),
    ("DELETE", "/admin/adapters/{pool}/{name}", None, "adapter.unload"),
    ("POST", "/admin/playground", {"request": CHAT}, "playground.send"),
    ("POST", "/admin/policies/compare", {"model": "m"}, "policy.compare"),
    ("DELETE", "/admin/policies/compare", None, "policy.compare_end"),
    ("DELETE", "/admin/requests/{id}", None, "request.end"),
    ("POST", "/admin/session", "login", "login"),
    ("DELETE", "/admin/session", "cookie", "logout"),
    ("DELETE", "/admin/sessions", None, "sessions.end"),
)
SAME_ORIGIN = {"sec-fetch-site": "same-origin", "x-tidegate-csrf": "1"}


async def test_every_write_leaves_an_entry_that_says_who(tmp_path: Path) -> None:
    async with (
        FakeEngine(chunks=1000, interval_s=0.5) as slow,
        FakeEngine(ports=(0, 0)) as engine,
        serve_process(
            tmp_path,
            [],
            admin={"port": 0},
            auth="keys",
            database=f"sqlite:///{tmp_path}/keys.db",
            models={"m": {"backend": "pool", "price": {"input": 3, "output": 3}}, "slow": {"backend": "slow"}},
            backends={
                "pool": {
                    "engine": "openai",
                    "replicas": [{"url": each} for each in engine.urls],
                    "discovery": {"registration": {}},
                    "launch": {"model": "m", "count": 0, "command": ["true"]},
                    "scaling": {"max": 4},
                },
                "slow": {"engine": "openai", "replicas": [{"url": slow.url}]},
            },
        ) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
    ):
        admin, url = await gateway.admin_url(), await gateway.url()
        bearer = {"authorization": f"Bearer {gateway.token}", "x-tidegate-actor": "jo"}

        async def ask(method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
            return await client.request(method, admin + path, json=body, headers={**bearer, **headers})

        async def newest() -> dict[str, Any]:
            entry: dict[str, Any] = (await ask("GET", "/admin/audit?limit=1")).json()["data"][0]
            return entry

        described = (await ask("GET", "/admin/openapi.json")).json()["paths"]
        there = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
        unsafe = {each for each in there if not each.startswith(("GET ", "HEAD "))}
        assert unsafe == {f"{method} {path}" for method, path, _, _ in WRITES} | UNWRITTEN

        made = (await ask("POST", "/admin/keys", {"tenant": "acme"})).json()
        theirs = {"authorization": f"Bearer {made['key']}"}
        async with asyncio.timeout(20):  # a new key is known within half a second
            while (await client.get(f"{url}/v1/models", headers=theirs)).status_code == 401:  # noqa: ASYNC110 - it asks
                await asyncio.sleep(0.02)
        names = {
            "pool": "pool",
            "replica": "pool-0",
            "model": "m",
            "name": "initech",
            "agent": "gpu1",
            "id": made["id"],
        }
        key = {"authorization": f"Bearer {made['key']}"}
        under_way = asyncio.create_task(
            client.post(f"{url}/v1/chat/completions", json={**CHAT, "model": "slow"}, headers=key)
        )
        cookie = ""
        for method, path, body, action in WRITES:
            before = await newest()
            if path == "/admin/requests/{id}":
                while not (live := (await ask("GET", "/admin/requests?live=true")).json()["live"]):
                    assert not under_way.done()
                names["id"] = live[0]["id"]
            if path == "/admin/undo/{entry}":
                names["entry"] = str(before["id"])
            version = (await ask("GET", "/admin/overrides")).json()["version"]
            matching = {} if "keys" in path or "tenants" in path else {"if-match": f'"{version}"'}
            target = path.format(**names)
            if body == "login":
                answer = await client.post(admin + target, json={"token": gateway.token}, headers=SAME_ORIGIN)
                cookie = answer.headers["set-cookie"].partition(";")[0]
            elif body == "cookie":
                answer = await client.delete(admin + target, headers={**SAME_ORIGIN, "cookie": cookie})
            else:
                answer = await ask(method, target, body, **matching)
            after = await newest()
            assert after["id"] > before["id"], (method, path, answer.status_code, answer.text[:300])
            assert after["action"] == action, (method, path, after)
            assert after["actor"] == ("session:admin" if body in ("login", "cookie") else "admin:jo"), after
            assert answer.status_code < 300 or "adapters" in path, (method, path, answer.text[:300])
        await under_way
