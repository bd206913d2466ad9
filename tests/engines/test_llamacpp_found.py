"""Two real replicas that nobody has written down, one in a file, one that registers itself: found, drained, brought
back and lost under the OpenAI SDK's traffic, and no answer is."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.llamacpp import LlamaCpp
from tests.support.command import ServeProcess, clean_environ, run_tidegate, serve_process

pytestmark = pytest.mark.engine
WITHIN_S = 60.0


@asynccontextmanager
async def traffic(url: str) -> AsyncIterator[list[str]]:
    """Three clients that never pause, with streams; each answer's end. Any error of the SDK fails the test."""
    ends: list[str] = []
    stop = asyncio.Event()

    async def one(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            while not stop.is_set():
                stream = await client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": f"Count from {number} on, please."}],
                    max_tokens=24,
                    stream=True,
                )
                last = ""
                async for chunk in stream:
                    last = (chunk.choices and chunk.choices[0].finish_reason) or last
                ends.append(last)

    crowd = [asyncio.create_task(one(number)) for number in range(3)]
    try:
        yield ends
    finally:
        stop.set()
        await asyncio.gather(*crowd)


async def at_work(gateway: ServeProcess, client: httpx2.AsyncClient, names: set[str]) -> None:
    """Wait until both workers have exactly these replicas, and give them requests."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            workers = [each for each in await gateway.fleet(client) if each["up"]]
            pools = [each["pools"][0]["replicas"] for each in workers]
            if len(pools) == 2 and all({each["name"] for each in one if each["available"]} == names for one in pools):
                return
            await asyncio.sleep(0.1)


async def registering(gateway: ServeProcess, replica: LlamaCpp) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "gateway", "register", "--gateway", await gateway.admin_url()]
    command += ["--token-file", str(gateway.state / "admin-token"), "--pool", "pool", "--name", "registered"]
    command += ["--replica-url", replica.url, "--engine", "llamacpp"]
    return await asyncio.create_subprocess_exec(*command, env=clean_environ())


async def test_found_registered_drained_and_lost_under_traffic_and_no_answer_is(
    llamacpp_pair: tuple[LlamaCpp, LlamaCpp], tmp_path: Path
) -> None:
    listed, other = llamacpp_pair
    file = tmp_path / "replicas.json"
    file.write_text(json.dumps([{"name": "listed", "url": listed.url}]))
    pool: dict[str, Any] = {
        "engine": "llamacpp",
        "discovery": {"file": {"path": "replicas.json", "interval_s": 0.2}, "registration": {"ttl_s": 6}},
    }
    models = {"m": {"backend": "pool", "upstream_model": "smollm2", "policy": "least_outstanding"}}
    async with (
        serve_process(tmp_path, [], "--workers", "2", models=models, backends={"pool": pool}) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=30) as client,
    ):
        url = await gateway.url()
        where = ["--url", await gateway.admin_url(), "--token-file", str(gateway.state / "admin-token")]
        await at_work(gateway, client, {"listed"})
        async with traffic(url) as ends:
            register = await registering(gateway, other)
            await at_work(gateway, client, {"listed", "registered"})
            for name in ("listed", "registered"):
                code, out, err = await run_tidegate("drain", f"pool/{name}", "--wait", "60", *where)
                assert code == 0, out + err
                await at_work(gateway, client, {"listed", "registered"} - {name})
                code, out, err = await run_tidegate("undrain", f"pool/{name}", *where)
                assert code == 0, out + err
                await at_work(gateway, client, {"listed", "registered"})
            register.send_signal(signal.SIGTERM)  # drains, waits until it is empty, leaves
            async with asyncio.timeout(WITHIN_S):
                assert await register.wait() == 0
            await at_work(gateway, client, {"listed"})
            register = await registering(gateway, other)
            await at_work(gateway, client, {"listed", "registered"})
            file.write_text("[]")
            await at_work(gateway, client, {"registered"})
            for _ in range(4):
                answer = await client.post(
                    f"{url}/v1/completions", json={"model": "m", "prompt": "One, two,", "max_tokens": 4}, timeout=60
                )
                assert (answer.status_code, answer.headers["x-tidegate-replica"]) == (200, "registered")
        register.kill()  # nobody renews any more: it is gone with its lease
        await register.wait()
        await gateway.logged("registered is gone: its registration was not renewed")
    assert set(ends) <= {"stop", "length"}
    assert len(ends) >= 12
