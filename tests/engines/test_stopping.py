"""What the engines do when their owner stops them (SIGTERM), without the gateway: no two of them do the same."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import httpx2
import pytest

from tests.engines.native import Stream, ask, client_of, streaming, text
from tests.engines.replica import Replica

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEA = "Tell me all about the sea."


async def under_way(stream: Stream) -> None:
    for _ in range(10):
        assert await stream.next()


async def gone(replica: Replica) -> None:
    await asyncio.to_thread(replica.process.wait, replica.kind.stop_limit_s)


async def test_sglang_finishes_everything_and_takes_new_work_until_then(sglang_replica: Replica) -> None:
    """Only /ready and /health say that it leaves, both at once."""
    async with client_of(sglang_replica) as client, streaming(sglang_replica, SEA, max_tokens=500) as stream:
        await under_way(stream)
        sglang_replica.terminate()
        for path in ("/ready", "/health"):
            assert (await client.get(path)).status_code == 503
        assert await text(sglang_replica, SEA, max_tokens=4)
        await stream.rest()
        assert (stream.finish_reason, stream.done) == ("length", True)
    await gone(sglang_replica)


async def test_vllm_closes_its_door_and_finishes_no_stream(vllm_replica: Replica) -> None:
    """It leaves them hanging for as long as the client stays, or cuts them, with an error event or without."""
    async with streaming(vllm_replica, SEA) as stream:
        await under_way(stream)
        vllm_replica.terminate()
        with pytest.raises(httpx2.ConnectError):
            await refused(vllm_replica)
        with suppress(TimeoutError, httpx2.TransportError):
            await asyncio.wait_for(stream.rest(), 5)
        assert stream.finish_reason in (None, "abort")  # which the gateway takes for no end
        assert stream.finish_reason == "abort" or stream.errors or not stream.done
    await gone(vllm_replica)


async def test_llamacpp_closes_its_door_and_pings_for_half_a_minute(llamacpp_tiny: Replica) -> None:
    """Then it breaks the connection: no finish reason, no `[DONE]`."""
    async with streaming(llamacpp_tiny, SEA) as stream:
        await under_way(stream)
        llamacpp_tiny.terminate()
        with pytest.raises(httpx2.ConnectError):
            await refused(llamacpp_tiny)
        with pytest.raises(httpx2.RemoteProtocolError):
            await stream.rest()
        assert (stream.finish_reason, stream.done, stream.errors) == (None, False, [])
    await gone(llamacpp_tiny)


async def refused(replica: Replica) -> None:
    """Ask until the door is closed, and raise that. What becomes of questions before does not matter here."""
    async with asyncio.timeout(5):
        while True:
            try:
                await ask(replica, SEA, max_tokens=1)
            except httpx2.ConnectError:
                raise
            except httpx2.TransportError:
                pass
