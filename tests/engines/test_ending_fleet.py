"""A replica of the mixed fleet is stopped or killed under load: nothing is lost that could have gone elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.engines import native
from tests.engines.clients import SEA, SEEN_WITHIN_S, Asked, ask, failures, gateway_for, more, traffic
from tests.engines.gateway_process import eventually
from tests.engines.replica import RUNNING_LIMIT, Replica

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROBED_S = 2.0
"""The gateway's default: how often it asks a replica whether it is there."""


def lost(ended: list[Asked], stopped_at: float) -> list[str]:
    """The requests that had no content when the replica was stopped, and failed all the same.

    A whole answer has content only when it is complete. What a stream gets within half a second may have been under
    way.
    """
    return failures(
        [
            each
            for each in ended
            if each.error is not None and (each.content_at is None or each.content_at > stopped_at + 0.5)
        ]
    )


@pytest.mark.parametrize("leaving", ["sglang-2", "vllm", "llamacpp"])
@pytest.mark.parametrize("end", [Replica.terminate, Replica.kill], ids=["SIGTERM", "SIGKILL"])
async def test_an_ended_replica_breaks_only_streams_that_had_begun(
    mixed_fleet: dict[str, Replica], tmp_path: Path, leaving: str, end: Callable[[Replica], None]
) -> None:
    """Streams and whole answers, all short. SGLang breaks nothing when it is told to stop."""
    expected = await native.text(mixed_fleet["llamacpp"], SEA, max_tokens=24)
    replica = mixed_fleet[leaving]
    async with gateway_for(tmp_path, mixed_fleet, health={}) as gateway, traffic(gateway, clients=12) as ended:
        await more(ended, 20)
        await more(ended, 2, leaving)
        stopped_at = time.monotonic()
        await asyncio.to_thread(end, replica)
        await eventually(
            lambda: not gateway.replicas()[leaving]["available"], limit_s=SEEN_WITHIN_S, what="it gets no new work"
        )
        away_at = time.monotonic()
        if replica.kind.engine == "sglang":  # the only one that ends when its requests have
            await asyncio.to_thread(replica.process.wait, replica.kind.stop_limit_s)
        await more(ended, 20)
    replica.kill()
    assert lost(ended, stopped_at) == []
    assert {each.text for each in ended if each.error is None} == {expected}
    assert {each.replica for each in ended if each.error is not None} <= {leaving}
    assert {each.replica for each in ended if each.asked_at > away_at} <= set(mixed_fleet) - {leaving}
    if leaving == "sglang-2" and end is Replica.terminate:
        assert failures(ended) == []


@pytest.mark.parametrize("leaving", ["vllm", "llamacpp"])
async def test_what_waits_in_a_replica_that_is_told_to_stop_moves_soon(
    mixed_fleet: dict[str, Replica], tmp_path: Path, leaving: str
) -> None:
    """Neither of these engines ends its requests on SIGTERM; that its door is closed is seen by the next probe."""
    expected = await native.text(mixed_fleet["llamacpp"], SEA, max_tokens=24)
    replica, other = mixed_fleet[leaving], mixed_fleet["sglang-1"]
    async with (
        gateway_for(tmp_path, {leaving: replica, "sglang-1": other}, health={"load_interval_s": 0.2}) as gateway,
        gateway.async_sdk() as client,
        asyncio.TaskGroup() as group,
    ):
        # Full with requests that came past the gateway, so that nothing of its own can begin there.
        occupying = [group.create_task(occupy(replica)) for _ in range(RUNNING_LIMIT)]
        await eventually(lambda: replica.counts().running == RUNNING_LIMIT, limit_s=SEEN_WITHIN_S, what="it is full")
        asking = [group.create_task(ask(client, bool(place % 2))) for place in range(8)]
        await eventually(
            lambda: gateway.replicas()["sglang-1"]["in_flight"] == 0 and gateway.replicas()[leaving]["in_flight"] > 1,
            limit_s=SEEN_WITHIN_S,
            what="only those wait that have met the full replica",
        )
        waiting = [task for task in asking if not task.done()]
        stopped_at = time.monotonic()
        replica.terminate()
        ended = await asyncio.gather(*waiting)
        took_s = max(each.ended_at for each in ended) - stopped_at
        for task in occupying:
            task.cancel()
    assert len(ended) > 1
    assert failures(ended) == []
    assert {(each.replica, each.text) for each in ended} == {("sglang-1", expected)}
    assert took_s < PROBED_S + 4


async def occupy(replica: Replica) -> None:
    """A stream without end, read until this is cancelled or the replica breaks it."""
    with suppress(httpx2.TransportError):
        async with native.streaming(replica, SEA) as begun:
            while await begun.next():
                pass
