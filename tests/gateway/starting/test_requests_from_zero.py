"""Requests for a model whose pool has no replica wait for the first one, over real sockets and processes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from loadtests.engine import FakeEngine
from tests.support.command import PATIENCE_S, ServeProcess, serve_process
from tests.support.redis_server import RedisServer

TENANTS = ("acme", "globex", "initech")
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
REGISTRATION = {"registration": {"ttl_s": 30}}


class Side:
    """An operator's and the clients' side of one gateway."""

    def __init__(self, gateway: ServeProcess, client: httpx2.AsyncClient, url: str, admin: str) -> None:
        self.gateway, self.client, self.url, self.admin_url = gateway, client, url, admin

    async def admin(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.gateway.token}"}
        return await self.client.request(method, self.admin_url + path, json=body, headers=headers)

    async def register(self, name: str, url: str, **fields: Any) -> None:
        answer = await self.admin("PUT", f"/admin/registrations/pool/{name}", {"url": url, **fields})
        assert answer.status_code == 200, answer.text

    async def ask(self, *, key: str = "", headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        sent = {**(headers or {}), **({"authorization": f"Bearer {key}"} if key else {})}
        return await self.client.post(f"{self.url}/v1/chat/completions", json={**CHAT, **fields}, headers=sent)

    async def waits(self, key: str = "", *others: str) -> None:
        """Until requests for the pool wait at every worker: that a replica starts has to be heard of first. Until then
        they are refused, with one of the `others` codes where there are fallbacks."""
        headers = {"x-tidegate-deadline-ms": "500"}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answers = await asyncio.gather(*(self.ask(key=key, headers=headers) for _ in range(8)))
                codes = {each.json()["error"]["code"] for each in answers}
                if codes == {"model_starting"}:
                    return
                assert codes <= {"model_starting", "no_replica_available", *others}, codes

    async def waiting(self, count: int) -> None:
        """Until so many stand in line, over all workers."""
        seen = -1
        try:
            async with asyncio.timeout(PATIENCE_S):
                while seen != count:
                    seen = await self.in_line()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{seen} wait, not {count}") from None

    async def in_line(self) -> int:
        """Those that stand in line now, over all workers."""
        text = (await self.admin("GET", "/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("tidegate_queue_waiting")]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


@asynccontextmanager
async def side(
    folder: Path, *options: str, backend: dict[str, Any] | None = None, **sections: Any
) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        pool = {"engine": "openai", "discovery": REGISTRATION, **(backend or {})}
        sections.setdefault("backends", {})
        sections["backends"] = {"pool": pool, **sections["backends"]}
        gateway = await stack.enter_async_context(serve_process(folder, [], *options, **sections))
        url = await gateway.url()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)  # so that workers share them out
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, limits=limits, timeout=60.0))
        yield Side(gateway, client, url, await gateway.admin_url())


def keys(folder: Path) -> dict[str, Any]:
    """Settings with a key for each of three tenants, which is its name four times."""
    static = []
    for tenant in TENANTS:
        path = folder / f"key-{tenant}"
        path.write_text(tenant * 4)
        path.chmod(0o600)
        static.append({"name": tenant, "key": {"file": str(path)}, "tenant": tenant})
    return {
        "auth": "keys",
        "database": f"sqlite:///{folder}/keys.db",
        "keys": {"static": static},
        "tenants": {tenant: {} for tenant in TENANTS},
    }


async def served_tenants(engine: FakeEngine) -> list[str]:
    """Who was served, in order: each prompt has the name of its tenant."""
    return [json.loads(each.body)["messages"][0]["content"] for each in engine.requests]


def from_tenant(tenant: str, **fields: Any) -> dict[str, Any]:
    return {"key": tenant * 4, "messages": [{"role": "user", "content": tenant}], **fields}


@pytest.mark.parametrize("workers", [1, 2])
async def test_twenty_requests_of_three_tenants_wait_and_are_served_in_turns(
    tmp_path: Path, redis_server: RedisServer, workers: int
) -> None:
    sections = keys(tmp_path) | ({"store": redis_server.url} if workers > 1 else {})
    async with FakeEngine() as engine, side(tmp_path, "--workers", str(workers), **sections) as gateway:
        await gateway.register("r0", engine.url, state="starting", phase="loading", max_in_flight=1)
        await gateway.waits(TENANTS[0] * 4)
        sdk = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="initech" * 4, max_retries=0)
        async with sdk, asyncio.TaskGroup() as group:
            several = [
                group.create_task(gateway.ask(**from_tenant(tenant, stream=at % 2 == 0)))
                for tenant, count in zip(TENANTS, (11, 4, 4), strict=True)
                for at in range(count)
            ]
            stock = group.create_task(
                sdk.chat.completions.create(
                    model="m", max_tokens=8, messages=[{"role": "user", "content": "initech"}], timeout=60
                )
            )
            await gateway.waiting(20)
            assert not engine.requests
            await gateway.register("r0", engine.url, max_in_flight=1)
        answers = [each.result() for each in several]
        assert {each.status_code for each in answers} == {200}
        assert stock.result().choices[0].message.content
        assert all(float(each.headers["x-tidegate-queue-ms"]) > 0 for each in answers)
        assert len(engine.requests) == 20
        # One place, so they go one by one; initech has 5 of the 20, by the SDK.
        served = await served_tenants(engine)
        assert [served[:9].count(tenant) for tenant in TENANTS] == [3, 3, 3], served


async def test_a_request_wakes_a_pool_at_zero_and_is_served_by_what_its_provider_starts(tmp_path: Path) -> None:
    out = tmp_path / "orders"
    words = [sys.executable, "-c", f"import sys; open({str(out)!r}, 'w').write(sys.argv[1])", "{count}"]
    scaling = {"min": 0, "max": 2, "provider": "command", "command": {"words": words}, "lead_time_s": 30}
    async with FakeEngine() as engine, side(tmp_path, backend={"scaling": scaling}) as gateway:
        began = time.monotonic()
        asked = asyncio.create_task(gateway.ask())
        async with asyncio.timeout(PATIENCE_S):
            while not out.exists() or out.read_text() != "1":  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)
        assert time.monotonic() - began < 12.0  # the next decision: what is told each 2 s is looked at each 5 s
        await gateway.register("r0", engine.url, state="starting", phase="loading")
        row = (await gateway.admin("GET", "/admin/scaling/pool")).json()
        assert (row["wanted"], row["demand"]["waiting"]) == (1, 1)
        await gateway.register("r0", engine.url)
        answer = await asked
        assert answer.status_code == 200, answer.text
        assert float(answer.headers["x-tidegate-queue-ms"]) > 0


async def test_what_waits_for_a_first_replica_ends_at_once_when_the_gateway_does(tmp_path: Path) -> None:
    async with side(tmp_path) as gateway:
        await gateway.register("r0", "http://127.0.0.1:1", state="starting")
        await gateway.waits()
        impatient = asyncio.create_task(gateway.ask())
        patient = [asyncio.create_task(gateway.ask()), asyncio.create_task(gateway.ask(stream=True))]
        await gateway.waiting(3)
        impatient.cancel()
        await asyncio.wait([impatient])
        await gateway.waiting(2)
        began = time.monotonic()
        gateway.gateway.signal(15)
        for answer in await asyncio.gather(*patient):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gateway_draining")
            assert "retry-after" in answer.headers
        assert time.monotonic() - began < 15.0  # and not after shutdown.drain_s, which is 30
        assert await gateway.gateway.ended() == 0


async def test_two_workers_with_lines_of_their_own_hold_requests_and_open_by_and_by(tmp_path: Path) -> None:
    async with FakeEngine(delay_head_s=1.0) as engine, side(tmp_path, "--workers", "2") as gateway:
        await gateway.register("r0", engine.url, state="starting")
        await gateway.waits()
        asked = [asyncio.create_task(gateway.ask()) for _ in range(40)]
        await gateway.waiting(40)
        await gateway.register("r0", engine.url)
        assert {each.status_code for each in await asyncio.gather(*asked)} == {200}
        begun = sorted(each.received_at for each in engine.requests)
        assert len(begun) == 40
        assert begun[-1] - begun[0] > 0.3  # eight for each worker at first, and twice as many half a second later
