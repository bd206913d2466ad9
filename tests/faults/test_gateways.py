"""Experiments 10, 11, 13 and 19 with real gateways: two processes, keys, limits, a real Redis, clients over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.engine import FakeEngine
from loadtests.hammer_bounds import allowed, percentile
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.forms import LONG, seconds
from tests.faults.test_scripts_and_replies import flushing
from tests.support.command import ServeProcess, serve_process
from tests.support.redis_server import RedisServer

KEY = "a-key-for-the-fault-tests-0123456789"
GATEWAYS, CLIENTS = 2, 8
PER_MINUTE, BURST_S, CONCURRENT = 6000, 2.0, 200
BURST = round(PER_MINUTE * BURST_S / 60)
ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
BACK_S = 2.0
BUSY_S = 1.0
"""What a machine with two busy cores may add to any wait."""
AUTH = {"authorization": f"Bearer {KEY}"}


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are monotonic seconds."""

    gateway: int
    at_s: float
    took_s: float
    status: int
    """0: none, the connection failed."""
    store: str
    """`x-tidegate-store`."""


@dataclass
class Load:
    """What clients were told."""

    answers: list[Answer] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0

    def failed(self) -> list[Answer]:
        """Whatever is neither an answer nor an honest refusal."""
        return [answer for answer in self.answers if answer.status not in (200, 429)]

    def admitted(self, *stores: str) -> int:
        return sum(answer.status == 200 and answer.store in stores for answer in self.answers)

    def during(self, begin_s: float, end_s: float) -> list[Answer]:
        return [answer for answer in self.answers if begin_s <= answer.at_s <= end_s]

    def back_s(self, since_s: float) -> float:
        """From then until every gateway had said `redis` again."""
        firsts = [
            min(
                (answer.at_s + answer.took_s for answer in self.answers
                 if answer.gateway == gateway and answer.at_s >= since_s and answer.store == "redis"),
                default=float("inf"),
            )
            for gateway in range(GATEWAYS)
        ]  # fmt: skip
        return max(firsts) - since_s


def sections(server: RedisServer, folder: Path, **more: Any) -> dict[str, Any]:
    limits = {"requests_per_minute": PER_MINUTE, "burst_s": BURST_S, "concurrent_requests": CONCURRENT}
    return {
        "auth": "keys",
        "store": server.url,
        "database": f"sqlite:///{folder / 'keys.db'}",
        "keys": {"static": [{"name": "load", "key": {"env": "FAULTS_KEY"}, "limits": limits}]},
        **more,
    }


@contextlib.asynccontextmanager
async def gateways(
    tmp_path: Path, server: RedisServer, engine: FakeEngine, **more: Any
) -> AsyncIterator[list[ServeProcess]]:
    """Two of them, which know nothing of each other but the same Redis. `more`: sections of their configuration."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in range(GATEWAYS):
            folder = tmp_path / f"gateway-{number}"
            folder.mkdir()
            serving = serve_process(
                folder, engine.urls, environ={"FAULTS_KEY": KEY}, **sections(server, folder, **more)
            )
            found.append(await stack.enter_async_context(serving))
        for process in found:
            await process.url()
        yield found


async def client(load: Load, number: int, url: str, over: asyncio.Event) -> None:
    async with httpx2.AsyncClient(trust_env=False, timeout=20.0, headers=AUTH) as http:
        while not over.is_set():
            at_s = time.monotonic()
            status, store = 0, ""
            try:
                reply = await http.post(f"{url}/v1/chat/completions", json=ASK)
                status, store = reply.status_code, reply.headers.get("x-tidegate-store", "")
            except httpx2.HTTPError as error:
                store = repr(error)
            load.answers.append(Answer(number, at_s, time.monotonic() - at_s, status, store))
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def loaded(processes: Sequence[ServeProcess]) -> AsyncIterator[Load]:
    """Clients that ask and ask, until the end of the block."""
    urls = [await process.url() for process in processes]
    load, over = Load(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for number, url in enumerate(urls):
            for _ in range(CLIENTS):
                tasks.create_task(client(load, number, url, over))
        try:
            yield load
        finally:
            load.ended_s = time.monotonic()
            over.set()


async def leases_left(server: RedisServer, within_s: float) -> int:
    """Of limits, in Redis, not run out, after at most so long. The names are the Redis limiter's."""
    deadline_s = time.monotonic() + within_s
    with server.client() as control:
        while True:
            now_us = time.time_ns() // 1000
            left = sum(int(control.zcount(name, now_us, "+inf")) for name in control.scan_iter("tidegate:*:leases"))
            if left == 0 or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(0.1)


def judged(name: str, fault: str, load: Load, bursts: int, back_s: float, left: int, **also: Any) -> Finding:
    shared_most = bursts * BURST + allowed(0, PER_MINUTE, round((load.ended_s - load.began_s) * 1e6))
    away = [answer for answer in load.answers if answer.store == "local"]
    away_s = max(answer.at_s for answer in away) - min(answer.at_s for answer in away) if away else 0.0
    local_most = allowed(BURST, PER_MINUTE, round(away_s * 1e6)) + GATEWAYS
    shared, local, failed = load.admitted("redis"), load.admitted("local"), load.failed()
    return Finding(
        f"gateways: {name}",
        f"{GATEWAYS} gateways, {GATEWAYS * CLIENTS} clients, {PER_MINUTE} requests a minute, burst {BURST}; {fault}",
        f"no request fails; by Redis at most {shared_most}, by local shares at most {local_most}; "
        f"back within {BACK_S:g} s; no lease left",
        f"{len(failed)} of {len(load.answers):,} failed; {shared} and {local} admitted; back after {back_s:.2f} s; "
        f"{left} leases left",
        not failed and 0 < shared <= shared_most and local <= local_most and back_s <= BACK_S + BUSY_S and left == 0,
        {
            "failed": [repr(answer) for answer in failed[:5]],
            "shared": shared, "local": local, "away_s": away_s, "answers": len(load.answers),
            "p99_ms": percentile([answer.took_s * 1000 for answer in load.answers], 99), **also,
        },
    )  # fmt: skip


async def test_10_gateways_serve_on_while_redis_is_killed(
    tmp_path: Path, redis_alone: RedisServer, report: Report
) -> None:
    async with FakeEngine(record=False) as engine, gateways(tmp_path, redis_alone, engine) as processes:
        async with loaded(processes) as load:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(redis_alone.kill)
            await asyncio.sleep(seconds(1.5, 10.0))
            await asyncio.to_thread(redis_alone.start)
            back_at_s = time.monotonic()
            await asyncio.sleep(BACK_S + BUSY_S)
        left = await leases_left(redis_alone, 10.0)
        found = judged("Redis killed", "kill -9, empty restart", load, 2, load.back_s(back_at_s), left)
        report("10", found)
        assert found.figures["local"], "nobody noticed that Redis was away"


async def test_11_gateways_serve_on_while_redis_is_frozen(
    tmp_path: Path, redis_alone: RedisServer, report: Report
) -> None:
    async with FakeEngine(record=False) as engine, gateways(tmp_path, redis_alone, engine) as processes:
        async with loaded(processes) as load:
            await asyncio.sleep(1.5)
            frozen_at_s = time.monotonic()
            redis_alone.freeze()
            await asyncio.sleep(seconds(2.0, 30.0))
            redis_alone.thaw()
            back_at_s = time.monotonic()
            await asyncio.sleep(BACK_S + BUSY_S)
        left = await leases_left(redis_alone, 10.0)
        before = [answer.took_s * 1000 for answer in load.during(0.0, frozen_at_s - 0.2)]
        first = [answer.took_s * 1000 for answer in load.during(frozen_at_s - 0.1, frozen_at_s + 0.3)]
        later = [answer.took_s * 1000 for answer in load.during(frozen_at_s + 0.3, back_at_s)]
        found = judged(
            "Redis frozen", f"stopped for {seconds(2.0, 30.0):g} s", load, 1, load.back_s(back_at_s), left,
            median_before_ms=percentile(before, 50), median_later_ms=percentile(later, 50),
            longest_first_ms=max(first, default=0.0), p99_later_ms=percentile(later, 99),
        )  # fmt: skip
        report("11", found)
        assert found.figures["local"], "nobody noticed that Redis was frozen"
        # 50 ms for Redis; the rest is two busy cores.
        assert found.figures["longest_first_ms"] <= percentile(before, 99) + 50 + 250
        assert percentile(later, 50) <= percentile(before, 50) + 20


async def test_13_gateways_do_not_mind_that_scripts_are_flushed(
    tmp_path: Path, redis_alone: RedisServer, report: Report
) -> None:
    patient = {"timeout_ms": 5000}  # a busy machine reaches 50 ms by itself, and this is about counts
    async with FakeEngine(record=False) as engine, gateways(tmp_path, redis_alone, engine, redis=patient) as processes:
        with redis_alone.client() as control, flushing(control, 0.01):
            async with loaded(processes) as load:
                await asyncio.sleep(seconds(2.0, 10.0))
        left = await leases_left(redis_alone, 10.0)
        found = judged("SCRIPT FLUSH", "scripts forgotten 100 times a second", load, 1, 0.0, left)
        report("13", found)
        assert found.figures["local"] == 0, "a gateway decided by itself although Redis was there"


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="a lease lasts 30 s: run it with `make faults`")
async def test_19_a_killed_gateway_gives_its_leases_back(
    tmp_path: Path, redis_alone: RedisServer, report: Report
) -> None:
    """One gateway holds all the key's leases in streams that never end; the other refuses until they run out."""
    async with FakeEngine(record=False, hang_mid=1) as engine, gateways(tmp_path, redis_alone, engine) as processes:
        urls = [await process.url() for process in processes]
        limits = httpx2.Limits(max_connections=CONCURRENT + 10)
        async with httpx2.AsyncClient(trust_env=False, timeout=90.0, headers=AUTH, limits=limits) as http:
            body = {**ASK, "stream": True}

            async def hold() -> None:
                with contextlib.suppress(httpx2.HTTPError):
                    await http.post(f"{urls[0]}/v1/chat/completions", json=body)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(CONCURRENT):
                    tasks.create_task(hold())
                async with asyncio.timeout(20.0):
                    await engine.until(lambda: engine.running == CONCURRENT)
                refused = await http.post(f"{urls[1]}/v1/chat/completions", json=ASK)
                processes[0].process.kill()
                killed_at_s = time.monotonic()
            engine.script = type(engine.script)()
            async with asyncio.timeout(60.0):
                reply = refused
                while reply.status_code == 429:
                    await asyncio.sleep(0.2)
                    reply = await http.post(f"{urls[1]}/v1/chat/completions", json=ASK)
            free_s = time.monotonic() - killed_at_s
            async with asyncio.timeout(10.0):
                await engine.until(lambda: engine.running == 0)
        left = await leases_left(redis_alone, 35.0)
    report(
        "19",
        Finding(
            "gateways: one killed",
            f"kill -9 of a gateway with {CONCURRENT} streams, all that the key may have",
            "the other gateway refuses until then and admits within 30 s; the engine has aborted everything",
            f"refused with {refused.status_code}, admitted with {reply.status_code} after {free_s:.1f} s; "
            f"{left} leases left",
            refused.status_code == 429 and reply.status_code == 200 and free_s <= 31.0 and left == 0,
            {"free_s": free_s, "refused": refused.status_code, "left": left},
        ),
    )
