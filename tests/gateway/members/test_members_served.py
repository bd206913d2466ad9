"""Replicas that come and go under load, over real sockets and processes: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import ServeProcess, serve_process
from tests.support.redis_server import RedisServer

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
WITHIN_S = 20.0


class Side:
    """An operator's and a client's side of one gateway."""

    def __init__(self, gateway: ServeProcess, client: httpx2.AsyncClient, url: str, admin: str) -> None:
        self.gateway, self.client, self.url, self.admin_url = gateway, client, url, admin

    async def admin(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.gateway.token}"}
        return await self.client.request(method, self.admin_url + path, json=body, headers=headers, timeout=30)

    async def register(self, name: str, url: str, **fields: Any) -> dict[str, Any]:
        answer = await self.admin("PUT", f"/admin/registrations/pool/{name}", {"url": url, **fields})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    async def members(self) -> dict[str, Any]:
        (pool,) = (await self.admin("GET", "/admin/members")).json()["pools"]
        found: dict[str, Any] = pool
        return found

    async def replicas(self) -> list[set[str]]:
        """As each worker knows them."""
        workers = await self.gateway.fleet(self.client)
        return [{each["name"] for each in worker["pools"][0]["replicas"]} for worker in workers]

    async def until(self, names: set[str]) -> None:
        """Wait until every worker has these replicas."""
        end = time.monotonic() + WITHIN_S
        while (now := await self.replicas()) and any(each != names for each in now):
            assert time.monotonic() < end, now
            await asyncio.sleep(0.05)

    async def at_work(self, names: set[str]) -> None:
        """Wait until every worker gives them requests: a replica that joins is asked how it is first."""
        end = time.monotonic() + WITHIN_S
        while True:
            workers = await self.gateway.fleet(self.client)
            at_work = [{each["name"] for each in one["pools"][0]["replicas"] if each["available"]} for one in workers]
            if all(each >= names for each in at_work):
                return
            assert time.monotonic() < end, at_work
            await asyncio.sleep(0.05)

    async def ask(self) -> httpx2.Response:
        return await self.client.post(f"{self.url}/v1/chat/completions", json=CHAT, timeout=30)


@asynccontextmanager
async def side(folder: Path, workers: int = 1, *, discovery: Any = None, **sections: Any) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        pool = {"engine": "openai", "discovery": discovery or {"registration": {"ttl_s": 4}}}
        sections = {"backends": {"pool": pool}, **sections}
        gateway = await stack.enter_async_context(serve_process(folder, [], "--workers", str(workers), **sections))
        url = await gateway.url()
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
        yield Side(gateway, client, url, await gateway.admin_url())


@asynccontextmanager
async def load(url: str, stream: bool = True) -> AsyncIterator[list[int]]:
    """Four clients that never pause; every answer's status, and that every stream is whole."""
    statuses: list[int] = []
    stop = asyncio.Event()

    async def one() -> None:
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
            while not stop.is_set():
                answer = await client.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": stream})
                assert answer.status_code != 200 or "[DONE]" in answer.text, answer.text[-500:]
                statuses.append(answer.status_code)

    crowd = [asyncio.create_task(one()) for _ in range(4)]
    try:
        yield statuses
    finally:
        stop.set()
        await asyncio.gather(*crowd)


@pytest.mark.parametrize("workers", [1, 2])
async def test_replicas_register_and_leave_under_load_and_no_request_is_lost(tmp_path: Path, workers: int) -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine(interval_s=0.01, chunks=8)) for _ in range(3)]
        gateway = await stack.enter_async_context(side(tmp_path, workers))
        empty = await gateway.ask()
        assert (empty.status_code, empty.json()["error"]["code"]) == (503, "no_replica_available")
        assert "retry-after" in empty.headers
        first = await gateway.register("r0", engines[0].url)
        assert (first["ttl_s"], first["state"]) == (4.0, "ready")
        await gateway.until({"r0"})
        async with load(gateway.url) as statuses:
            for _ in range(3):
                await gateway.register("r0", engines[0].url)
                for number in (1, 2):
                    await gateway.register(f"r{number}", engines[number].url)
                await gateway.until({"r0", "r1", "r2"})
                await gateway.at_work({"r0", "r1", "r2"})
                for number in (1, 2):
                    left = await gateway.admin("DELETE", f"/admin/registrations/pool/r{number}")
                    assert left.json() == {"removed": True}
                await gateway.until({"r0"})
        assert set(statuses) == {200}
        assert len(statuses) > 20
        assert all(engine.served for engine in engines)


async def test_a_replica_that_drains_finishes_its_stream_says_when_it_is_empty_and_takes_nothing_new(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(FakeEngine(interval_s=0.1, chunks=20))
        other = await stack.enter_async_context(FakeEngine())
        gateway = await stack.enter_async_context(side(tmp_path))
        await gateway.register("slow", slow.url)
        await gateway.until({"slow"})
        stream = asyncio.create_task(
            gateway.client.post(f"{gateway.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=30)
        )
        await slow.received(1)
        await gateway.register("other", other.url)
        told = await gateway.register("slow", slow.url, state="draining")
        assert told["empty"] is False
        await gateway.gateway.logged("replica slow is drained")
        for _ in range(5):
            assert (await gateway.ask()).status_code == 200
        assert len(slow.requests) == 1
        assert "[DONE]" in (await stream).text
        end = time.monotonic() + WITHIN_S
        while not (told := await gateway.register("slow", slow.url, state="draining"))["empty"]:
            assert time.monotonic() < end
        assert (told["in_flight"], told["draining"]) == (0, True)
        # What comes back at the same address is as new.
        await gateway.register("slow", slow.url)
        await gateway.gateway.logged("replica slow takes work again")


async def test_a_replica_that_is_not_heard_of_any_more_is_gone_and_one_that_goes_on_stays(tmp_path: Path) -> None:
    async with FakeEngine() as engine, side(tmp_path) as gateway:
        await gateway.register("kept", engine.url)
        await gateway.register("lost", "http://127.0.0.1:1")
        end = time.monotonic() + WITHIN_S
        while {"lost"} <= (await gateway.replicas())[0]:
            assert time.monotonic() < end
            await gateway.register("kept", engine.url)
            await asyncio.sleep(0.5)
        assert await gateway.replicas() == [{"kept"}]
        await gateway.gateway.logged("lost is gone: its registration was not renewed")


async def test_what_starts_is_shown_and_gets_no_request(tmp_path: Path) -> None:
    async with FakeEngine() as engine, side(tmp_path) as gateway:
        await gateway.register("new", engine.url, state="starting", phase="loading", progress=0.25, agent="gpu1")
        (shown,) = (await gateway.members())["members"]
        assert (shown["state"], shown["phase"], shown["progress"], shown["in_pool"]) == (
            "starting",
            "loading",
            0.25,
            False,
        )
        assert (await gateway.ask()).status_code == 503
        await gateway.register("new", engine.url, started_in_s=12.5)
        await gateway.until({"new"})
        assert (await gateway.ask()).status_code == 200


async def test_members_outlast_a_restart_of_the_gateway(tmp_path: Path) -> None:
    admin = {"port": free_port()}  # its files are kept by the address of its admin listener
    async with FakeEngine() as engine:
        async with side(tmp_path, admin=admin) as gateway:
            await gateway.register("r", engine.url)
            await gateway.until({"r"})
            gateway.gateway.process.send_signal(signal.SIGTERM)
            await gateway.gateway.process.wait()
        async with side(tmp_path, admin=admin) as gateway:
            assert (await gateway.ask()).status_code == 200


async def test_a_found_replica_is_weighed_by_name_and_loses_to_what_is_written_down(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        pool = {
            "engine": "openai",
            "replicas": [{"name": "fixed", "url": engine.url}],
            "discovery": {"registration": {}, "defaults": {"region": "eu-west"}},
        }
        async with side(tmp_path, backends={"pool": pool}) as gateway:
            await gateway.register("again", engine.url)
            await gateway.register("found", "http://127.0.0.1:9")
            await gateway.until({"fixed", "found"})
            version = (await gateway.admin("GET", "/admin/overrides")).json()["version"]
            headers = {"authorization": f"Bearer {gateway.gateway.token}", "if-match": f'"{version}"'}
            path = "/admin/replicas/pool/found/weight"
            answer = await gateway.client.put(gateway.admin_url + path, json={"weight": 3}, headers=headers, timeout=30)
            assert answer.status_code == 200, answer.text
            (worker,) = await gateway.gateway.fleet(gateway.client)
            found = {each["name"]: each for each in worker["pools"][0]["replicas"]}
            assert (found["found"]["weight"], found["found"]["region"]) == (3.0, "eu-west")
            shown = {each["name"]: each for each in (await gateway.members())["members"]}
            assert shown["again"]["refused"] == "the configuration calls it fixed"


async def test_two_machines_whose_agents_have_one_name_do_not_take_each_others_place(tmp_path: Path) -> None:
    async with FakeEngine() as engine, side(tmp_path) as gateway:
        await gateway.register("box-pool-0", engine.url, agent="box")
        other = {"url": "http://127.0.0.1:9", "agent": "box"}
        refused = await gateway.admin("PUT", "/admin/registrations/pool/box-pool-0", other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "registration_refused")
        assert "two machines have an agent of this name " in refused.text
        (shown,) = (await gateway.members())["members"]
        assert shown["url"] == engine.url
        await gateway.register("box-pool-0", engine.url, agent="box", state="draining")
        await gateway.register("box-pool-0", "http://127.0.0.1:9", agent="box")  # it has moved


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("other/r", {"url": "http://127.0.0.1:1"}, 404, "unknown_pool"),
        ("pool/r", {"url": "http://169.254.169.254"}, 403, "registration_refused"),
        ("pool/r", {"url": "http://8.8.8.8:1"}, 403, "registration_refused"),
        ("pool/r", {"url": "http://127.0.0.1:1", "name": "s"}, 400, None),
        ("pool/r", {"url": "http://127.0.0.1:1", "nonsense": 1}, 400, None),
        ("pool/r", {"url": "http://127.0.0.1:1", "weight": -1}, 400, None),
        ("pool/-bad-", {"url": "http://127.0.0.1:1"}, 400, None),
    ],
)
async def test_a_registration_that_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, path: str, body: Any, status: int, code: str | None
) -> None:
    async with side(tmp_path) as gateway:
        answer = await gateway.admin("PUT", f"/admin/registrations/{path}", body)
        assert answer.status_code == status, answer.text
        if code is not None:
            assert answer.json()["error"]["code"] == code
        assert (await gateway.members())["members"] == []


async def test_gateways_on_one_redis_know_each_others_registrations_and_lose_none_while_it_is_away(
    tmp_path: Path,
) -> None:
    with RedisServer() as redis:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(FakeEngine())
            both = []
            for name in ("a", "b"):
                (tmp_path / name).mkdir()
                both.append(await stack.enter_async_context(side(tmp_path / name, store=redis.url)))
            one, other = both
            await one.register("r", engine.url)
            await other.until({"r"})
            redis.kill()
            end = time.monotonic() + 7.0  # more than a lease
            while time.monotonic() < end:
                await one.register("r", engine.url)
                assert await other.replicas() == [{"r"}]
                await asyncio.sleep(0.3)
            redis.start()
            await one.gateway.logged("registrations are shared again")
            await one.register("r", engine.url)
            assert await other.replicas() == [{"r"}]
            assert (await one.admin("DELETE", "/admin/registrations/pool/r")).json() == {"removed": True}
            await other.until(set())


async def test_a_file_that_changes_adds_and_removes_replicas_under_load_and_a_reload_brings_another_source(
    tmp_path: Path,
) -> None:
    def write(*engines: FakeEngine) -> None:
        aside = tmp_path / "aside.yaml"
        aside.write_text(json.dumps([{"name": f"e{engine.ports[0]}", "url": engine.url} for engine in engines]))
        aside.replace(tmp_path / "replicas.yaml")

    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(FakeEngine(interval_s=0.01, chunks=8)) for _ in range(2)]
        write(one)
        found = {"file": {"path": "replicas.yaml", "interval_s": 0.2}}
        gateway = await stack.enter_async_context(side(tmp_path, 2, discovery=found))
        assert (await gateway.ask()).status_code == 200  # it was looked at before anything was served
        names = [f"e{each.ports[0]}" for each in (one, two)]
        async with load(gateway.url) as statuses:
            write(one, two)
            await gateway.until(set(names))
            write(two)
            await gateway.until({names[1]})
            (tmp_path / "replicas.yaml").write_text("- {url: [")
            await gateway.gateway.logged(r"file: .*replicas\.yaml.*what was found last holds")
            assert "replicas.yaml" in (await gateway.members())["sources"][0]["problem"]
            assert await gateway.replicas() == [{names[1]}] * 2  # what was found last holds
            config = yaml.safe_load(gateway.gateway.config.read_text())
            config["backends"]["pool"]["discovery"]["registration"] = {}
            gateway.gateway.config.write_text(yaml.safe_dump(config))
            assert (await gateway.admin("POST", "/admin/reload")).status_code == 200
            await gateway.register("three", one.url)
            await gateway.until({names[1], "three"})
        assert set(statuses) == {200}


async def test_many_replicas_that_come_at_once_are_put_into_force_together(tmp_path: Path) -> None:
    async with side(tmp_path) as gateway:
        answers = await asyncio.gather(
            *(gateway.register(f"r{number}", f"http://127.0.0.1:{20000 + number}") for number in range(60))
        )
        assert len(answers) == 60
        await gateway.until({f"r{number}" for number in range(60)})
        reloads = [line for line in gateway.gateway.log if "configuration reloaded" in line]
        assert len(reloads) < 20


async def test_a_replica_that_gets_the_address_of_a_drained_one_that_left_is_not_born_drained(tmp_path: Path) -> None:
    async with FakeEngine() as engine, FakeEngine() as other, side(tmp_path) as gateway:
        await gateway.register("old", engine.url)
        await gateway.register("other", other.url)
        await gateway.until({"old", "other"})
        await gateway.at_work({"old", "other"})
        assert (await gateway.admin("POST", "/admin/replicas/pool/old/drain")).json()["draining"] is True
        await gateway.admin("DELETE", "/admin/registrations/pool/old")
        await gateway.until({"other"})
        await gateway.register("new", engine.url)
        await gateway.until({"new", "other"})
        end = time.monotonic() + WITHIN_S
        while not engine.requests:  # it is asked how it is first
            assert (await gateway.ask()).status_code == 200
            assert time.monotonic() < end
        assert (await gateway.admin("GET", "/admin/replicas/pool/new")).json()["draining"] is False
