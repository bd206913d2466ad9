"""What real processes tell in their logs and metrics: a line for each request, workers that come and go, reloads."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests.engine import FakeEngine
from tests.support.command import PATIENCE_S, ServeProcess, clean_environ, serve_process, write_config

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
JSON = ("--log-format", "json")


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """Every request on a connection of its own, so that the workers share them out."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=PATIENCE_S) as client:
        yield client


async def ask(client: httpx2.AsyncClient, url: str, count: int) -> list[str]:
    """Send this many requests at once, which have to be answered; their ids."""
    answers = await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=CHAT) for _ in range(count)))
    assert {answer.status_code for answer in answers} == {200}
    return [answer.headers["x-request-id"] for answer in answers]


async def scraped(gateway: ServeProcess, client: httpx2.AsyncClient, name: str, **labels: str) -> dict[str, float]:
    """Values of one sample by the worker's number."""
    text = (await client.get(f"{await gateway.admin_url()}/metrics")).text
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


async def test_every_request_has_one_line_of_its_worker(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    options = (*JSON, "--workers", "2")
    async with (
        FakeEngine() as engine,
        serve_process(tmp_path, [engine.url], *options, logging={"requests": True}) as gateway,
    ):
        url = await gateway.url()
        ids = [each for _ in range(3) for each in await ask(client, url, 20)]
        for request_id in ids:
            await gateway.logged(f'"request_id":"{request_id}"')
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        said = [json.loads(line) for line in gateway.log]
    of_requests = [each for each in said if each["logger"] == "tidegate.requests"]
    assert sorted(each["request_id"] for each in of_requests) == sorted(ids)
    assert {(each["outcome"], each["status"], each["replica"]) for each in of_requests} == {
        ("completed", 200, "pool-0")
    }
    by_worker = {each["worker"]: each["pid"] for each in of_requests}
    assert set(by_worker) <= {0, 1}


async def test_a_reload_changes_which_requests_are_logged(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine() as engine,
        serve_process(tmp_path, [engine.url], *JSON, logging={"requests": "errors"}) as gateway,
    ):
        url = await gateway.url()
        (quiet,) = await ask(client, url, 1)
        refused = await client.post(f"{url}/v1/chat/completions", json={**CHAT, "model": "no"})
        await gateway.logged(f'"message":"rejected 404","request_id":"{refused.headers["x-request-id"]}"')
        write_config(gateway.config, [engine.url], logging={"requests": True})
        gateway.signal(signal.SIGHUP)
        await gateway.logged("configuration reloaded")
        (told,) = await ask(client, url, 1)
        await gateway.logged(f'"message":"completed 200","request_id":"{told}"')
        assert not any(quiet in line for line in gateway.log)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_refused_reload_shows_until_one_is_applied(
    tmp_path: Path, client: httpx2.AsyncClient, workers: str
) -> None:
    async with (
        FakeEngine() as engine,
        serve_process(tmp_path, [engine.url], "--workers", workers) as gateway,
    ):
        await gateway.url()
        name, all_ = "tidegate_config_last_reload_successful", {str(each) for each in range(int(workers))}

        async def until(value: float) -> None:
            async with asyncio.timeout(PATIENCE_S):
                while await scraped(gateway, client, name) != dict.fromkeys(all_, value):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

        await until(1.0)
        good = gateway.config.read_text()
        gateway.config.write_text("models: 7\n")
        gateway.signal(signal.SIGHUP)
        await until(0.0)
        assert await scraped(gateway, client, "tidegate_config_reloads_total", result="refused") == dict.fromkeys(
            all_, 1
        )
        gateway.config.write_text(good)
        gateway.signal(signal.SIGHUP)
        await until(1.0)


async def test_counters_of_a_killed_worker_begin_anew_and_never_fall_within_its_life(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    name, done = "tidegate_requests_total", {"outcome": "completed"}
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        url = await gateway.url()
        before: dict[str, float] = {}
        async with asyncio.timeout(PATIENCE_S):
            while len(before) < 2:
                await ask(client, url, 20)
                before = await scraped(gateway, client, name, **done)
        assert sum(before.values()) == engine.served
        starts = await scraped(gateway, client, "process_start_time_seconds")
        workers = await gateway.fleet(client)
        os.kill(int(workers[0]["pid"]), signal.SIGKILL)
        await gateway.logged("was ended by SIGKILL")
        away = await scraped(gateway, client, name, **done)
        assert away == {"1": before["1"]}, "its series are gone, not at 0"
        async with asyncio.timeout(PATIENCE_S):
            while (await scraped(gateway, client, "tidegate_worker_up")) != {"0": 1.0, "1": 1.0}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        asked = 0
        after: dict[str, float] = {}
        async with asyncio.timeout(PATIENCE_S):
            while len(after) < 2:
                await ask(client, url, 20)
                asked += 20
                after = await scraped(gateway, client, name, **done)
        # What `rate` makes of it: the new life's count, since it is below the old one or its start is later.
        assert after["1"] - before["1"] + after["0"] == asked
        assert (await scraped(gateway, client, "process_start_time_seconds"))["0"] > starts["0"]


async def test_a_log_that_nobody_reads_stops_neither_requests_nor_the_end(tmp_path: Path) -> None:
    socket, config = str(tmp_path / "t.sock"), tmp_path / "tidegate.yaml"
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 16_384)
    async with FakeEngine() as engine:
        write_config(config, [engine.url], logging={"requests": True}, server={"uds": socket}, admin={"enabled": False})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "serve", "--log-format=text", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=writing,
            env=clean_environ({"TIDEGATE_STATE_DIR": str(tmp_path / "state")}),
        )
        os.close(writing)
        try:
            transport = httpx2.AsyncHTTPTransport(uds=socket)
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://localhost", timeout=PATIENCE_S
            ) as client:
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        try:
                            if (await client.get("/readyz")).status_code == 200:
                                break
                        except httpx2.TransportError:
                            pass
                        await asyncio.sleep(0.05)
                for _ in range(10):
                    await ask(client, "", 20)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            said = os.read(reading, 65_536)
            os.close(reading)
    assert b"completed 200" in said, "the pipe was not full"
