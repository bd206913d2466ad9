"""API keys in running gateways: the real command, real processes, a real Redis and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.keys.format import mint
from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import ServeProcess, serve_process, write_config
from tests.support.keyed_command import ENVIRON, PEPPER, answered, ask, command, http, keyed_sections, until_all
from tests.support.postgres import Unavailable, running_postgres
from tests.support.redis_server import RedisServer

HOLDS_WITHIN_S = 3.0
"""A second on an idle machine."""
STATIC = ENVIRON["STATIC_KEY"]


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with http() as opened:
        yield opened


async def order(
    client: httpx2.AsyncClient, gateway: ServeProcess, method: str, path: str, body: Any = None
) -> httpx2.Response:
    """One order to the admin listener, with the owner's token."""
    headers = {"authorization": f"Bearer {gateway.token}"}
    return await client.request(method, await gateway.admin_url() + path, headers=headers, json=body)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_keys_whole_life_holds_within_a_second_and_leaves_no_trace_of_it(
    tmp_path: Path, client: httpx2.AsyncClient, redis_server: RedisServer, workers: int
) -> None:
    log = tmp_path / "usage.jsonl"
    limits = {"key": {"requests_per_minute": 100_000, "concurrent_requests": 100}}
    sections = keyed_sections(tmp_path, usage_log={"path": str(log)}, limits=limits)
    if workers > 1:
        sections |= {"store": redis_server.url, "redis": {"timeout_ms": 500}}
    options = ["--workers", str(workers), "--log-level", "debug"]
    async with (
        FakeEngine() as engine,
        serve_process(tmp_path, [engine.url], *options, environ=ENVIRON, **sections) as gateway,
    ):
        url = await gateway.url()
        keys = await whole_life(gateway, client, url, count=6 * workers - 5)
        texts = [text for text, _ in keys] + [STATIC]
        await records_name_who(gateway, client, url, log, keys)
        admin = [await order(client, gateway, "GET", path) for path in ("/metrics", "/admin/usage", "/admin/fleet")]
        admin += [await order(client, gateway, "GET", f"/admin/{path}") for path in ("keys", "tenants", "audit")]
        assert {answer.status_code for answer in admin} == {200}
        kept = "".join(answer.text for answer in admin) + "\n".join(gateway.log) + log.read_text()
        kept += in_files(tmp_path)
        if workers > 1:
            in_redis = everything_in(redis_server)
            assert keys[0][1] in in_redis
            kept += in_redis
        assert keys[0][1] in kept  # ids are there, keys are not, and no part of one that would do
        assert not [text for text in texts if text in kept or text[4:30] in kept]


async def whole_life(gateway: ServeProcess, client: httpx2.AsyncClient, url: str, count: int) -> list[tuple[str, str]]:
    """Every change of a key, by command or over HTTP, holds in all workers. Returns the keys with their ids.

    `count` answers in a row have to be as they should, for all workers to be among those that gave them.
    """
    assert (await ask(client, url, "")).status_code == 401
    assert (await ask(client, url, "tgk_unknown")).status_code == 401
    assert (await ask(client, url, STATIC)).status_code == 200
    made = await command(gateway, "keys", "create", "--tenant", "acme", "--class", "batch")
    first, id = made["key"], made["id"]
    took_s = {"create": await answered(client, url, first, 200, count)}
    await command(gateway, "keys", "disable", id)
    took_s["disable"] = await answered(client, url, first, 401, count)
    await command(gateway, "keys", "enable", id)
    took_s["enable"] = await answered(client, url, first, 200, count)
    rotated = await command(gateway, "keys", "rotate", id, "--overlap", "0")
    second = rotated["key"]
    took_s["rotate"] = await answered(client, url, second, 200, count)
    took_s["end of the rotated one"] = await answered(client, url, first, 401, count)
    await command(gateway, "keys", "expire", rotated["id"], "--at", "now")
    took_s["expire"] = await answered(client, url, second, 401, count)
    made = (await order(client, gateway, "POST", "/admin/keys", {"tenant": "acme", "name": "over HTTP"})).json()
    third = made["key"]
    took_s["create over HTTP"] = await answered(client, url, third, 200, count)
    assert (await order(client, gateway, "DELETE", f"/admin/keys/{made['id']}")).status_code == 200
    took_s["revoke over HTTP"] = await answered(client, url, third, 401, count)
    fourth = await command(gateway, "keys", "create", "--tenant", "acme", "--class", "batch")
    await answered(client, url, fourth["key"], 200, count)
    await command(gateway, "keys", "revoke", fourth["id"])
    took_s["revoke"] = await answered(client, url, fourth["key"], 401, count)
    assert max(took_s.values()) < HOLDS_WITHIN_S, took_s
    return [(first, id), (second, rotated["id"]), (third, made["id"]), (fourth["key"], fourth["id"])]


async def records_name_who(
    gateway: ServeProcess, client: httpx2.AsyncClient, url: str, log: Path, keys: list[tuple[str, str]]
) -> None:
    """The usage log and the admin API say whose request it was, by id."""
    wanted = {("acme", keys[0][1], "batch"), ("acme", keys[2][1], "standard"), ("default", "static:ci", "standard")}
    async with asyncio.timeout(15.0):
        while True:
            records = (await order(client, gateway, "GET", "/admin/usage?limit=1000")).json()["data"]
            written = lines_of(log)
            if len(written) >= len(records):
                break
    for found in (records, written):
        served = [record for record in found if record["status"] == 200]
        assert wanted <= {(record["tenant"], record["key_id"], record["class"]) for record in served}
        assert all(record["queue_ms"] >= 0 for record in served)


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def in_files(folder: Path) -> str:
    """The database as it lies on the disk, with what SQLite keeps beside it."""
    files = [path for path in folder.iterdir() if re.fullmatch(r"tidegate\.db(-wal|-shm)?", path.name)]
    assert files
    return "".join(path.read_bytes().decode("latin-1") for path in files)


def everything_in(server: RedisServer) -> str:
    """All names and values of a Redis, as text."""
    texts: list[str] = []
    with server.client() as redis:
        for name in redis.scan_iter():
            texts += [name.decode("latin-1"), redis.dump(name).decode("latin-1")]
            if not name.startswith((b"tidegate:{gateways}", b"tidegate:{facts}")):  # which do not grow with the keys
                assert redis.pttl(name) > 0, name
    return "\n".join(texts)


async def test_changed_limits_and_static_keys_take_effect_without_a_restart(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    async with FakeEngine() as engine:
        sections = keyed_sections(tmp_path)
        async with serve_process(tmp_path, [engine.url], environ=ENVIRON, **sections) as gateway:
            url = await gateway.url()
            assert (await ask(client, url, STATIC)).headers["x-tidegate-store"] == "memory"
            other = "tgk-other-key-of-sufficient-length"
            (tmp_path / "other-key").write_text(other)
            (tmp_path / "other-key").chmod(0o600)
            sections["keys"]["static"] = [{"name": "b", "key": {"file": str(tmp_path / "other-key")}, "tenant": "new"}]
            sections |= {"tenants": {"new": {}}, "limits": {"key": {"requests_per_minute": 2, "burst_s": 60}}}
            write_config(gateway.config, [engine.url], **sections)
            gateway.signal(signal.SIGHUP)
            await gateway.logged("configuration reloaded")
            await answered(client, url, STATIC, 401)
            await answered(client, url, other, 200)
            limited = await until_all(client, url, other, lambda answer: answer.status_code == 429)
            assert limited < HOLDS_WITHIN_S
            refused = await ask(client, url, other)
            assert refused.headers["x-ratelimit-limit-requests"] == "2"
            assert "tenant" not in refused.json()["error"]["message"]


async def test_redis_that_is_not_there_is_done_without_and_used_when_it_comes(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    with RedisServer(port=free_port()) as redis:
        redis.kill()
        sections = keyed_sections(tmp_path, store=redis.url, redis={"timeout_ms": 500})
        async with (
            FakeEngine() as engine,
            serve_process(tmp_path, [engine.url], environ=ENVIRON, **sections) as gateway,
        ):
            url = await gateway.url()
            await gateway.logged(re.escape(f"127.0.0.1:{redis.port}") + ".*going on alone until it answers")
            answer = await ask(client, url, STATIC)
            assert (answer.status_code, answer.headers["x-tidegate-store"]) == (200, "local")
            redis.start()
            await until_all(client, url, STATIC, lambda each: each.headers["x-tidegate-store"] == "redis")
            await gateway.logged("Redis at .* is back")
            # What other gateways grant is heard of, too.
            async with asyncio.timeout(15.0):
                while not redis.command("PUBSUB", "CHANNELS", "tidegate:granted:*"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)


async def test_postgresql_that_is_not_there_gives_503_until_it_comes(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    try:
        with running_postgres() as server:
            server.stop()
            sections = keyed_sections(tmp_path, database=server.url())
            sections["keys"]["pepper"] = {"env": "KEY_PEPPER"}
            environ = {**ENVIRON, "KEY_PEPPER": PEPPER}
            async with (
                FakeEngine() as engine,
                serve_process(tmp_path, [engine.url], environ=environ, **sections) as gateway,
            ):
                url = await gateway.url()
                await gateway.logged("database: the database postgresql://.* is not available")
                unknown = mint()
                for key in (STATIC, unknown):
                    refused = await ask(client, url, key)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "keys_unavailable")
                server.start()
                await answered(client, url, STATIC, 200)
                await answered(client, url, unknown, 401)
                made = await order(client, gateway, "POST", "/admin/keys", {"tenant": "acme"})
                await answered(client, url, made.json()["key"], 200)
                async with asyncio.timeout(15.0):  # the lease that could not be taken at the start
                    while not server.run("SELECT * FROM tidegate_sole"):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
    except Unavailable as error:
        pytest.skip(str(error))
