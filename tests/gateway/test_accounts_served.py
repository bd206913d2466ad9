"""Limits and costs as the admin side shows them, of gateways that are processes: with one worker and its own memory,
and with two and a Redis."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.engine import FakeEngine
from tests.support.command import PATIENCE_S, ServeProcess, run_tidegate, serve_process
from tests.support.keyed_command import ask, http
from tests.support.redis_server import RedisServer


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with http() as opened:
        yield opened


async def made_key(gateway: ServeProcess, client: httpx2.AsyncClient, **fields: Any) -> tuple[str, str]:
    """A key's id and text."""
    headers = {"authorization": f"Bearer {gateway.token}"}
    answer = await client.post(await gateway.admin_url() + "/admin/keys", json=fields, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"], answer.json()["key"]


async def until_known(gateway: ServeProcess, client: httpx2.AsyncClient, *keys: str) -> None:
    """Until every worker knows these keys."""
    url = await gateway.url()
    for key in keys:
        seen = 0
        async with asyncio.timeout(PATIENCE_S):
            while seen < 8:
                answer = await client.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
                seen = seen + 1 if answer.status_code == 200 else 0


def by_limit(row: dict[str, Any]) -> dict[str, Any]:
    return {each["limit"]: each for each in row["limits"]}


SECTIONS: dict[str, Any] = {
    "auth": "keys",
    "models": {
        "m": {"backend": "pool", "price": {"input": 1.0, "output": 2.0}, "tenant_limits": {"tokens_per_minute": 90_000}}
    },
    "tenants": {
        "acme": {"limits": {"requests_per_minute": 6000, "usd_per_day": 0.5}},
        "shady": {"limits": {"requests_per_minute": 6, "burst_s": 10, "shadow": True}},
    },
}


@pytest.mark.parametrize("workers", [1, 2])
async def test_limits_are_shown_as_they_stand_and_costs_to_the_last_millionth(
    tmp_path: Path, client: httpx2.AsyncClient, request: pytest.FixtureRequest, workers: int
) -> None:
    sections = {**SECTIONS, "database": f"sqlite:///{tmp_path}/tidegate.db"}
    if workers > 1:
        redis: RedisServer = request.getfixturevalue("redis_server")
        sections["store"] = redis.url
    async with FakeEngine() as engine:
        async with serve_process(tmp_path, [engine.url], "--workers", str(workers), **sections) as gateway:
            url = await gateway.url()
            limits = {"requests_per_minute": 60, "burst_s": 20, "concurrent_requests": 70, "usd_per_month": 3}
            raised = [{"limits": {"concurrent_requests": 90}, "until": "2099-01-01T00:00:00Z"}]
            id, key = await made_key(gateway, client, tenant="acme", name="ci", limits=limits, raises=raised)
            _, other = await made_key(gateway, client, tenant="shady")
            idle, _ = await made_key(gateway, client, tenant="globex", limits={"tokens_per_minute": 600})
            await until_known(gateway, client, key, other)
            answers = await asyncio.gather(*(ask(client, url, key, max_tokens=5) for _ in range(12)))
            assert [answer.status_code for answer in answers] == [200] * 12
            usages = [answer.json()["usage"] for answer in answers]
            spent = sum(each["prompt_tokens"] + 2 * each["completion_tokens"] for each in usages)
            for _ in range(3):
                assert (await ask(client, url, other)).status_code == 200

            page = (await gateway.admin(client, "/admin/limits")).json()
            rows = {(row["kind"], row["tenant"], row["key"]): row for row in page["data"]}
            assert page["store"] == ("memory" if workers == 1 else "redis")
            assert page["complete"] is True
            assert [row["share"] for row in page["data"]] == sorted(
                (row["share"] for row in page["data"]), reverse=True
            )
            row = rows["key", "acme", id]
            assert (row["name"], row["raised"]) == ("ci", {"concurrent_requests": [70, 90]})
            gauges = by_limit(row)
            assert (gauges["requests_per_minute"]["most"], gauges["requests_per_minute"]["capacity"]) == (60, 20)
            assert 8 <= gauges["requests_per_minute"]["used"] <= 12
            assert gauges["requests_per_minute"]["remaining"] <= 12
            assert gauges["concurrent_requests"]["most"] == 90
            assert round(gauges["usd_per_month"]["used"] * 1e6) == spent
            assert (gauges["usd_per_month"]["reserved"], row["nearest"]) == (0, "requests_per_minute")
            assert round(by_limit(rows["tenant", "acme", ""])["usd_per_day"]["used"] * 1e6) == spent
            shady = rows["tenant", "shady", ""]
            assert (shady["shadow"], by_limit(shady)["requests_per_minute"]["would_refuse"]) == (True, 2)
            assert rows["key", "globex", idle]["share"] == 0
            assert rows["tenant_model", "acme", ""]["model"] == "m"
            again = (await gateway.admin(client, "/admin/limits")).json()
            assert by_limit(again["data"][-1]) == by_limit(page["data"][-1])

            one = (await gateway.admin(client, f"/admin/limits?key={id}")).json()
            assert {row["kind"] for row in one["data"]} == {"key", "tenant", "tenant_model"}
            assert {row["tenant"] for row in one["data"]} == {"acme"}
            assert (await gateway.admin(client, "/admin/limits?tenant=globex&limit=1")).json()["data"][0]["key"] == idle
            assert (await gateway.admin(client, "/admin/limits?limit=1&offset=1")).json()["data"] != page["data"][:1]

            await until_on_record(gateway, client, spent)
            cost = (await gateway.admin(client, "/admin/cost?by=tenant&window=hour")).json()
            acme = next(row for row in cost["rows"] if row["name"] == "acme")
            assert (acme["requests"], acme["own"]["requests"], acme["rented"]["requests"]) == (12, 12, 0)
            assert round(acme["usd"] * 1e6) == spent
            assert acme["prompt_tokens"] == sum(each["prompt_tokens"] for each in usages)
            assert acme["completion_tokens"] == sum(each["completion_tokens"] for each in usages)
            assert sum(cost["series"]["own_usd"]) == pytest.approx(cost["totals"]["usd"])
            for by, name in (("model", "m"), ("backend", "pool")):
                cost = (await gateway.admin(client, f"/admin/cost?by={by}&tenant=acme")).json()
                assert [(row["name"], round(row["usd"] * 1e6)) for row in cost["rows"]] == [(name, spent)]
            answer = await gateway.admin(client, "/admin/cost.csv?window=month")
            table = list(csv.DictReader(io.StringIO(answer.text)))
            assert [(row["tenant"], row["requests"]) for row in table] == [("acme", "12"), ("shady", "3")]
            for path in ("limits?limit=0", "limits?offset=x", "cost?by=day", "cost?window=year", "cost?limit=9999"):
                assert (await gateway.admin(client, f"/admin/{path}")).status_code == 400, path

            for command in (["limits", "--json"], ["limits"], ["cost", "--json"], ["cost"], ["cost", "--csv"]):
                code, out, err = await command_of(gateway, *command)
                assert code == 0, err
                assert "acme" in out
            assert (
                json.loads((await command_of(gateway, "cost", "--by", "model", "--json"))[1])["rows"][0]["name"] == "m"
            )
            gateway.signal(15)
            assert await gateway.ended() == 0, gateway.log
        # What was collected is there after the gateway, and on record to the last millionth.
        (file,) = (tmp_path / "state").glob("**/costs.sqlite3")
        with sqlite3.connect(file) as kept:
            assert kept.execute("SELECT sum(micros) FROM use_1 WHERE step = 3600 AND tenant = 'acme'").fetchone() == (
                spent,
            )
        kept.close()
        with sqlite3.connect(tmp_path / "tidegate.db") as record:
            rows_of_record = record.execute("SELECT micros FROM tidegate_spend WHERE scope = '{t:acme}:t'").fetchall()
        record.close()
        assert rows_of_record == [(spent,), (spent,)]


async def until_on_record(gateway: ServeProcess, client: httpx2.AsyncClient, spent: int) -> None:
    """Until the costs of acme are collected, and the same is on record."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            cost = (await gateway.admin(client, "/admin/cost?by=tenant&window=day")).json()
            for row in cost["rows"]:
                record = {"day_usd": spent / 1e6, "month_usd": spent / 1e6}
                if row["name"] == "acme" and round(row["usd"] * 1e6) == spent and row["record"] == record:
                    return


async def command_of(gateway: ServeProcess, *arguments: str) -> tuple[int, str, str]:
    url = await gateway.admin_url()
    return await run_tidegate(*arguments, "--url", url, "--token-file", str(gateway.state / "admin-token"))
