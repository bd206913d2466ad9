"""A real replica is killed in the middle of its streams, and nobody notices: the gateway has another one go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from backends.dialects.protocol import CHAT
from tests.engines.continuing import Asked
from tests.engines.gateway_process import MODEL, eventually, running_gateway
from tests.engines.replica import NAME, RUNNING_LIMIT, Replica
from tests.engines.tap import tapped
from tests.llamacpp import running_llamacpp

pytestmark = [pytest.mark.engine, pytest.mark.quiet]

BEFORE = 3
"""Pieces of text that every client has when the replica is killed."""
PROMPTS = ["the sea", "rain", "a river", "snow", "the wind", "clouds", "a lake", "ice"]


def messages(prompt: str) -> list[Any]:
    return [{"role": "system", "content": "You are terse."}, {"role": "user", "content": f"Describe {prompt}."}]


@dataclass
class Told:
    """What one client has got."""

    max_tokens: int
    text: str = ""
    pieces: int = 0
    ids: frozenset[str] = frozenset()
    roles: int = 0
    finish_reason: str | None = None
    completion_tokens: int = 0


async def listen(client: AsyncOpenAI, prompt: str, told: Told) -> None:
    """Read a stream to its end. Raises what the SDK raises."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=messages(prompt),
        max_tokens=told.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        told.ids |= {chunk.id}
        if chunk.usage is not None:
            told.completion_tokens += chunk.usage.completion_tokens
        for choice in chunk.choices:
            told.roles += choice.delta.role is not None
            told.text += choice.delta.content or ""
            told.pieces += bool(choice.delta.content)
            told.finish_reason = choice.finish_reason or told.finish_reason


async def break_off(
    folder: Path,
    replicas: Mapping[str, Any],
    leaving: str,
    kill: Callable[[], object],
    told: Mapping[str, Told],
    name: str,
) -> None:
    """Have every stream begin at one replica, kill it when all have text, and read them to their ends elsewhere."""
    model = {"backend": "pool", "upstream_model": name, "continuation": True}
    with running_gateway(
        folder, engine="llamacpp", upstream_model=name, replicas=replicas, models={MODEL: model}
    ) as gateway:
        others = [f"/admin/replicas/pool/{each}" for each in replicas if each != leaving]
        for other in others:
            (await asyncio.to_thread(gateway.admin, "POST", f"{other}/drain")).raise_for_status()
        async with gateway.async_sdk() as client, asyncio.TaskGroup() as group:
            for prompt, each in told.items():
                group.create_task(listen(client, prompt, each))
            await eventually(
                lambda: all(each.pieces >= BEFORE for each in told.values()), limit_s=120, what="all have text"
            )
            for other in others:
                (await asyncio.to_thread(gateway.admin, "POST", f"{other}/undrain")).raise_for_status()
            await asyncio.to_thread(kill)


async def check(told: Mapping[str, Told], bodies: list[Any], fresh: Asked, *, rounded: int = 0) -> None:
    """Every client has the text that the dead replica had sent, and right after it what a fresh request gives.

    So many may have other words after it: what is computed in a batch with others can be rounded otherwise.
    """
    continued = {body["messages"][1]["content"]: body for body in bodies}
    assert len(continued) == len(told), "every stream was open when the replica was killed"
    other: list[tuple[str, str, str]] = []
    for prompt, each in told.items():
        body = continued[f"Describe {prompt}."]
        before = body["messages"][-1]["content"]
        asked = replace(fresh, messages=messages(prompt))
        after = await asyncio.to_thread(asked.completed, before, body["max_tokens"])
        assert each.text.startswith(before)
        if each.text != before + after:
            other.append((before, each.text, after))
        assert (len(each.ids), each.roles, each.finish_reason) == (1, 1, "length")
        assert each.completion_tokens == each.max_tokens
    assert len(other) <= rounded, other


async def test_streams_of_a_killed_replica_go_on_at_another(tmp_path: Path) -> None:
    told = {prompt: Told(24) for prompt in PROMPTS}
    with (
        running_llamacpp(tmp_path / "first.log", slots=len(told)) as first,
        running_llamacpp(tmp_path / "second.log", slots=len(told)) as second,
    ):
        async with tapped(second.url) as tap:
            replicas = {"first": first.url, "second": tap.url}
            kill = partial(os.kill, first.pid, signal.SIGKILL)
            await break_off(tmp_path / "gateway", replicas, "first", kill, told, "smollm2")
        fresh = Asked(second.url, "llamacpp", "smollm2", [], 0, {})
        await check(told, tap.posted(CHAT), fresh, rounded=2)


@pytest.mark.slow
@pytest.mark.parametrize("leaving", ["sglang-2", "vllm", "llamacpp"])
async def test_streams_of_a_killed_engine_go_on_at_engines_of_other_kinds(
    mixed_fleet: dict[str, Replica], tmp_path: Path, leaving: str
) -> None:
    told = {prompt: Told(1000) for prompt in PROMPTS[:RUNNING_LIMIT]}
    async with AsyncExitStack() as taps:
        tapping = {
            name: await taps.enter_async_context(tapped(replica.url))
            for name, replica in mixed_fleet.items()
            if name != leaving
        }
        replicas = {
            name: {"url": tapping[name].url if name in tapping else replica.url, "engine": replica.kind.engine}
            for name, replica in mixed_fleet.items()
        }
        await break_off(tmp_path / "gateway", replicas, leaving, mixed_fleet[leaving].kill, told, NAME)
    bodies = [body for tap in tapping.values() for body in tap.posted(CHAT)]
    await check(told, bodies, Asked(mixed_fleet["sglang-1"].url, "sglang", NAME, [], 0, {}))
