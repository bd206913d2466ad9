"""One bare client before one gateway before one fake engine, and the short deadlines that such tests use."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.support.client import RawClient, connect
from tests.support.serving import Serving, serving, settings_for

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**ASK, "stream": True}
SHORT: dict[str, Any] = {
    "header_timeout_s": 0.3,
    "body_timeout_s": 0.3,
    "write_stall_timeout_s": 0.5,
    "keep_alive_s": 0.3,
}
LATE_S = 0.6
"""A deadline is noticed by a sweep four times a second, on a ticker of ten; the rest is a busy machine."""


both_edges = pytest.mark.parametrize("edge", ["protocol", "asgi"])


@contextlib.asynccontextmanager
async def gateway_of(engine: FakeEngine, edge: str, **server: Any) -> AsyncIterator[Serving]:
    settings = settings_for([engine.url], edge=edge, server=server, backend={"connections": {"idle_s": 1}})
    async with serving(settings) as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def talking(edge: str, script: dict[str, Any] | None = None, **server: Any) -> AsyncIterator[Talk]:
    async with FakeEngine(**(script or {})) as engine, gateway_of(engine, edge, **server) as gateway:
        async with connect(gateway.host, gateway.port) as client:
            yield Talk(engine, gateway, client)
        assert gateway.runtime.body_budget.used_bytes == 0 or gateway.listener.server_state.connections


class Talk:
    """A model server, a gateway and one client of it."""

    def __init__(self, engine: FakeEngine, gateway: Serving, client: RawClient) -> None:
        self.engine = engine
        self.gateway = gateway
        self.client = client

    async def refused(self, status: int) -> Reply:
        """The gateway answers with this status in OpenAI's shape, and closes."""
        reply = await self.client.reply()
        assert reply.status == status, reply
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}
        assert reply.headers["connection"] == "close"
        assert reply.headers["x-request-id"]
        assert await self.client.rest() == b""
        return reply

    def assert_nothing_reached_the_engine(self) -> None:
        assert self.engine.accepted == 0
