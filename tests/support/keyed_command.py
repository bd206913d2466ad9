"""What the tests of keys in running gateways share: requests with a key, and the `tidegate keys` command."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.support.command import PATIENCE_S, ServeProcess, run_tidegate

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PEPPER = "0123456789abcdef0123456789abcdef"


@asynccontextmanager
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    """Every request on a connection of its own, so that the workers share them out."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=PATIENCE_S) as client:
        yield client


async def ask(client: httpx2.AsyncClient, url: str, key: str, **fields: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await client.post(f"{url}/v1/chat/completions", json={**CHAT, **fields}, headers=headers)


async def until_all(
    client: httpx2.AsyncClient, url: str, key: str, right: Callable[[httpx2.Response], bool], count: int = 1
) -> float:
    """Ask until this many answers in a row are right; seconds until the first of them."""
    begun = since = time.monotonic()
    found = 0
    answer: httpx2.Response | None = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while found < count:
                at = time.monotonic()
                answer = await ask(client, url, key)
                if not right(answer):
                    found = 0
                    continue
                since = since if found else at
                found += 1
    except TimeoutError:
        raise AssertionError(f"the last answer: {answer and (answer.status_code, answer.text)}") from None
    return since - begun


async def answered(client: httpx2.AsyncClient, url: str, key: str, status: int, count: int = 1) -> float:
    """As `until_all`, for a status. Who asks as often as this without a valid key is told 429 in place of 401."""
    meant = (401, 429) if status == 401 else (status,)
    return await until_all(client, url, key, lambda answer: answer.status_code in meant, count)


async def command(gateway: ServeProcess, *arguments: str) -> dict[str, Any]:
    """One `tidegate keys ...` on the running gateway's configuration, and what it reports."""
    code, out, err = await run_tidegate(*arguments, "--config", str(gateway.config), "--json", environ=ENVIRON)
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


ENVIRON = {"STATIC_KEY": "tgk-static-key-of-sufficient-length"}
"""For `serve` and for the commands, which read the same file."""


def keyed_sections(folder: Path, **sections: Any) -> dict[str, Any]:
    """Keys on record in this folder, and one of the configuration."""
    return {
        "auth": "keys",
        "database": f"sqlite:///{folder}/tidegate.db",
        "keys": {"static": [{"name": "ci", "key": {"env": "STATIC_KEY"}}]},
        "models": {"m": {"backend": "pool", "price": {"input": 1.0, "output": 2.0}}},
        **sections,
    }
