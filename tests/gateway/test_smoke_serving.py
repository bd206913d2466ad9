"""The shared serving fixture works over both edges."""

from __future__ import annotations

import httpx2
import pytest

from loadtests.engine import FakeEngine
from tests.support.serving import serving, settings_for


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_plain_request_is_answered_and_recorded(edge: str) -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{gateway.url}/v1/chat/completions", json={"model": "m", "messages": []})
        assert answer.status_code == 200
        assert answer.headers["x-tidegate-replica"] == "pool-0"
        (record,) = await gateway.settled()
        assert record.outcome == "completed"
