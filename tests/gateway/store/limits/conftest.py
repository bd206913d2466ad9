"""Both limiters, for the tests that each has to pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.store.memory_limits import Limiter
from tests.gateway.store.limits.limiter_halves import Half, Lua
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["memory", "redis"])
def limiter(request: pytest.FixtureRequest) -> Iterator[Half]:
    if request.param == "memory":
        yield Limiter()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with server.client() as client:
        yield Lua(client)
