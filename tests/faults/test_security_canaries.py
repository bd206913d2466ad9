"""Experiment 40: secrets and prompts go through every path of a running gateway, and come out nowhere."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from gateway.keys.format import mint
from loadtests.engine import FakeEngine
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.forms import LONG
from tests.security.planted import PLANTED
from tests.support.command import ServeProcess, run_tidegate, serve_process
from tests.support.redis_server import RedisServer

SECRETS = {
    "STATIC_KEY": "canary-client-key-5f2c9a7d41",
    "ENGINE_KEY": "canary-engine-key-8812bb03ce",
    "HOSTED_KEY": "canary-hosted-key-17ce55d0aa",
    "ADMIN_TOKEN": "canary-admin-token-93ab0177fe",
    "REDIS_PASSWORD": "canary-redis-password-64d1c0",
    "DATABASE_PASSWORD": "canary-database-password-77e2",
    "PEPPER": "canary-pepper-0123456789abcdef0123456789",
}
PROMPT, COMPLETION = "canary-of-a-prompt-41e7", "canary-of-an-answer-90b3"
USER, COOKIE = "canary-of-a-user-2c6d", "canary-of-a-cookie-cc19"
CHAT = "/v1/chat/completions"
SAID = json.dumps(
    {"error": {"message": f"Incorrect API key {SECRETS['ENGINE_KEY']} for {PROMPT}", "type": "x", "code": "y"}}
)
"""What an upstream's error may quote: the key it was shown, and the prompt."""
FAULTS: tuple[dict[str, Any], ...] = (
    *({"status": status, "error_body": SAID} for status in (400, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529)),
    *({"bad_json": True}, {"error_first": True}, {"error_event_after": 2}, {"cut_after": 1}, {"truncate_after": 1}),
    *({"done_without_finish": True}, {"finish_without_done": True}, {"empty_stream": True}, {"connection_close": True}),
    *({"content_length_short": 5}, {"keepalive_s": 0}, {"hang": True}, {"hang_mid": 1}, {"big_event_bytes": 2_000_000}),
    *({"raw": f"HTTP/1.1 200 {PROMPT}\r\n{COMPLETION}"}, {"raw": f"garbage {PROMPT} {SECRETS['ENGINE_KEY']}"}),
    *({"raw": f"HTTP/1.1 302 x\r\nlocation: http://x/?{PROMPT}\r\n\r\n"}, {"raw": ""}, {"interim": 103}),
    *(
        {"status": 500, "error_body": f"<html>{PROMPT} {SECRETS['ENGINE_KEY']}</html>"},
        {"status": 401, "error_body": SAID},
    ),
)
ANSWER = {
    "id": "x", "object": "chat.completion", "model": "m", "created": 1,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": COMPLETION}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}  # fmt: skip


@dataclass
class Sinks:
    """Everything that a gateway writes, shows or keeps, by where it was found."""

    found: dict[str, bytes] = field(default_factory=dict)

    def add(self, where: str, data: str | bytes) -> None:
        self.found[where] = self.found.get(where, b"") + (data.encode() if isinstance(data, str) else data) + b"\n"

    def hits(self, canaries: dict[str, str], but: tuple[str, ...] = ()) -> list[str]:
        return [
            f"{name} in {where}"
            for where, data in self.found.items()
            if not where.startswith(but or ("\0",))
            for name, canary in canaries.items()
            if any(form in data for form in forms_of(canary))
        ]


def forms_of(canary: str) -> Iterator[bytes]:
    """As it is, and as encodings would show it."""
    yield canary.encode()
    yield canary[4:].encode()  # cut at the front
    yield quote(canary, safe="").replace("-", "%2D").encode()
    yield base64.b64encode(canary.encode())[:-4]
    yield canary.encode().hex().encode()


@asynccontextmanager
async def gateway(folder: Path, engine: FakeEngine, redis: RedisServer) -> AsyncIterator[ServeProcess]:
    replicas = [{"url": url} for url in engine.urls]
    pool = {"replicas": replicas, "health": {"eject_after": 1000, "failure_ratio": 1.0}, "timeouts": {"idle_s": 1}}
    sections: dict[str, Any] = {
        "admin": {"port": 0, "token": {"env": "ADMIN_TOKEN"}},
        "auth": "keys",
        "store": redis.url,
        "redis": {"password": {"env": "REDIS_PASSWORD"}},
        "database": f"sqlite:///{folder}/tidegate.db",
        "database_password": {"env": "DATABASE_PASSWORD"},
        "keys": {"pepper": {"env": "PEPPER"}, "static": [{"name": "ci", "key": {"env": "STATIC_KEY"}}]},
        "limits": {
            "key": {"requests_per_minute": 100_000, "tokens_per_minute": 10_000_000, "concurrent_requests": 100}
        },
        "usage_log": {"path": f"{folder}/usage.jsonl"},
        "logging": {"requests": True},
        "models": {
            "m": {"backend": "pool", "price": {"input": 1.0, "output": 2.0}, "isolate_tenants": True},
            "h": {"backend": "hosted", "price": {"input": 1.0, "output": 2.0}},
            "broken": {
                "backend": "pool",
                "policy": "tests.security.planted:Broken",
                "price": {"input": 1.0, "output": 2.0},
            },
        },
        "backends": {
            "pool": {"engine": "sglang", "api_key": {"env": "ENGINE_KEY"}, **pool},
            "hosted": {"engine": "openai", "hosted": True, "api_key": {"env": "HOSTED_KEY"}, **pool},
        },
    }
    async with serve_process(folder, [], "--log-level", "debug", environ=SECRETS, **sections) as process:
        yield process


async def storm(url: str, sinks: Sinks) -> int:
    """Every fault, streamed and whole, at both pools, all with the prompt; what clients are shown is kept."""
    headers = {
        "authorization": f"Bearer {SECRETS['STATIC_KEY']}",
        "cookie": COOKIE,
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "x-tidegate-deadline-ms": "1500",
        "x-tidegate-session": USER,
    }
    count = 0

    async def one(client: httpx2.AsyncClient, model: str, stream: bool, fake: dict[str, Any]) -> None:
        nonlocal count
        content = [{"role": "user", "content": PROMPT}]
        if model == "h":  # an upstream can only repeat the key that it was shown
            fake = {
                name: value.replace(SECRETS["ENGINE_KEY"], SECRETS["HOSTED_KEY"]) if isinstance(value, str) else value
                for name, value in fake.items()
            }
        body = {"model": model, "messages": content, "stream": stream, "user": USER, "fake": {"chunks": 4, **fake}}
        with suppress(httpx2.HTTPError):
            reply = await client.post(url + CHAT, json=body, headers=headers)
            sinks.add("replies", reply.content + repr(reply.headers.multi_items()).encode())
        count += 1

    async with httpx2.AsyncClient(trust_env=False, timeout=20.0) as client:
        raw = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{json.dumps(ANSWER)}"
        for stream in (False, True):
            await one(client, "broken", stream, {})
        for fake in ({}, {"raw": raw}, *FAULTS):
            models = ("m", "h") if LONG or fake.get("status") or not fake else ("m",)
            await asyncio.gather(*(one(client, model, stream, fake) for model in models for stream in (False, True)))
        await one(client, PROMPT, False, {})
        with suppress(TimeoutError):  # a client that leaves
            async with asyncio.timeout(0.3):
                await one(client, "m", True, {"interval_s": 1.0})
        for wrong in (f"Bearer {mint()}", f"Basic {SECRETS['STATIC_KEY']}x", "Bearer ' OR 1=1 --"):
            reply = await client.post(url + CHAT, content=PROMPT, headers={"authorization": wrong})
            sinks.add("replies to strangers", reply.content)
        for broken in (f'{{"model": "m", "messages": "{PROMPT}', f'{{"{PROMPT}": NaN}}'):
            reply = await client.post(url + CHAT, content=broken, headers=headers)
            sinks.add("replies to broken bodies", reply.content)
    return count


async def look(process: ServeProcess, sinks: Sinks, made: str) -> None:
    """Every route of the admin listener, with commands of the shell beside it."""
    admin = await process.admin_url()
    token = {"authorization": f"Bearer {SECRETS['ADMIN_TOKEN']}"}
    paths = ("/metrics", "/admin/fleet", "/admin/usage?limit=1000", "/admin/replicas", "/admin/adapters", "/admin/keys")
    async with httpx2.AsyncClient(trust_env=False, timeout=20.0, base_url=admin) as client:
        for path in (*paths, "/admin/tenants", "/admin/audit", f"/admin/keys/{made}", "/admin/replicas/pool/pool-0"):
            reply = await client.get(path, headers=token)
            assert reply.status_code == 200, (path, reply.text)
            sinks.add(f"admin {path}", reply.content)
        question = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        for asked in (question, {**question, "model": "broken"}, {"x": PROMPT}):
            reply = await client.post("/admin/explain", json={"path": CHAT, "body": asked}, headers=token)
            sinks.add("admin explain", reply.content)
            reply = await client.post("/admin/explain", json=asked, headers=token)
            sinks.add("admin explain", reply.content)
        sinks.add("admin refusals", (await client.get("/admin/fleet", headers={"authorization": "Bearer x"})).content)
    for command in (["check", str(process.config)], ["schema"], ["check", str(process.config), "--json"]):
        _, out, err = await run_tidegate(*command, environ=SECRETS)
        sinks.add(f"tidegate {command[0]}", out + err)


def kept(process: ServeProcess, folder: Path, redis: RedisServer, sinks: Sinks) -> None:
    """What lies on the disk and in Redis, and what other users of the machine may see of the process."""
    for path in folder.rglob("*"):
        if path.is_file() and path != process.config:
            sinks.add(f"file {path.name}", path.read_bytes())
    with redis.client(password=SECRETS["REDIS_PASSWORD"]) as client:
        for name in client.scan_iter(count=1000):
            sinks.add("redis", name + b" " + (client.dump(name) or b""))
        sinks.add("redis slowlog", repr(client.slowlog_get(1000)))
        sinks.add("redis clients", repr(client.client_list()))
    sinks.add("redis log", redis.log())
    sinks.add("command line", Path(f"/proc/{process.process.pid}/cmdline").read_bytes())


def core_limit(process: ServeProcess) -> list[str]:
    limits = Path(f"/proc/{process.process.pid}/limits").read_text()
    return next(line.split() for line in limits.splitlines() if line.startswith("Max core file size"))


async def test_40_secrets_and_prompts_come_out_nowhere(report: Report, tmp_path: Path) -> None:
    sinks = Sinks()
    password = SECRETS["REDIS_PASSWORD"]
    with RedisServer(("requirepass", password), ("slowlog-log-slower-than", "0"), ("slowlog-max-len", "2000")) as redis:
        async with FakeEngine(ports=(0, 0)) as engine, gateway(tmp_path, engine, redis) as process:
            url = await process.url()
            arguments = ("keys", "create", "--tenant", "acme", "--config", str(process.config), "--json")
            code, out, err = await run_tidegate(*arguments, environ=SECRETS)
            assert code == 0, err
            key = json.loads(out)
            sent = await storm(url, sinks)
            await look(process, sinks, key["id"])
            kept(process, tmp_path, redis, sinks)
            core = core_limit(process)
            seen = [request for request in engine.requests if PROMPT.encode() in request.body]
            forwarded = [name for each in seen for name, value in each.headers if COOKIE.encode() in value]
            process.process.terminate()
            await process.ended()
        sinks.add("log", "\n".join(process.log))
    secrets = {**SECRETS, "the made key": key["key"], "cookie": COOKIE}
    content = {"prompt": PROMPT, "completion": COMPLETION, "user": USER, "planted": PLANTED}
    # An upstream's answer, and its words about a caller's own request, are the caller's.
    hits = sinks.hits(secrets) + sinks.hits(content, but=("replies",))
    planted = sum("could not" not in line and "RuntimeError" in line for line in process.log)
    report(
        "40",
        Finding(
            "secrets and prompts in every sink",
            f"{sent} requests with {len(FAULTS)} kinds of failure, a defect that quotes the prompt, refused keys, "
            "broken bodies, a client that leaves; debug log, keys, Redis with a password, usage log",
            f"0 of {len(secrets) + len(content)} canaries in {len(sinks.found)} sinks (log, usage log, metrics, admin "
            "routes, explain, replies, database, Redis and its slow log, command line); no core dumps",
            f"{len(hits)} hits in {sum(map(len, sinks.found.values())):,} bytes; core limit {core[4]}; "
            f"{len(seen)} requests reached the engines",
            not hits and core[4:6] == ["0", "0"] and len(seen) >= 30 and planted > 0 and not forwarded,
            {"hits": hits, "sinks": sorted(sinks.found), "planted": planted, "forwarded": forwarded},
        ),
    )
