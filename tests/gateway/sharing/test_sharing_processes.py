"""Real gateway processes that route as one: over Redis, and the workers of one supervisor over its memory store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.gateway.sharing.sharing_worker import PATIENCE_S
from tests.support.command import ServeProcess, serve_process
from tests.support.redis_server import RedisServer

LOOPS = ("uvloop",)
ENGINES = 4
WARM = "The common beginning of many prompts, about the size of a good part of a cache. " * 100


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """Every request on a connection of its own."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=2 * PATIENCE_S) as opened:
        yield opened


async def chat(client: httpx2.AsyncClient, gateway: ServeProcess, prompt: str, **fields: Any) -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}
    response = await client.post(f"{await gateway.url()}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def cached(response: httpx2.Response) -> int:
    return int(response.headers["x-tidegate-predicted-cached-tokens"])


@contextlib.asynccontextmanager
async def engines(count: int = ENGINES) -> AsyncIterator[list[FakeEngine]]:
    async with AsyncExitStack() as running:
        # Engines that find everything cached, as warm ones would: what they say is learned.
        made = [FakeEngine(prompt_tokens=2000, cached_tokens=1990) for _ in range(count)]
        yield [await running.enter_async_context(each) for each in made]


class Gateways:
    """Gateway processes that share a Redis, each with a configuration folder of its own."""

    def __init__(self, folder: Path, fleet: list[FakeEngine], redis: RedisServer, running: AsyncExitStack) -> None:
        self._folder = folder
        self._urls = [engine.url for engine in fleet]
        self._redis = redis
        self._running = running
        self._made = 0

    async def start(self, **sections: Any) -> ServeProcess:
        self._made += 1
        folder = self._folder / f"gateway{self._made}"
        folder.mkdir(parents=True)
        made = serve_process(folder, self._urls, store=self._redis.url, redis={"timeout_ms": 500}, **sections)
        gateway = await self._running.enter_async_context(made)
        await gateway.url()
        return gateway


@pytest.fixture
async def fleet() -> AsyncIterator[list[FakeEngine]]:
    async with engines() as made:
        yield made


@pytest.fixture
async def gateways(tmp_path: Path, fleet: list[FakeEngine], redis_server: RedisServer) -> AsyncIterator[Gateways]:
    async with AsyncExitStack() as running:
        yield Gateways(tmp_path, fleet, redis_server, running)


async def until_cached(client: httpx2.AsyncClient, gateway: ServeProcess, prompt: str) -> httpx2.Response:
    """The first answer for which the gateway believed in a warm cache. New endings keep what is asked from counting."""
    number = 0
    async with asyncio.timeout(PATIENCE_S):
        while True:
            number += 1
            response = await chat(client, gateway, f"{prompt} {number}", max_tokens=1)
            if cached(response):
                return response


async def test_a_prefix_that_one_gateway_sent_is_warm_for_all(gateways: Gateways, client: httpx2.AsyncClient) -> None:
    first, *others = [await gateways.start() for _ in range(3)]
    warm = {(await chat(client, first, f"{WARM} {number}")).headers["x-tidegate-replica"] for number in range(10)}
    assert len(warm) == 1  # one after the other, so nothing speaks for another replica
    await asyncio.sleep(0.5)  # agreement takes milliseconds; the request below must be the first that they see
    for other in others:
        response = await chat(client, other, f"{WARM} from another gateway")
        assert cached(response) > 1000
        assert response.headers["x-tidegate-replica"] in warm


async def test_a_gateway_that_starts_later_knows_what_is_warm(gateways: Gateways, client: httpx2.AsyncClient) -> None:
    first = await gateways.start()
    warm = (await chat(client, first, WARM)).headers["x-tidegate-replica"]
    await asyncio.sleep(0.2)
    first.signal(signal.SIGKILL)
    await first.ended()
    response = await chat(client, await gateways.start(), WARM)
    assert cached(response) > 1000
    assert response.headers["x-tidegate-replica"] == warm


async def served_by(client: httpx2.AsyncClient, gateway: ServeProcess, count: int) -> set[str]:
    """Which replicas a gateway chooses for short prompts that nobody knows."""
    answers = [await chat(client, gateway, f"new {os.urandom(4).hex()}", max_tokens=1) for _ in range(count)]
    return {answer.headers["x-tidegate-replica"] for answer in answers}


async def test_the_work_of_a_killed_gateway_is_forgotten_within_seconds(
    tmp_path: Path, client: httpx2.AsyncClient, redis_server: RedisServer
) -> None:
    models = {"m": {"backend": "pool", "policy": "least_outstanding"}}
    async with engines(2) as fleet, AsyncExitStack() as stack:
        first = await Gateways(tmp_path / "first", fleet[:1], redis_server, stack).start(models=models)
        second = await Gateways(tmp_path / "second", fleet, redis_server, stack).start(models=models)
        async with asyncio.timeout(PATIENCE_S):
            both: set[str] = set()
            while len(both) < 2:
                both |= await served_by(client, second, 2)
        fleet[0].script = Behaviour(hang=True)
        running = [asyncio.create_task(chat(client, first, f"{WARM} {number}")) for number in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            while fleet[0].running < 5:  # noqa: ASYNC110 - it is at the other end of a socket
                await asyncio.sleep(0.02)
        fleet[0].script = Behaviour()
        await asyncio.sleep(3.0)  # longer than a silent worker is believed: heartbeats keep the work counted
        assert len(await served_by(client, second, 12)) == 1
        first.signal(signal.SIGKILL)
        killed_at = time.monotonic()
        await asyncio.gather(*running, return_exceptions=True)
        async with asyncio.timeout(PATIENCE_S):
            while len(await served_by(client, second, 6)) < 2:
                pass
        assert time.monotonic() - killed_at < 6.0  # 2 s and what a busy machine takes


async def test_the_workers_of_one_gateway_agree_without_redis(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with engines() as fleet, serve_process(tmp_path, [each.url for each in fleet], "--workers", "4") as gateway:
        await gateway.url()
        first = await chat(client, gateway, f"{WARM} 0")
        await asyncio.sleep(0.5)
        answers = [await chat(client, gateway, f"{WARM} {number}") for number in range(1, 30)]
        workers = await gateway.fleet(client)
        assert len(workers) == 4
        assert min(cached(answer) for answer in answers) > 1000, [cached(answer) for answer in answers]
        assert {answer.headers["x-tidegate-replica"] for answer in answers} == {first.headers["x-tidegate-replica"]}


async def test_a_worker_that_was_killed_comes_back_knowing(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with engines() as fleet, serve_process(tmp_path, [each.url for each in fleet], "--workers", "2") as gateway:
        await gateway.url()
        warm = (await chat(client, gateway, f"{WARM} 0")).headers["x-tidegate-replica"]
        await asyncio.sleep(0.3)
        for place in range(2):
            os.kill(int((await gateway.fleet(client))[place]["pid"]), signal.SIGKILL)
            await all_up(gateway, client, lambda workers: all(worker["up"] for worker in workers))
            await asyncio.sleep(1.0)  # a busy machine may begin to serve before all was taken in
        answers = [await chat(client, gateway, f"{WARM} {number}") for number in range(1, 10)]
        assert min(cached(answer) for answer in answers) > 1000, [cached(answer) for answer in answers]
        assert {answer.headers["x-tidegate-replica"] for answer in answers} == {warm}


async def all_up(
    gateway: ServeProcess, client: httpx2.AsyncClient, condition: Callable[[list[dict[str, Any]]], bool]
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.sleep(0.2)
        while not condition(await gateway.fleet(client)):  # noqa: ASYNC110 - it is in other processes
            await asyncio.sleep(0.05)


async def test_while_redis_is_away_requests_are_served_and_agreement_comes_back(
    tmp_path: Path, client: httpx2.AsyncClient
) -> None:
    async with engines() as fleet, AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        gateways = Gateways(tmp_path, fleet, redis, stack)
        first, second = await gateways.start(), await gateways.start()
        await chat(client, first, WARM)
        redis.kill()
        for number in range(5):
            await chat(client, first, f"alone {number} {WARM}")
            await chat(client, second, f"alone {number} {WARM}")
        for gateway in (first, second):
            await gateway.logged("other workers are not heard")
        redis.start()
        await first.logged("other workers are heard again")
        await second.logged("other workers are heard again")
        await chat(client, first, f"after {WARM}")
        response = await until_cached(client, second, f"after {WARM}")
        assert cached(response) > 1000
        for gateway in (first, second):
            assert sum("are not heard" in line for line in gateway.log) == 1
            assert not any("Traceback" in line for line in gateway.log)
