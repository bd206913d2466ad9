"""A real replica joins a pool under load: its first request finds the common system prompt in its cache."""

from __future__ import annotations

import asyncio
import time

import httpx2
import pytest

from gateway.config import Settings
from tests.gateway.test_warm_up import FAST, Gateway, at_work, chat
from tests.gateway.test_workers import client
from tests.gateway.watch.test_watcher import until
from tests.llamacpp import LlamaCpp
from tests.support.serving import settings_for

__all__ = ["client"]  # the fixture

pytestmark = pytest.mark.engine

PROMPT = "The {} keeper counts every ship, names its flag, and writes down the hour of the tide. " * 8


def configured(urls: list[str], prefixes: int) -> Settings:
    model = {"m": {"backend": "pool", "upstream_model": "smollm2"}}
    return settings_for(
        urls, engine="llamacpp", models=model, backend={"health": FAST, "warm_up": {"prefixes": prefixes}}
    )


async def load_on(gateway: Gateway, system: str, ended: list[str]) -> None:
    """One client after the other, until cancelled; where each answer came from."""
    number = 0
    while True:
        number += 1
        answer = await gateway.ask(chat(f"What does ship {number} carry?", system=system, max_tokens=2))
        ended.append(answer["replica"])


@pytest.mark.parametrize(("prefixes", "word"), [(8, "patient"), (0, "hurried")])
async def test_a_new_replica_has_the_common_prompt_before_its_first_request(
    llamacpp_pair: tuple[LlamaCpp, LlamaCpp], client: httpx2.AsyncClient, prefixes: int, word: str
) -> None:
    old, new = llamacpp_pair
    system = PROMPT.replace("{}", word)
    async with at_work(configured([old.url], prefixes), client) as gateway:
        ended: list[str] = []
        load = asyncio.create_task(load_on(gateway, system, ended))
        try:
            await until(lambda: len(ended) >= 4, within_s=60)
            gateway.reload(configured([old.url, new.url], prefixes))
            first, joined = gateway.replicas
            await until(lambda: joined.unavailable_reason(time.monotonic()) is None, within_s=60)
            first.draining = True
            await until(lambda: "pool-1" in ended, within_s=60)
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        shown = [each for each in gateway.serving.records if each.replica == "pool-1"]
        usage = shown[0].usage
        assert usage is not None
        assert usage.cached_tokens is not None
        assert (usage.cached_tokens > 100) == (prefixes > 0)
