"""Cordoning by API and command: every worker hears of it, it is written down, and what is held goes on there."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx2
import pytest

from gateway.fleet_view.glance import glance
from loadtests.engine import FakeEngine
from tests.gateway.test_operate import operating, state
from tests.gateway.test_operations import BY_LOAD, configured, engines, order, watched
from tests.gateway.test_warm_up import at_work, chat, paced
from tests.gateway.test_warm_up import configured as warm_configured
from tests.gateway.test_workers import ask, client, workers_until
from tests.support.command import serve_process, write_config

__all__ = ["client", "state"]  # the fixtures

CORDON = "/admin/replicas/pool/pool-{}/cordon"
UNCORDON = "/admin/replicas/pool/pool-{}/uncordon"


async def test_a_cordoned_replica_gets_nothing_new_and_any_again_later(client: httpx2.AsyncClient) -> None:
    async with (
        engines(2, chunks=1) as (first, second),
        watched(configured([first.url, second.url])) as (gateway, admin),
    ):
        reply = (await admin.post(CORDON.format(0))).json()
        assert reply == {
            "pool": "pool",
            "replica": "pool-0",
            "cordoned": True,
            "in_flight": 0,
            "empty": True,
            "silent_workers": [],
        }
        await ask(client, gateway.url, 10)
        assert (len(first.requests), len(second.requests)) == (0, 10)
        shown = (await admin.get("/admin/replicas/pool/pool-0")).json()
        assert (shown["cordoned"], shown["draining"], shown["unavailable_reason"]) == (True, False, "cordoned")
        assert glance(gateway.runtime, 0).pools[0].replicas[0].cordoned
        assert (await admin.post(UNCORDON.format(0))).json()["cordoned"] is False
        await ask(client, gateway.url, 10)
        assert len(first.requests) > 0


async def test_it_is_used_when_the_other_one_is_drained(client: httpx2.AsyncClient) -> None:
    async with (
        engines(2, chunks=1) as (first, second),
        watched(configured([first.url, second.url])) as (gateway, admin),
    ):
        assert (await admin.post(CORDON.format(0))).status_code == 200
        # It is not the last that takes work: the cordoned one does, if it must.
        assert (await admin.post("/admin/replicas/pool/pool-1/drain")).status_code == 200
        await ask(client, gateway.url, 4)
        assert (len(first.requests), len(second.requests)) == (4, 0)
        assert (await client.get(f"{gateway.url}/readyz")).status_code == 200


async def test_both_may_be_cordoned() -> None:
    async with engines(2) as (first, second), watched(configured([first.url, second.url])) as (gateway, admin):
        replies = [await admin.post(CORDON.format(number)) for number in (0, 1, 1)]
        assert [reply.status_code for reply in replies] == [200] * 3
        assert all(each.cordoned for each in gateway.runtime.fleet.pools["pool"].replicas)


async def test_unknown_names_are_answered_with_the_known() -> None:
    async with engines(1) as (only,), watched(configured([only.url])) as (_, admin):
        answer = await admin.post(CORDON.format(7))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_replica")


async def test_a_conversation_goes_on_where_it_is_held(client: httpx2.AsyncClient) -> None:
    async with (
        paced() as first,
        paced() as second,
        at_work(warm_configured([first.url, second.url]), client) as gateway,
    ):
        mine = await gateway.ask(chat("mine " * 200))
        holder, other = sorted(gateway.replicas, key=lambda each: each.name != mine["replica"])
        holder.health.cordon(True)
        assert (await gateway.ask(chat("mine " * 200 + "and more")))["replica"] == holder.name
        for number in range(5):
            new = await gateway.ask(chat(f"n{number}", system=f"New application number {number}. " * 90))
            assert new["replica"] == other.name


async def test_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    async with (
        engines(2) as (first, second),
        operating(capsys, monkeypatch, [first.url, second.url]) as (_, operator),
    ):
        assert await operator.run("cordon", "pool/pool-0") == 0
        assert operator.out == "pool/pool-0 gets no new prompts; requests under way there: 0\n"
        assert await operator.run("replicas") == 0
        assert "cordoned" in operator.out
        assert await operator.run("uncordon", "pool/pool-0", "--json") == 0
        assert json.loads(operator.out)["cordoned"] is False
        assert await operator.run("uncordon", "pool/pool-0") == 0
        assert operator.out == "pool/pool-0 gets new prompts again\n"
        assert await operator.run("cordon", "pool/pool-9") == 2
        assert "pool-0, pool-1" in operator.err


async def test_every_worker_hears_of_it_also_one_that_is_reloaded(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine(chunks=1) as first,
        FakeEngine(chunks=1) as second,
        serve_process(tmp_path, [first.url, second.url], "--workers", "2", models=BY_LOAD) as gateway,
    ):
        url = await gateway.url()
        reply = await order(gateway, client, "POST", CORDON.format(0))
        assert (reply["cordoned"], reply["silent_workers"]) == (True, [])
        await ask(client, url, 20)
        assert (len(first.requests), len(second.requests)) == (0, 20)
        write_config(gateway.config, [first.url, second.url], models={"m": {"backend": "pool", "aliases": ["new"]}})
        gateway.signal(signal.SIGHUP)
        await workers_until(gateway, client, lambda found: all("new" in w["models"]["m"]["aliases"] for w in found))
        await ask(client, url, 20)
        assert len(first.requests) == 0
