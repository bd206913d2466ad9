"""What the gateway knows of two real replicas, and what operators do with them: the short pass that CI can afford."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.engines.gateway_process import MODEL, GatewayProcess, eventually, running_gateway
from tests.llamacpp import LlamaCpp

pytestmark = pytest.mark.engine


@pytest.fixture
def gateway(
    llamacpp_pair: tuple[LlamaCpp, LlamaCpp], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    replicas = {f"r{number}": replica.url for number, replica in enumerate(llamacpp_pair)}
    folder = tmp_path_factory.mktemp("watched")
    with running_gateway(folder, engine="llamacpp", upstream_model="smollm2", replicas=replicas, workers=2) as gateway:
        yield gateway


def long_stream(client: Any, tokens: int = 400) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me all about the sea."}],
        max_tokens=tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


async def test_load_and_epoch_are_the_engines_own(
    gateway: GatewayProcess, llamacpp_pair: tuple[LlamaCpp, LlamaCpp]
) -> None:
    slots = httpx2.get(f"{llamacpp_pair[0].url}/slots", trust_env=False, timeout=30).json()
    async with gateway.async_sdk() as client:
        streams = [await long_stream(client) for _ in range(2)]
        shown = await eventually(
            lambda: next(
                (
                    workers
                    for workers in [gateway.workers()]
                    if all(
                        sum(each["load"]["running"] for each in one.values() if each["load"]) == 2 for one in workers
                    )
                ),
                None,
            ),
            limit_s=10,
            what="both workers show the engines' two running requests",
        )
        for stream in streams:
            await stream.close()
    for worker in shown:
        assert {each["health"] for each in worker.values()} == {"healthy"}
        assert all(
            each["load"]["kv_capacity_tokens"] == sum(slot["n_ctx"] for slot in slots) for each in worker.values()
        )
        assert len({each["epoch"] for each in worker.values()}) == 2  # two processes, two lives
        assert all(each["info"]["models"] for each in worker.values())


async def test_a_drained_replica_finishes_and_gets_nothing_new(gateway: GatewayProcess) -> None:
    async with gateway.async_sdk() as client:
        # Seconds of work for the engines, which is longer than it takes to drain and to look.
        streams = [await long_stream(client, 100) for _ in range(4)]
        drained = await asyncio.to_thread(gateway.command, "drain", "pool/r0", "--wait", "60", "--json")
        whole = [[chunk async for chunk in stream][-1] for stream in streams]
        assert json.loads(drained.stdout.splitlines()[-1])["empty"] is True
        assert drained.returncode == 0
        assert all(chunk.choices[0].finish_reason == "length" for chunk in whole)
        for _ in range(4):
            answer = await client.chat.completions.with_raw_response.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=2
            )
            assert answer.headers["x-tidegate-replica"] == "r1"
        back = await asyncio.to_thread(gateway.command, "undrain", "pool/r0")
        assert back.returncode == 0
        assert all(not worker["r0"]["draining"] for worker in gateway.workers())
