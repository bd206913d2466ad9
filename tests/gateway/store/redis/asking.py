"""What the tests of the client ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from gateway.store.redis.address import parse_address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.scripts import script

PATIENCE_S = 15.0
ECHO = script("echo", "return ARGV[1]")
APPEND = script("append", "return redis.call('RPUSH', KEYS[1], ARGV[1])")
COUNT = script("count", "return redis.call('INCR', KEYS[1])")


def client_of(url: str, **settings: Any) -> RedisClient:
    """Patient, unless the test is about time."""
    return RedisClient(parse_address(url), **{"timeout_s": PATIENCE_S, **settings})


async def until(holds: Callable[[], object], within_s: float = PATIENCE_S) -> float:
    """Wait until it holds; how many seconds that took."""
    began_at = time.monotonic()
    while not holds():
        assert time.monotonic() - began_at < within_s, "it did not come to hold in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - began_at


async def failure(client: RedisClient) -> Exception | None:
    """How one call fails; None if it does not."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await client.run(ECHO, (), ("x",))
    except Exception as error:
        return error
    return None
