"""Requests and playground of real gateways, with one worker and with two, asked at the admin listener."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.engine import FakeEngine
from tests.support.client import until
from tests.support.command import PATIENCE_S, ServeProcess, serve_process

CANARY = "canary-77aa31"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": f"hi {CANARY}"}]}
STREAM = {**CHAT, "stream": True}
WORKERS = pytest.mark.parametrize("workers", [1, 2])


class Running:
    """A gateway, and how it is asked."""

    def __init__(self, gateway: ServeProcess, url: str, admin_url: str, client: httpx2.AsyncClient) -> None:
        self.gateway = gateway
        self.url = url
        self.admin_url = admin_url
        self.client = client
        self.headers = {"authorization": f"Bearer {gateway.token}"}

    async def admin(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        reply = await self.client.request(method, f"{self.admin_url}/admin/{path}", headers=self.headers, **more)
        assert reply.status_code == status, reply.text
        assert CANARY not in reply.text or path == "playground"
        return reply.json()

    async def ask(self, body: dict[str, Any] = CHAT, trial: str = "") -> httpx2.Response:
        headers = {"x-tidegate-trial": trial} if trial else {}
        return await self.client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    async def live(self, count: int = 1) -> list[dict[str, Any]]:
        """Those under way, once there are as many."""
        async with asyncio.timeout(PATIENCE_S):
            while len(rows := (await self.admin("GET", "requests?live=true"))["live"]) != count:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.02)
        found: list[dict[str, Any]] = rows
        return found

    async def settled(self, count: int, query: str = "") -> list[dict[str, Any]]:
        path = f"requests?live=false&{query}"
        async with asyncio.timeout(PATIENCE_S):
            while len(rows := (await self.admin("GET", path))["settled"]) != count:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
        found: list[dict[str, Any]] = rows
        return found

    @asynccontextmanager
    async def play(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
        """The events of the playground."""
        async with self.client.stream(
            "POST", f"{self.admin_url}/admin/playground", json=body, headers=self.headers
        ) as reply:
            assert reply.status_code == 200, (await reply.aread()).decode()
            assert reply.headers["content-type"].startswith("text/event-stream")
            yield _events(reply)

    async def played(self, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        async with self.play(body) as events:
            return [event async for event in events]


async def _events(reply: httpx2.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    kind = ""
    async for line in reply.aiter_lines():
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            yield kind, json.loads(line[6:])


@asynccontextmanager
async def running(folder: Path, urls: list[str], workers: int, **sections: Any) -> AsyncIterator[Running]:
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with (
        serve_process(folder, urls, "--workers", str(workers), **sections) as gateway,
        httpx2.AsyncClient(trust_env=False, limits=limits, timeout=PATIENCE_S) as client,
    ):
        yield Running(gateway, await gateway.url(), await gateway.admin_url(), client)


def told(events: list[tuple[str, dict[str, Any]]], kind: str, column: int = 0) -> list[dict[str, Any]]:
    return [data for name, data in events if name == kind and data.get("column") == column]


@WORKERS
async def test_requests_are_listed_opened_and_ended(tmp_path: Path, workers: int) -> None:
    async with FakeEngine(chunks=4) as engine, running(tmp_path, [engine.url], workers) as gateway:
        for _ in range(6):
            assert (await gateway.ask()).status_code == 200
        rows = await gateway.settled(6)
        assert [row["outcome"] for row in rows] == ["completed"] * 6
        assert [place["time_unix_s"] for place in rows] == sorted((row["time_unix_s"] for row in rows), reverse=True)

        # Pages: nothing twice, nothing left out, whatever comes in between.
        first = await gateway.admin("GET", "requests?live=false&limit=4")
        await gateway.ask()
        await gateway.settled(7)
        second = await gateway.admin("GET", f"requests?live=false&limit=4&before={first['next']}")
        assert [row["id"] for row in first["settled"] + second["settled"]] == [row["id"] for row in rows]
        assert second["next"] is None

        opened = await gateway.admin("GET", f"requests/{rows[0]['id']}")
        (decision,) = opened["decisions"]
        assert decision["candidates"][0]["replica"] == rows[0]["replica"]
        assert decision["candidates"][0]["terms_ms"].keys() >= {"wait", "prefill", "decode"}
        assert {phase["name"] for phase in opened["timeline"]["phases"]} >= {"read", "decide", "connect", "end"}

        engine.script = type(engine.script)(hang_mid=2)
        asking = asyncio.create_task(gateway.ask(STREAM))
        (live,) = await gateway.live()
        async with asyncio.timeout(PATIENCE_S):
            while live["phase"] != "streaming" or live["content_events"] != 2:
                (live,) = await gateway.live()
        running_request = engine.requests[-1]
        assert (await gateway.admin("DELETE", f"requests/{live['id']}"))["ended"]
        reply = await asking
        assert '"ended_by_operator"' in reply.text
        assert "[DONE]" not in reply.text
        await until(running_request.gone.is_set, PATIENCE_S)
        (row,) = await gateway.settled(1, "outcome=ended_by_operator")
        assert (row["id"], row["error_code"], row["status"]) == (live["id"], "ended_by_operator", 200)
        again = await gateway.admin("DELETE", f"requests/{live['id']}", 409)
        assert again["error"]["code"] == "request_over"
        (note, *_) = (await gateway.admin("GET", "audit?limit=1"))["data"]
        assert (note["action"], note["object"]) == ("request.end", live["id"])
        await gateway.admin("GET", "requests/req_nobody", 404)


@WORKERS
async def test_the_playground_goes_through_the_front_door(tmp_path: Path, workers: int) -> None:
    async with (
        FakeEngine(chunks=3) as first,
        FakeEngine(chunks=3) as second,
        running(tmp_path, [first.url, second.url], workers) as gateway,
    ):
        columns = [{"replica": "pool-1"}, {"policy": "round_robin"}]
        events = await gateway.played({"request": CHAT, "columns": columns})
        for column in (0, 1):
            (head,) = told(events, "head", column)
            assert head["status"] == 200
            text = "".join(each["text"] for each in told(events, "text", column))
            assert text, events
            assert told(events, "usage", column)[0]["completion_tokens"] == 3
            (done,) = told(events, "done", column)
            assert (done["record"]["tenant"], done["record"]["outcome"]) == ("playground", "completed")
            assert [phase["name"] for phase in done["timeline"]["phases"]][-2:] == ["stream", "end"]
        assert told(events, "head", 0)[0]["headers"]["x-tidegate-replica"] == "pool-1"
        (decision,) = told(events, "decision", 0)[0]["decisions"]
        assert (decision["replica"], decision["pinned"], decision["reason"]) == ("pool-1", "pool-1", "pinned")
        assert told(events, "decision", 1)[0]["decisions"][0]["policy"] == "round_robin"
        assert len(second.requests) >= 1
        assert events[-1][0] == "end"
        assert len(await gateway.settled(2, "tenant=playground")) == 2
        (note, *_) = (await gateway.admin("GET", "audit?limit=1"))["data"]
        assert (note["action"], note["object"]) == ("playground.send", "m")

        unknown = await gateway.played({"request": CHAT, "columns": [{"replica": "nobody"}]})
        assert told(unknown, "error")[0]["code"] == "unknown_replica"

        # Whoever leaves ends it.
        first.script = second.script = type(first.script)(hang_mid=1)
        async with gateway.play({"request": CHAT, "columns": [{"replica": "pool-0"}]}) as going:
            async for kind, _ in going:
                if kind == "text":
                    break
            request = first.requests[-1]
            assert not request.gone.is_set()
        await until(request.gone.is_set, PATIENCE_S)
        (row,) = await gateway.settled(1, "outcome=client_left")
        assert row["tenant"] == "playground"
    assert CANARY not in "\n".join(gateway.gateway.log)


async def test_nobody_else_comes_in_by_the_playgrounds_path(tmp_path: Path) -> None:
    async with FakeEngine() as engine, running(tmp_path, [engine.url], 1) as gateway:
        unknown = await gateway.client.post(f"{gateway.url}/tidegate/nothing", json=CHAT)
        for headers in ({}, {"x-tidegate-playground": ""}, {"x-tidegate-playground": gateway.gateway.token}):
            reply = await gateway.client.post(
                f"{gateway.url}/tidegate/playground/v1/chat/completions", json=CHAT, headers=headers
            )
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == unknown.json()["error"]["code"] == "unknown_url"
        # On an ordinary path the headers mean nothing.
        await gateway.ask(trial='{"tenant": "playground"}')
        assert (await gateway.settled(1))[0]["tenant"] == "default"


async def test_residency_holds_for_a_pinned_replica(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        backend = {"engine": "openai", "replicas": [{"url": engine.url, "region": "eu"}, {"url": "http://127.0.0.1:9"}]}
        async with running(tmp_path, [], 1, backends={"pool": backend}) as gateway:
            events = await gateway.played(
                {"request": CHAT, "columns": [{"replica": "pool-1"}], "regions": ["eu"]},
            )
            assert told(events, "error")[0]["code"] == "data_residency_mismatch", events
            events = await gateway.played({"request": CHAT, "columns": [{"replica": "pool-0"}], "regions": ["eu"]})
            assert told(events, "done")[0]["record"]["region"] == "eu"
