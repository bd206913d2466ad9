"""A server that says nothing of itself and refuses what is too much: the gateway stops sending that, and queues."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT as BODY
from routing.types import Replica
from tests.support.http import ask
from tests.support.serving import serving, settings_for

pytestmark = pytest.mark.alone

CAPACITY = 8
CLIENTS = 40
TAKES_S = 0.05


def known(replica: Replica) -> int:
    return replica.meter.capacity.requests or 0


async def test_after_the_first_refusals_a_replica_gets_what_it_takes_and_the_rest_waits() -> None:
    refused_at: list[float] = []
    async with FakeEngine(record=False) as engine:

        def pace(_: bytes, behaviour: Behaviour, at: float) -> Behaviour:
            if engine.running > CAPACITY:
                refused_at.append(time.monotonic())
                return replace(behaviour, status=429)
            return replace(behaviour, delay_head_s=TAKES_S)

        engine.pace = pace
        async with serving(settings_for([engine.url])) as gateway:
            (replica,) = gateway.runtime.fleet.pools["pool"].replicas
            assert not known(replica)
            ends_at = time.monotonic() + 7
            statuses: list[tuple[float, int]] = []

            async def client() -> None:
                while time.monotonic() < ends_at:
                    reply = await ask(gateway, BODY)
                    statuses.append((time.monotonic(), reply.status))
                    if reply.status != 200:
                        await asyncio.sleep(0.2)

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            assert replica.meter.capacity.source == "learned"
            assert CAPACITY / 2 <= known(replica) <= CAPACITY
            assert replica.in_flight == 0
            settled_from = ends_at - 2.5
            assert refused_at
            assert not [at for at in refused_at if at > settled_from]
            late = [status for at, status in statuses if at > settled_from]
            assert set(late) == {200}
            assert len(late) >= 2.5 / TAKES_S * CAPACITY / 2 / 4  # a quarter of what it could, on a busy machine
