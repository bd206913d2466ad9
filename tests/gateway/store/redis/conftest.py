"""Clients of a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from gateway.store.redis.client import RedisClient
from tests.gateway.store.redis.asking import client_of


@pytest.fixture
async def make_client() -> AsyncIterator[Callable[..., RedisClient]]:
    """Makes clients that are closed at the end: `make_client(url, timeout_s=…)`."""
    made: list[RedisClient] = []

    def make(url: str, **settings: object) -> RedisClient:
        made.append(client_of(url, **settings))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()
