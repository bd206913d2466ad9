"""Scaling at a running gateway: routes, numbers that operators hold, agents, metrics, the command, two gateways."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import PATIENCE_S, ServeProcess, run_tidegate, serve_process
from tests.support.redis_server import RedisServer

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Admin:
    """The admin API of one gateway."""

    def __init__(self, gateway: ServeProcess, client: httpx2.AsyncClient) -> None:
        self._gateway = gateway
        self._client = client

    async def __call__(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        url = await self._gateway.admin_url() + path  # the token is there as soon as this is
        headers = {"authorization": f"Bearer {self._gateway.token}"}
        return await self._client.request(method, url, json=body, headers=headers)

    async def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self("GET", "/admin/scaling/pool")).json()
        return found

    async def until(self, holds: Callable[[dict[str, Any]], bool], within_s: float = PATIENCE_S) -> dict[str, Any]:
        """The pool's scaling as soon as it is so."""
        return await until(self.pool, holds, within_s)


async def until(
    ask: Callable[[], Awaitable[dict[str, Any]]], holds: Callable[[dict[str, Any]], bool], within_s: float = PATIENCE_S
) -> dict[str, Any]:
    """The first answer that is so."""
    row: dict[str, Any] = {}
    try:
        async with asyncio.timeout(within_s):
            while True:
                row = await ask()
                if "wanted" in row and holds(row):
                    return row
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"it never was so: {json.dumps(row, indent=1)}") from None


def _backend(urls: list[str], **scaling: Any) -> dict[str, Any]:
    return {"pool": {"engine": "openai", "replicas": [{"url": url} for url in urls], "scaling": {"max": 6, **scaling}}}


async def test_traffic_is_seen_and_a_held_number_is_told_to_a_command_and_survives_a_restart(tmp_path: Path) -> None:
    out = tmp_path / "orders"
    script = tmp_path / "resize.py"
    script.write_text(f"import sys\nopen({str(out)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n")
    words = [sys.executable, str(script), "{pool}", "{count}", "{current}"]
    async with FakeEngine(ports=(0, 0), models=("m",)) as engine, httpx2.AsyncClient(trust_env=False) as client:
        sections: dict[str, Any] = {
            "backends": _backend(engine.urls, provider="command", command={"words": words}, usd_per_hour=2.5),
            "server": {"port": free_port()},  # by which a gateway knows its own files again
            "admin": {"port": free_port()},
        }
        async with serve_process(tmp_path, [], "--workers", "2", **sections) as gateway:
            admin, url = Admin(gateway, client), await gateway.url()
            for _ in range(40):
                assert (await client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code == 200
            row = await admin.until(lambda row: row["demand"] is not None and row["demand"]["complete"])
            assert row["acting"] is True
            assert (row["wanted"], row["ready"], row["provider"], row["usd_per_hour"]) == (2, 2, "command", 5.0)
            assert row["workers"] == 2

            refused = await admin("PUT", "/admin/scaling/pool", {"count": 7})
            assert refused.status_code == 400
            assert "from 1 to 6" in refused.json()["error"]["message"]
            assert (await admin("PUT", "/admin/scaling/pool", {"count": 4, "for_s": 90_000})).status_code == 400
            assert (await admin("GET", "/admin/scaling/nowhere")).json()["error"]["code"] == "unknown_pool"

            args = ("--url", await gateway.admin_url(), "--token-file", str(gateway.state / "admin-token"))
            code, said, _ = await run_tidegate("scaling", "hold", "pool", "4", "--for", "10m", *args)
            assert (code, "held at 4" in said) == (0, True)
            row = await admin.until(lambda row: bool(row["wanted"] == 4))
            assert (row["held"]["count"], row["held"]["by"]) == (4, "admin")
            assert row["reasons"][0]["kind"] == "hold"
            await until(admin.pool, lambda _: out.exists() and "pool 4 2" in out.read_text())
            code, said, _ = await run_tidegate("scaling", *args)
            assert code == 0
            assert "admin holds it at 4" in said
            metrics = (await admin("GET", "/metrics")).text
            assert 'tidegate_scaling_wanted_replicas{pool="pool"} 4.0' in metrics
            assert 'tidegate_scaling_held{pool="pool"} 1.0' in metrics
            gateway.signal(15)
            assert await gateway.ended() == 0
        orders = out.read_text()
        async with serve_process(tmp_path, [], **sections) as gateway:
            admin = Admin(gateway, client)
            row = await admin.until(lambda row: row["held"] is not None and row["acting"])
            assert (row["wanted"], row["held"]["count"]) == (4, 4)
            assert [each["wanted"] for each in row["history"]][-2:] == [4, 2]
            code, said, _ = await run_tidegate(
                "scaling",
                "release",
                "pool",
                "--url",
                await gateway.admin_url(),
                "--token-file",
                str(gateway.state / "admin-token"),
            )
            assert (code, "follows" in said) == (0, True)
            row = await admin.until(lambda row: row["held"] is None)
            actions = [each["action"] for each in (await admin("GET", "/admin/audit?limit=10")).json()["data"]]
            assert "scaling.release" in actions
            assert out.read_text() == orders  # what was told before the restart is not told again


async def test_a_provider_that_fails_is_said_once_and_tried_again_and_the_loop_goes_on(tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    words = [sys.executable, "-c", f"import os,sys; sys.exit('quota exceeded' if os.path.exists({str(flag)!r}) else 0)"]
    async with FakeEngine(models=("m",)) as engine, httpx2.AsyncClient(trust_env=False) as client:
        backends = _backend(engine.urls, min=2, provider="command", command={"words": words})
        async with serve_process(tmp_path, [], backends=backends) as gateway:
            admin = Admin(gateway, client)
            row = await admin.until(lambda row: row["problem"] is not None)
            assert "quota exceeded" in row["problem"]
            code, _, error = await run_tidegate(
                "scaling",
                "show",
                "pool",
                "--url",
                await gateway.admin_url(),
                "--token-file",
                str(gateway.state / "admin-token"),
            )
            assert (code, "quota exceeded" in error) == (1, True)
            metrics = (await admin("GET", "/metrics")).text
            assert 'tidegate_scaling_problem{pool="pool"} 1.0' in metrics
            flag.unlink()
            row = await admin.until(lambda row: row["problem"] is None)
            assert row["wanted"] == 2
            assert sum("quota exceeded" in line for line in gateway.log) == 1
            await gateway.logged("the provider command acts again")


@pytest.mark.quiet
async def test_of_two_gateways_one_acts_and_the_other_takes_over_and_each_arrival_counts_once(
    tmp_path: Path,
) -> None:
    with RedisServer() as redis_server:
        async with (
            FakeEngine(models=("m",)) as engine,
            httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
        ):
            folders = [tmp_path / "a", tmp_path / "b"]
            for folder in folders:
                folder.mkdir()
            sections: dict[str, Any] = {"backends": _backend(engine.urls), "store": redis_server.url}
            async with (
                serve_process(folders[0], [], **sections) as first,
                serve_process(folders[1], [], **sections) as second,
            ):
                urls = [await first.url(), await second.url()]
                both = [Admin(first, client), Admin(second, client)]

                async def traffic() -> None:
                    while True:
                        answers = await asyncio.gather(
                            *(client.post(f"{url}/v1/chat/completions", json=CHAT) for url in urls * 2)
                        )
                        assert all(answer.status_code == 200 for answer in answers)
                        sent.append(len(answers))
                        await asyncio.sleep(0.2)

                sent: list[int] = []
                began = time.monotonic()
                running = asyncio.create_task(traffic())
                try:
                    rows = [
                        await each.until(lambda row: row["workers"] == 2 and row["demand"]["arrivals_per_s"] > 0)
                        for each in both
                    ]
                    await asyncio.sleep(6.0)
                    rows = [await each.pool() for each in both]
                    rate = sum(sent) / (time.monotonic() - began)
                    for row in rows:
                        assert row["demand"]["arrivals_per_s"] == pytest.approx(rate, rel=0.35)
                    assert sorted(row["acting"] for row in rows) == [False, True]
                    assert rows[0]["wanted"] == rows[1]["wanted"]
                finally:
                    running.cancel()
                    await asyncio.wait([running])
                leader = 0 if rows[0]["acting"] else 1
                (first, second)[leader].process.kill()
                killed = time.monotonic()
                row = await both[1 - leader].until(lambda row: bool(row["acting"]))
                assert time.monotonic() - killed < 15.0
                redis_server.kill()
                row = await both[1 - leader].until(lambda row: row["problem"] is not None)
                assert (row["acting"], row["wanted"]) == (False, rows[0]["wanted"])
                assert "nothing is changed" in row["problem"]


def _launch(**scaling: Any) -> dict[str, Any]:
    launch = {"model": "/models/m.gguf", "count": 1}
    scaled = {"max": 5, "provider": "local", **scaling}
    return {"pool": {"engine": "llamacpp", "launch": launch, "scaling": scaled}}


async def test_agents_share_a_pools_count_and_are_told_of_a_roll(tmp_path: Path) -> None:
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=20.0) as client,
        serve_process(tmp_path, [], backends=_launch(min=3)) as gateway,
    ):
        admin = Admin(gateway, client)

        async def report(agent: str, launched: int, most: int, roll: int = 0) -> dict[str, Any]:
            pools = {"pool": {"launched": launched, "ready": launched, "max": most, "roll": roll}}
            answer = await admin("PUT", f"/admin/agents/{agent}", {"pools": pools})
            assert answer.status_code == 200, answer.text
            told: Mapping[str, Any] = answer.json()
            assert told["renew_in_s"] == 2.0
            return dict(told["pools"]["pool"])

        assert (await report("b", 1, 4))["count"] >= 1
        await admin.until(lambda row: row["acting"] and row["wanted"] >= 3)
        await report("b", 1, 4)
        assert (await report("a", 1, 2))["count"] == 2
        assert (await report("b", 1, 4))["count"] == 1
        assert (await report("b", 3, 4)) == {"count": 3, "leave": [], "roll": 0}  # never fewer, nobody named
        rows = (await admin("GET", "/admin/agents")).json()["agents"]
        assert [(row["agent"], row["pools"][0]["max"]) for row in rows] == [("a", 2), ("b", 4)]
        rolled = (await admin("POST", "/admin/pools/pool/roll")).json()
        assert rolled == {"pool": "pool", "roll": 1}
        told = await until_told(lambda: report("a", 1, 2), 1)
        assert told["roll"] == 1
        await report("a", 1, 2, roll=7)
        assert (await admin("POST", "/admin/pools/pool/roll")).json()["roll"] == 8
        assert (await admin("PUT", "/admin/agents/a b", {"pools": {}})).status_code == 400
        assert (await admin("PUT", "/admin/agents/a", {"pools": {"pool": {"launched": -1}}})).status_code == 400
        assert (await admin("PUT", "/admin/agents/a", {"pools": {"pool": {"roll": 10**16}}})).status_code == 400


async def until_told(ask: Callable[[], Awaitable[dict[str, Any]]], roll: int) -> dict[str, Any]:
    """What an agent is told once it has heard of this roll."""
    async with asyncio.timeout(PATIENCE_S):
        while (told := await ask())["roll"] != roll:  # noqa: ASYNC110 - the answer is asked for, as an agent does
            await asyncio.sleep(0.05)
    return told


async def test_a_pool_without_anybody_who_could_restart_it_is_not_rolled(tmp_path: Path) -> None:
    async with (
        FakeEngine(models=("m",)) as engine,
        httpx2.AsyncClient(trust_env=False) as client,
        serve_process(tmp_path, engine.urls) as gateway,
    ):
        admin = Admin(gateway, client)
        answer = await admin("POST", "/admin/pools/pool/roll")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_rollable")
        assert (await admin("GET", "/admin/scaling/pool")).json()["error"]["code"] == "not_scaled"
        assert (await admin("GET", "/admin/scaling")).json() == {"pools": [], "agents": []}
        assert "tidegate_scaling" not in (await admin("GET", "/metrics")).text
