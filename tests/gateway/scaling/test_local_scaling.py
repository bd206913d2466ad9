"""Real engines come and go with the load: `fleet up` starts a second llama.cpp when requests wait, and stops one,
drained, when they no longer do."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.demo.preflight import weights
from loadtests.ports import free_ports
from tests.support.command import PATIENCE_S, serve_process
from tests.support.launching import fleet_up, none_left, until_members


async def until(
    ask: Callable[[], Awaitable[dict[str, Any]]], holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first answer that is so."""
    row: dict[str, Any] = {}
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            while not holds(row := await ask()):  # noqa: ASYNC110 - the answer is another process'
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"it never was so: {json.dumps(row, indent=1)}") from None
    return row


@pytest.mark.quiet
async def test_load_starts_a_second_llamacpp_and_its_end_stops_one_with_nothing_lost(tmp_path: Path) -> None:
    model = weights()
    assert model is not None, "the demo's weights are not installed; `make test` installs them"
    port = free_ports(2)
    launch = {
        "model": str(model),
        "count": 1,
        "port": port,
        "context_tokens": 1024,
        "max_running": 2,
        "stop_timeout_s": 20,
    }
    scaling = {"max": 2, "provider": "local", "lead_time_s": 3, "down_after_s": 3, "drain_s": 20}
    async with (
        serve_process(
            tmp_path, [], backends={"pool": {"engine": "llamacpp", "launch": launch, "scaling": scaling}}
        ) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        openai.AsyncOpenAI(base_url=f"{await gateway.url()}/v1", api_key="none", max_retries=0) as sdk,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):

        async def row() -> dict[str, Any]:
            found: dict[str, Any] = (await gateway.admin(client, "/admin/scaling/pool")).json()
            return found

        async def ask(tokens: int) -> None:
            stream = await sdk.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "Count to a thousand."}],
                max_tokens=tokens,
                stream=True,
                timeout=2 * PATIENCE_S,
            )
            finishes.append([chunk.choices[0].finish_reason async for chunk in stream if chunk.choices][-1])

        async def traffic() -> None:
            while loaded:
                await ask(48)

        finishes: list[str | None] = []
        await until_members(gateway, client, {"box-pool-0": "ready"})
        loaded = True
        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(traffic())
            await until_members(gateway, client, {"box-pool-0": "ready", "box-pool-1": "ready"})
            assert (await row())["history"][0]["wanted"] == 2
            loaded = False
            for _ in range(4):  # some work is left while one of them is told to go
                group.create_task(ask(100))
        found = await until(row, lambda row: row["wanted"] == 1 and len(row["leaving"]) == 1)
        (gone,) = [each["replica"] for each in found["leaving"]]
        found = await until(row, lambda row: not row["leaving"] and row["ready"] == 1)
        assert (found["wanted"], found["problem"]) == (1, None)
        await none_left(f"--port\0{port + int(gone[-1])}")
        assert len(finishes) > 4
        assert set(finishes) <= {"stop", "length"}  # each to its end

        # What went was drained. What is started at its address is not.
        headers = {"authorization": f"Bearer {gateway.token}"}
        url = f"{await gateway.admin_url()}/admin/scaling/pool"
        assert (await client.put(url, json={"count": 2}, headers=headers)).status_code == 200
        found = await until(row, lambda row: bool(row["ready"] == 2))
        assert found["reasons"][0]["kind"] == "hold"
        assert found["lead_time_s"] > 0
        fleet.signal(signal.SIGTERM)
        assert await fleet.ended() == 0
