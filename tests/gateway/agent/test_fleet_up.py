"""`tidegate fleet up` with real processes behind a real gateway; the engines are fakes, so that starts are quick."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import httpx2
import yaml

from loadtests.ports import free_ports
from tests.support.command import PATIENCE_S, run_tidegate, serve_process
from tests.support.launching import (
    ENGINE,
    fleet_up,
    launching,
    members,
    none_left,
    processes_with,
    until_members,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
READY = {"box-pool-0": "ready", "box-pool-1": "ready"}


async def chat(client: httpx2.AsyncClient, url: str) -> int:
    return (await client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code


async def test_servers_are_started_registered_restarted_when_they_die_and_drained_at_the_end(tmp_path: Path) -> None:
    slow = [*ENGINE, "--chunks", "20", "--interval-s", "0.1"]
    backends = launching(port := free_ports(2), slow, count=2)
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        url = await gateway.url()
        await fleet.said(r"box-pool-\d  ready in [\d.]+ s")
        await fleet.said(r"box-pool-\d  ready in [\d.]+ s")
        found = await until_members(gateway, client, READY)
        assert {each["url"] for each in found.values()} == {f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"}
        assert all(0 < each["started_in_s"] < PATIENCE_S and each["agent"] == "box" for each in found.values())
        assert await chat(client, url) == 200

        (engine,) = [pid for pid in processes_with(f"--port\0{port}\0") if b"guard" not in _command(pid)]
        os.kill(engine, signal.SIGKILL)
        await fleet.said(r"box-pool-0  was ended by SIGKILL after [\d.]+ s; starts again in [\d.]+ s")
        await fleet.said(r"box-pool-0  ready in")
        found = await until_members(gateway, client, READY)
        assert [found[name].get("restarts", 0) for name in sorted(found)] == [1, 0]

        streams = [asyncio.create_task(_stream(client, url)) for _ in range(4)]
        async with asyncio.timeout(PATIENCE_S):
            while (await gateway.fleet(client))[0]["in_flight"] < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        fleet.signal(signal.SIGTERM)
        assert all(text.rstrip().endswith("data: [DONE]") for text in await asyncio.gather(*streams))
        assert await fleet.ended() == 0
        await until_members(gateway, client, {})
    await none_left(f"--port\0{port}")


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def _stream(client: httpx2.AsyncClient, url: str) -> str:
    answer = await client.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.status_code == 200, answer.text
    return answer.text


FAMILY = """
import subprocess, sys
sleeper = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]]
subprocess.Popen(sleeper)
subprocess.Popen(sleeper, start_new_session=True)
import loadtests.engine
loadtests.engine.main(["--port", sys.argv[1]])
"""


async def test_nothing_is_left_of_servers_with_children_when_the_agent_is_killed(tmp_path: Path) -> None:
    port = free_ports(1)
    backends = launching(port, [sys.executable, "-c", FAMILY, "{port}"])
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        await fleet.said("ready in")
        assert len(processes_with(f"\0{port}\0")) == 4  # the guard, the engine, two sleepers
        fleet.signal(signal.SIGKILL)
        assert await fleet.ended() == -signal.SIGKILL
        await none_left(f"\0{port}\0")


async def test_servers_go_on_without_a_gateway_and_are_registered_when_it_comes_back(tmp_path: Path) -> None:
    port, admin = free_ports(1), free_ports(1)
    sections: dict[str, Any] = {"backends": launching(port, stop_timeout_s=1), "admin": {"port": admin}}
    state = tmp_path / "state"
    async with httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        async with serve_process(tmp_path, [], **sections) as gateway:
            await gateway.admin_url()
        async with fleet_up(tmp_path / "tidegate.yaml", state, f"http://127.0.0.1:{admin}") as fleet:
            await fleet.said("does not answer .*; the servers go on")
            fleet.again()
            await fleet.said("ready in")
            async with serve_process(tmp_path, [], **sections) as gateway:
                await fleet.said("is back")
                await until_members(gateway, client, {"box-pool-0": "ready"})
            await fleet.said("does not answer")
            assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
            fleet.signal(signal.SIGINT)
            assert await fleet.ended() == 0


async def test_changed_launch_is_rolled_one_after_the_other_under_traffic_with_nothing_lost(tmp_path: Path) -> None:
    backends = launching(free_ports(2), [*ENGINE, "--chunks", "5", "--interval-s", "0.02"], count=2)
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        url = await gateway.url()
        await until_members(gateway, client, READY)
        rolling, answered = True, 0

        async def traffic() -> None:
            nonlocal answered
            while rolling:
                assert (await _stream(client, url)).rstrip().endswith("data: [DONE]")
                answered += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(traffic())
            content = yaml.safe_load(gateway.config.read_text())
            content["backends"]["pool"]["launch"]["env"] = {"SECOND_EDITION": "yes"}
            gateway.config.write_text(yaml.safe_dump(content))
            fleet.signal(signal.SIGHUP)
            await fleet.said("pool  all servers are started anew")
            rolling = False
        assert answered > 10
        steps = [line.split("  ", 1)[1] for line in fleet.lines if re.search("draining|  ready in", line)]
        assert [step.split(" in ")[0] for step in steps[2:]] == [
            "box-pool-0  draining",
            "box-pool-0  ready",
            "box-pool-1  draining",
            "box-pool-1  ready",
        ]
        assert len(processes_with("SECOND_EDITION")) == 4
        found = await members(gateway, client)
        assert [found[name].get("restarts", 0) for name in sorted(found)] == [1, 1]


async def test_failing_start_is_told_with_its_reason_and_a_new_one_that_fails_stops_the_rolling(tmp_path: Path) -> None:
    backends = launching(free_ports(2), count=2)
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        await until_members(gateway, client, READY)
        content = yaml.safe_load(gateway.config.read_text())
        broken = "import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory')"
        content["backends"]["pool"]["launch"]["command"] = [sys.executable, "-c", broken]
        gateway.config.write_text(yaml.safe_dump(content))
        fleet.signal(signal.SIGHUP)
        await fleet.said("box-pool-0  ended with exit code 1 .*out of memory.*; starts again in")
        fleet.again()
        await fleet.said("pool  stopped starting servers anew: box-pool-0 .*; the other one runs on as before")
        await until_members(gateway, client, {"box-pool-0": "starting", "box-pool-1": "ready"})
        assert await chat(client, await gateway.url()) == 200


async def test_one_server_or_all_are_ended_by_command(tmp_path: Path) -> None:
    backends = launching(free_ports(2), count=2)
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        environ = {"TIDEGATE_STATE_DIR": str(gateway.state)}
        await until_members(gateway, client, READY)

        async def fleet_command(*words: str) -> tuple[int, str]:
            code, out, err = await run_tidegate("fleet", *words, environ=environ)
            return code, out + err

        url = ("--url", await gateway.admin_url())
        code, shown = await fleet_command("status", *url)
        assert code == 0, shown
        assert "pool/box-pool-0  ready" in shown
        code, shown = await fleet_command("up", "--config", str(gateway.config), "--agent", "box", "--gateway", url[1])
        assert (code, "runs already" in shown) == (1, True), shown
        assert await fleet_command("down", "--agent", "box", "pool/no-such-one") == (
            1,
            "tidegate fleet down: agent box has no server pool/no-such-one; tidegate fleet status lists them\n",
        )
        assert await fleet_command("down", "--agent", "box", "pool/box-pool-0") == (0, "box-pool-0: ended\n")
        await until_members(gateway, client, {"box-pool-1": "ready"})
        assert await fleet_command("down", "--agent", "box") == (0, "agent box: ended\n")
        assert await fleet.ended() == 0
        await until_members(gateway, client, {})
        code, shown = await fleet_command("down", "--agent", "box")
        assert (code, shown) == (1, "tidegate fleet down: no agent box runs on this machine; --agent names another\n")


async def test_what_cannot_be_launched_is_refused_with_its_reason(tmp_path: Path) -> None:
    config = tmp_path / "tidegate.yaml"
    environ = {"TIDEGATE_STATE_DIR": str(tmp_path), "TIDEGATE_ADMIN__TOKEN": "a-token-long-enough-to-be-taken"}
    content: dict[str, Any] = {"models": {"m": {"backend": "pool"}}, "backends": launching(free_ports(1))}

    async def refusal(**backend: Any) -> str:
        config.write_text(yaml.safe_dump({**content, "backends": {"pool": backend}}))
        code, _, err = await run_tidegate("fleet", "up", "--config", str(config), "--agent", "box", environ=environ)
        assert code == 2, err
        return err

    pool = content["backends"]["pool"]
    assert "no pool has `launch`" in await refusal(engine="openai", replicas=[{"url": "http://127.0.0.1:1"}])
    environ["CUDA_VISIBLE_DEVICES"] = "0,1,2"
    two = {**pool, "launch": {**pool["launch"], "count": 2, "tp": 2}}
    assert "2 servers with 2 GPUs each need 4, and 3 of this machine's 3 are left" in await refusal(**two)
    everywhere = {**pool, "launch": {**pool["launch"], "host": "0.0.0.0"}}
    assert "0.0.0.0" in await refusal(**everywhere)
