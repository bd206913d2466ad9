"""`tidegate fleet up` with two real llama.cpp servers, behind a real gateway, under the OpenAI SDK's traffic."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx2
import openai

from gateway.demo.preflight import weights
from loadtests.ports import free_ports
from tests.support.command import PATIENCE_S, run_tidegate, serve_process
from tests.support.launching import fleet_up, members, none_left, until_members

READY = {"box-pool-0": "ready", "box-pool-1": "ready"}


async def test_two_llamacpp_are_launched_and_rolled_by_command_under_sdk_traffic_with_nothing_lost(
    tmp_path: Path,
) -> None:
    model = weights()
    assert model is not None, "the demo's weights are not installed; `make test` installs them"
    port = free_ports(2)
    launch = {"model": str(model), "count": 2, "port": port, "context_tokens": 1024, "stop_timeout_s": 20}
    async with (
        serve_process(
            tmp_path,
            [],
            backends={"pool": {"engine": "llamacpp", "launch": launch}},
            models={"m": {"backend": "pool"}},
        ) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        openai.AsyncOpenAI(base_url=f"{await gateway.url()}/v1", api_key="none", max_retries=0) as sdk,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        environ = {"TIDEGATE_STATE_DIR": str(gateway.state)}
        found = await until_members(gateway, client, READY)
        assert all(each["started_in_s"] > 0 for each in found.values())
        rolling = True
        finishes: list[str | None] = []

        async def traffic(number: int) -> None:
            while rolling:
                stream = await sdk.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": f"Count to {number}."}],
                    max_tokens=24,
                    stream=True,
                    timeout=2 * PATIENCE_S,
                )
                finishes.append([chunk.choices[0].finish_reason async for chunk in stream if chunk.choices][-1])

        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(traffic(number))
            code, shown, _ = await run_tidegate("fleet", "roll", "--url", await gateway.admin_url(), environ=environ)
            assert (code, shown.split(":")[0]) == (0, "pool")
            await fleet.said("pool  all servers are started anew")
            rolling = False
        assert len(finishes) >= 3
        assert set(finishes) <= {"stop", "length"}
        found = await members(gateway, client)
        assert [each["restarts"] for each in found.values()] == [1, 1]
        fleet.signal(signal.SIGKILL)
        await none_left(f"--port\0{port}")
        await none_left(f"--port\0{port + 1}")
