"""Clients of a mixed fleet behind a gateway: single requests, and traffic that goes on while things are done to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.engines import native
from tests.engines.gateway_process import MODEL, GatewayProcess, eventually, running_gateway
from tests.engines.replica import ADAPTERS, NAME, Replica

SEA = "Tell me all about the sea."
SEEN_WITHIN_S = 30.0
"""From something at an engine until the gateway shows it, on a busy machine."""
FLOWS_WITHIN_S = 120.0
"""For some more answers, on a busy machine."""


def entry(replica: Replica) -> dict[str, Any]:
    """A replica's part of the configuration."""
    settings: dict[str, Any] = {"url": replica.url, "engine": replica.kind.engine}
    if replica.kind.engine != "llamacpp":
        settings["kv_events"] = {"endpoint": f"ipc://{replica.sockets}/{replica.port}-kv", "topic": "kv-events"}
    return settings


def adapters_of(shown: Mapping[str, Any]) -> set[str]:
    """The names of the adapters that `/admin/fleet` says a replica holds."""
    return {adapter["name"] for adapter in shown["adapters"]}


def known(worker: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a worker shows every replica as serving, its load and its adapters."""
    return all(each["available"] and each["load"] and set(ADAPTERS) <= adapters_of(each) for each in worker.values())


@asynccontextmanager
async def gateway_for(
    folder: Path,
    fleet: Mapping[str, Replica],
    *,
    workers: int = 1,
    health: Mapping[str, float] | None = None,
    pool: Mapping[str, Any] | None = None,
) -> AsyncIterator[GatewayProcess]:
    """A gateway that has seen all of these replicas, with every worker. It looks often, or as `health` says."""
    often = {"load_interval_s": 0.2, "probe_interval_s": 0.5}
    with running_gateway(
        folder,
        engine="openai",
        upstream_model=NAME,
        replicas={name: entry(replica) for name, replica in fleet.items()},
        pool={"health": often if health is None else dict(health), **(pool or {})},
        workers=workers,
    ) as gateway:
        await eventually(
            lambda: len(shown := gateway.workers()) == workers and all(map(known, shown)),
            limit_s=SEEN_WITHIN_S,
            what="the gateway knows load and adapters of each replica",
        )
        yield gateway


async def chat(client: AsyncOpenAI, prompt: str, model: str = MODEL, max_tokens: int = 16) -> tuple[str, str]:
    """The replica that answered, and the answer."""
    raw = await client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0
    )
    return raw.headers["x-tidegate-replica"], raw.parse().choices[0].message.content or ""


async def stream(
    client: AsyncOpenAI, prompt: str, model: str = MODEL, max_tokens: int = native.ENDLESS
) -> tuple[str, AsyncStream[ChatCompletionChunk]]:
    """The replica that serves it, and the stream."""
    raw = await client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0, stream=True
    )
    return raw.headers["x-tidegate-replica"], raw.parse()


async def said(chunks: AsyncStream[ChatCompletionChunk]) -> tuple[str, str | None]:
    """The whole text of a stream, and its finish reason."""
    text, reason = "", None
    async for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


@dataclass(slots=True)
class Asked:
    """One request of the traffic, and what became of it. Times are `time.monotonic`."""

    model: str
    streamed: bool
    asked_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    replica: str = ""
    text: str = ""
    content_at: float | None = None
    """When the first of the text came; of a stream only."""
    error: openai.APIError | None = None


async def ask(client: AsyncOpenAI, streamed: bool, model: str = MODEL, max_tokens: int = 24) -> Asked:
    """Ask about the sea, and tell what came of it."""
    asked = Asked(model, streamed)
    try:
        if not streamed:
            asked.replica, asked.text = await chat(client, SEA, model, max_tokens)
        else:
            asked.replica, chunks = await stream(client, SEA, model, max_tokens)
            async for chunk in chunks:
                text = "".join(choice.delta.content or "" for choice in chunk.choices)
                if text and asked.content_at is None:
                    asked.content_at = time.monotonic()
                asked.text += text
    except openai.APIError as error:
        asked.error = error
    asked.ended_at = time.monotonic()
    return asked


@asynccontextmanager
async def traffic(gateway: GatewayProcess, clients: int, model: str = MODEL) -> AsyncIterator[list[Asked]]:
    """So many clients, every other one with streams, each asking again and again until the block ends.

    Requests that have ended are in the list. Who fails waits a moment, as clients do.
    """
    ended: list[Asked] = []
    stopping = asyncio.Event()

    async def ask_on(client: AsyncOpenAI, streamed: bool) -> None:
        while not stopping.is_set():
            asked = await ask(client, streamed, model)
            ended.append(asked)
            if asked.error is not None:
                await asyncio.sleep(0.2)

    async with gateway.async_sdk() as client, asyncio.TaskGroup() as group:
        for place in range(clients):
            group.create_task(ask_on(client, bool(place % 2)))
        try:
            yield ended
        finally:
            stopping.set()


async def more(ended: list[Asked], count: int, replica: str | None = None) -> None:
    """Wait for so many further answers, of this replica where one is named."""

    def good() -> int:
        return sum(each.error is None and replica in (None, each.replica) for each in ended)

    wanted = good() + count
    what = f"{count} more answers" + (f" of {replica}" if replica else "")
    await eventually(lambda: good() >= wanted, limit_s=FLOWS_WITHIN_S, what=what)


def failures(ended: list[Asked]) -> list[str]:
    """The requests that failed, in words."""
    return [f"{each.replica or 'nobody'}: {each.error!r} after {each.text!r}" for each in ended if each.error]
