"""Gateways with keys and limits as processes: starts and reloads that are refused, ends in order and without."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.admission.carrier import LEASE_US
from loadtests.engine import FakeEngine
from tests.support.command import ServeProcess, serve_process, write_config
from tests.support.keyed_command import CHAT, ENVIRON, answered, ask, http, keyed_sections, until_all
from tests.support.redis_server import RedisServer, redis_binary
from tests.support.shifted_clock import ShiftedClock

STATIC = ENVIRON["STATIC_KEY"]
NOWHERE = ["http://127.0.0.1:9"]
WITHIN_S = 20.0


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with http() as opened:
        yield opened


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


async def refused(folder: Path, *options: str, **sections: Any) -> tuple[int, str]:
    """A start that is meant to fail: the exit code, and what was said."""
    async with serve_process(made(folder), NOWHERE, *options, environ=ENVIRON, **sections) as gateway:
        code = await gateway.ended()
    return code, "\n".join(gateway.log)


# -- starts


async def test_what_cannot_be_served_is_refused_with_the_setting_that_is_to_blame(tmp_path: Path) -> None:
    def keyed(name: str, **sections: Any) -> dict[str, Any]:
        return keyed_sections(tmp_path / name, **sections)

    broken = keyed("pepper", database=f"sqlite:///{tmp_path}/broken.db")
    made(tmp_path / "broken.db.pepper")
    starts = await asyncio.gather(
        refused(tmp_path / "workers", "--workers", "2", **keyed("workers")),
        refused(tmp_path / "limits", "--workers", "2", limits={"tenant": {"requests_per_minute": 60}}),
        refused(tmp_path / "open", "--host", "0.0.0.0"),
        refused(tmp_path / "folder", **keyed("folder", database=f"sqlite:///{tmp_path}/none/tidegate.db")),
        refused(tmp_path / "pepper", **broken),
    )
    expected = [
        (2, "store: 2 workers with store: memory .* auth: keys asks for"),
        (2, "store: 2 workers with store: memory .* limits.tenant asks for"),
        (2, "server.host: auth is insecure, and .0.0.0.0. can be reached from other machines"),
        (2, f"database: there is no directory {tmp_path}/none; make it"),
        (1, r"broken\.db\.pepper"),
    ]
    for (code, said), (wanted, pattern) in zip(starts, expected, strict=True):
        assert code == wanted, said
        assert re.search(pattern, said), said
        assert "Traceback" not in said
        assert STATIC not in said


async def test_with_keys_other_machines_may_reach_it(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine() as engine,
        serve_process(
            tmp_path, [engine.url], "--host", "0.0.0.0", environ=ENVIRON, **keyed_sections(tmp_path)
        ) as gateway,
    ):
        url = (await gateway.url()).replace("0.0.0.0", "127.0.0.1")
        assert (await ask(client, url, "")).status_code == 401
        assert (await ask(client, url, STATIC)).status_code == 200


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_a_second_gateway_on_one_database_waits_for_the_end_of_the_first(
    tmp_path: Path, client: httpx2.AsyncClient, end: signal.Signals
) -> None:
    sections = keyed_sections(tmp_path)
    async with FakeEngine() as engine, AsyncExitStack() as running:

        async def start(name: str) -> ServeProcess:
            process = serve_process(made(tmp_path / name), [engine.url], environ=ENVIRON, **sections)
            return await running.enter_async_context(process)

        first = await start("first")
        url = await first.url()
        second = await start("second")
        said = await second.logged(r"in use by another gateway \(gw_\w+, process (\d+) on .*, since .* UTC\); waiting")
        assert int(said[1]) == first.process.pid
        assert (await ask(client, url, STATIC)).status_code == 200
        first.signal(end)
        await first.ended()
        assert (await ask(client, await second.url(), STATIC)).status_code == 200
        assert not any(" ERROR " in line for line in second.log)
        third = await start("third")  # which is told to stop while it waits
        await third.logged("waiting up to")
        third.signal(signal.SIGTERM)
        assert await third.ended() == 1
        assert (await ask(client, await second.url(), STATIC)).status_code == 200


# -- reloads


async def test_reload_that_would_need_a_redis_is_refused(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    limits = {"key": {"requests_per_minute": 1}}
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        url = await gateway.url()
        write_config(gateway.config, [engine.url], limits=limits)
        gateway.signal(signal.SIGHUP)
        await gateway.logged("reload refused, the running configuration stays")
        await gateway.logged("limits.key asks for")
        # The Redis would only be used after a restart: until then each worker would count for itself.
        gateway.log.clear()
        write_config(gateway.config, [engine.url], limits=limits, store="redis://127.0.0.1:9")
        gateway.signal(signal.SIGHUP)
        await gateway.logged("reload refused, the running configuration stays")
        await gateway.logged("limits.key asks for")
        await answered(client, url, "", 200, count=8)


# -- ends


def one_place(folder: Path, engine: FakeEngine, **sections: Any) -> dict[str, Any]:
    pool = {"engine": "openai", "replicas": [{"url": engine.url, "max_in_flight": 1}]}
    return keyed_sections(folder, backends={"pool": pool}, **sections)


async def in_line(gateway: ServeProcess, client: httpx2.AsyncClient, count: int) -> None:
    """Until so many requests wait, all workers together."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            text = (await gateway.admin(client, "/metrics")).text
            waiting = re.findall(r"^tidegate_queue_waiting\{.*\} (\S+)$", text, re.MULTILINE)
            if sum(map(float, waiting)) == count:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("in_time", [True, False], ids=["served in time", "cut off"])
async def test_sigterm_ends_the_line_as_the_drain_says(
    tmp_path: Path, client: httpx2.AsyncClient, in_time: bool
) -> None:
    async with FakeEngine(hang=not in_time, ttft_s=0.5) as engine:
        sections = one_place(tmp_path, engine, shutdown={"grace_s": 0, "drain_s": 30 if in_time else 0.3})
        async with serve_process(tmp_path, [engine.url], environ=ENVIRON, **sections) as gateway:
            url = await gateway.url()
            first = asyncio.create_task(ask(client, url, STATIC))
            await engine.received(1)
            line = [first] + [asyncio.create_task(ask(client, url, STATIC)) for _ in range(3)]
            if not in_time:
                await in_line(gateway, client, 3)
            else:
                await asyncio.wait([first])  # the others are in line by then, or have been
            gateway.signal(signal.SIGTERM)
            answers = await asyncio.gather(*line)
            assert await gateway.ended() == 0
            if in_time:
                assert [answer.status_code for answer in answers] == [200] * 4
            else:
                assert {answer.json()["error"]["code"] for answer in answers} == {"gateway_draining"}
                assert {answer.status_code for answer in answers} == {503}
        assert not any("Traceback" in line for line in gateway.log)


async def streamed(client: httpx2.AsyncClient, url: str) -> bool:
    """A stream; whether it was let in and came to its end."""
    try:
        headers = {"authorization": f"Bearer {STATIC}"}
        body = {**CHAT, "stream": True}
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.aread()
            return answer.status_code == 200
    except httpx2.HTTPError:
        return False


async def test_places_and_leases_of_a_killed_worker_come_back(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    """Redis' clock is set forward by a lease, so that nobody has to wait for one."""
    limits = {"key": {"concurrent_requests": 6}}
    with (
        ShiftedClock(tmp_path / "clock") as clock,
        RedisServer(binary=clock.wrapper(redis_binary(), tmp_path / "redis-server")) as redis,
    ):
        async with FakeEngine(hang_mid=1) as engine:
            pool = {"engine": "openai", "replicas": [{"url": engine.url, "max_in_flight": 6}]}
            sections = keyed_sections(tmp_path, store=redis.url, redis={"timeout_ms": 500}, limits=limits)
            sections["backends"] = {"pool": pool}
            async with serve_process(tmp_path, [engine.url], "--workers", "2", environ=ENVIRON, **sections) as gateway:
                url = await gateway.url()
                tasks = [asyncio.create_task(streamed(client, url)) for _ in range(6)]
                await engine.received(6)
                fleet = await gateway.fleet(client)
                assert (await ask(client, url, STATIC)).status_code == 429  # all six leases are taken
                engine.script = FakeEngine().script
                victim = max(fleet, key=lambda worker: int(worker["in_flight"]))
                lost = int(victim["in_flight"])
                assert lost > 0
                os.kill(int(victim["pid"]), signal.SIGKILL)
                await gateway.logged("was ended by SIGKILL")
                other = 6 - lost
                if other:  # it serves on, and nothing has come back yet
                    assert (await ask(client, url, STATIC)).status_code == 429
                clock.set(LEASE_US / 1e6 + 1)
                await answered(client, url, STATIC, 200)
                # Every place is there again: as many at once as the living worker left.
                engine.script = FakeEngine(ttft_s=0.3).script
                again = await asyncio.gather(*(streamed(client, url) for _ in range(lost)))
                assert again == [True] * lost
                assert sum(task.done() for task in tasks) == lost
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await until_all(client, url, STATIC, lambda answer: answer.status_code == 200, count=8)
