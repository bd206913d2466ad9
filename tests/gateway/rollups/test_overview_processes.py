"""Several workers, one of them killed; a stop with a stream of events open; and the command, as people use them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.commands import overview
from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import PATIENCE_S, ServeProcess, run_tidegate, serve_process

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def look(gateway: ServeProcess, client: httpx2.AsyncClient) -> dict[str, Any]:
    body: dict[str, Any] = (await gateway.admin(client, "/admin/overview?window=hour")).json()
    return body


async def ask(gateway: ServeProcess, count: int) -> None:
    """Each on a connection of its own, so that the workers share them out."""
    url = await gateway.url()
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=PATIENCE_S) as client:
        answers = await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=CHAT) for _ in range(count)))
    assert [each.status_code for each in answers] == [200] * count


async def until(gateway: ServeProcess, client: httpx2.AsyncClient, condition: Any) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while not condition(found := await look(gateway, client)):  # noqa: ASYNC110 - it is in other processes
            await asyncio.sleep(0.1)
    return found


async def rest_of(lines: AsyncIterator[str]) -> list[str]:
    """What still comes; a stream may be cut in the middle when its gateway is gone."""
    found = []
    with contextlib.suppress(httpx2.HTTPError):
        async for line in lines:
            found.append(line)  # noqa: PERF401 - what came before a cut stays
    return found


async def test_what_all_workers_served_counts_once_also_when_one_of_them_dies(tmp_path: Path) -> None:
    async with (
        FakeEngine() as engine,
        serve_process(tmp_path, [engine.url], "--workers", "2") as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await ask(gateway, 40)
        found = await until(gateway, client, lambda it: it["totals"]["requests"] == 40)
        assert (found["now"]["workers_up"], found["verdict"]["state"]) == (2, "healthy")
        (victim,) = [each["pid"] for each in await gateway.fleet(client) if each["worker"] == 1]
        os.kill(victim, signal.SIGSTOP)  # it is not replaced before it is dead
        lost = await until(gateway, client, lambda it: it["now"]["workers_up"] == 1)
        assert lost["health"][0]["id"] == "workers"
        assert lost["totals"]["requests"] == 40
        os.kill(victim, signal.SIGKILL)
        await until(gateway, client, lambda it: it["now"]["workers_up"] == 2)
        await ask(gateway, 10)
        found = await until(gateway, client, lambda it: it["totals"]["requests"] == 50)
        assert all(count is None or count >= 0 for count in found["series"]["requests_per_s"])


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_what_was_served_last_before_a_stop_is_counted(tmp_path: Path, workers: str) -> None:
    async with FakeEngine() as engine, httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        price = {"m": {"backend": "pool", "price": {"input": 1.0, "output": 1.0}}}
        given: dict[str, Any] = {"admin": {"port": free_port()}, "models": price}
        async with serve_process(tmp_path, [engine.url], "--workers", workers, **given) as gateway:
            await ask(gateway, 5)
            await until(gateway, client, lambda it: it["totals"]["requests"] == 5)
            await gateway.admin(client, "/admin/cost")
            await ask(gateway, 8)
            gateway.signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        async with serve_process(tmp_path, [engine.url], "--workers", workers, **given) as gateway:
            await gateway.url()
            found = await look(gateway, client)
            assert (found["totals"]["requests"], found["totals"]["outcomes"]) == (13, {"completed": 13})
            cost = (await gateway.admin(client, "/admin/cost")).json()
            assert cost["totals"]["requests"] == 13


async def test_a_stop_does_not_wait_for_those_who_look_and_what_was_counted_stays(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        admin = {"port": free_port()}  # what a gateway keeps is found again by its admin address
        async with (
            serve_process(tmp_path, [engine.url], admin=admin) as gateway,
            httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        ):
            await ask(gateway, 5)
            await until(gateway, client, lambda it: it["totals"]["requests"] == 5)
            headers = {"authorization": f"Bearer {gateway.token}"}
            url = f"{await gateway.admin_url()}/admin/events?topics=overview"
            async with client.stream("GET", url, headers=headers) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                begun = time.monotonic()
                gateway.signal(signal.SIGTERM)
                assert await gateway.ended() == 0
                assert time.monotonic() - begun < PATIENCE_S / 2
                await rest_of(lines)
        async with (
            serve_process(tmp_path, [engine.url], admin=admin) as gateway,
            httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
        ):
            await ask(gateway, 2)
            found = await until(gateway, client, lambda it: it["totals"]["requests"] >= 7)
            assert found["totals"]["requests"] == 7


async def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url, "http://127.0.0.1:9"]) as gateway:
        await ask(gateway, 3)
        url, state = await gateway.admin_url(), {"TIDEGATE_STATE_DIR": str(gateway.state)}
        async with httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
            await until(gateway, client, lambda it: it["health"])
        code, out, err = await run_tidegate("overview", "--url", url, environ=state)
        assert (code, err) == (0, "")
        assert out.startswith("DEGRADED  Replica pool-1 refuses connections (pool pool).\n")
        assert "requests per second" in out
        code, out, _ = await run_tidegate("overview", "--json", "--window", "day", "--url", url, environ=state)
        assert (code, json.loads(out)["window"]) == (0, "day")
        shown = 0

        def pause(seconds: float) -> None:
            nonlocal shown
            shown += 1
            if shown == 2:
                raise KeyboardInterrupt

        options = argparse.Namespace(url=url, config=None, token_file=None, json=True, watch=True, window="live")
        assert await asyncio.to_thread(overview.run, options, state, pause) == 130
        assert [json.loads(line)["window"] for line in capsys.readouterr().out.splitlines()] == ["live", "live"]
    code, _, err = await run_tidegate("overview", "--url", url, environ=state)
    assert code == 1
    assert err.startswith("tidegate overview: no gateway answers")
