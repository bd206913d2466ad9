"""Asks an engine in its own words, with nothing of Tidegate between."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.engines.replica import Replica

CHAT = "/v1/chat/completions"
TIMEOUT_S = 120.0
ENDLESS = 6000
"""Tokens that no test waits for."""


@asynccontextmanager
async def client_of(replica: Replica) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(
        base_url=replica.url,
        trust_env=False,
        timeout=TIMEOUT_S,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
    ) as client:
        yield client


def body(
    replica: Replica, prompt: str, adapter: str | None = None, max_tokens: int = 16, **fields: Any
) -> dict[str, Any]:
    """A chat request, greedy and as long as it says, addressed the engine's way; `fields` add and override."""
    return {
        **replica.kind.addressed(adapter),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        **fields,
    }


async def ask(replica: Replica, prompt: str, adapter: str | None = None, **fields: Any) -> httpx2.Response:
    """A whole answer, whatever its status."""
    async with client_of(replica) as client:
        return await client.post(CHAT, json=body(replica, prompt, adapter, **fields))


async def text(replica: Replica, prompt: str, adapter: str | None = None, **fields: Any) -> str:
    """What the engine says. Raises when it refuses."""
    answer = await ask(replica, prompt, adapter, **fields)
    content: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
    return content


@dataclass(slots=True)
class Stream:
    """An event stream under way: what came so far."""

    status: int
    pieces: int = 0
    """Events with content."""
    finish_reason: str | None = None
    errors: list[Any] = field(default_factory=list)
    done: bool = False
    """`[DONE]` came."""
    _answer: httpx2.Response | None = None
    _lines: AsyncIterator[str] | None = None

    async def next(self) -> bool:
        """Read on to the next event; False at the end. Raises `httpx2.TransportError` where it breaks."""
        assert self._lines is not None
        async for line in self._lines:
            if line.startswith("data: "):
                self._take(line[6:])
                return True
        return False

    async def rest(self) -> None:
        while await self.next():
            pass

    async def close(self) -> None:
        """Drop it before its end."""
        assert self._answer is not None
        await self._answer.aclose()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.errors.append(event["error"])
        for choice in event.get("choices", ()):
            self.pieces += bool(choice["delta"].get("content"))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


@asynccontextmanager
async def streaming(replica: Replica, prompt: str, adapter: str | None = None, **fields: Any) -> AsyncIterator[Stream]:
    """A stream, open for the length of the block and dropped at its end."""
    request = body(replica, prompt, adapter, **{"max_tokens": ENDLESS, "stream": True, **fields})
    async with client_of(replica) as client, client.stream("POST", CHAT, json=request) as answer:
        yield Stream(answer.status_code, _answer=answer, _lines=answer.aiter_lines())
