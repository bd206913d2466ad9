"""How far replicas are: what the configuration says first, then what opening connections shows."""

from __future__ import annotations

from typing import Any

import pytest

from backends.origin import Origin
from backends.pool import ConnectionPool
from gateway.config import Settings
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.types import Replica
from tests.support.http import ask
from tests.support.serving import serving, settings_for

LOOPS = ("uvloop",)
HERE: dict[str, Any] = {"region": "eu-west", "latency_ms": {"us-east": {"eu-west": 90.0}}}


async def test_a_measured_round_trip_takes_the_place_of_the_configured_one() -> None:
    """The engine is on loopback: whatever is measured, however slow this machine is, the start value is left."""
    async with FakeEngine(connection_close=True) as engine:
        backend = {"replicas": [{"url": engine.url, "region": "us-east"}]}
        settings = settings_for([], backend=backend, **HERE)
        async with serving(settings) as gateway:
            (replica,) = gateway.runtime.fleet.pools["pool"].replicas
            assert replica.speed.network_ms == 90.0
            for _ in range(4):
                assert (await ask(gateway, CHAT)).status == 200
            measured = replica.speed.network_ms
            assert measured != 90.0
            gateway.runtime.reload(settings)
            (kept,) = gateway.runtime.fleet.pools["pool"].replicas
            assert kept.speed.network_ms == measured


async def test_a_reload_goes_by_the_new_matrix_where_nothing_was_measured() -> None:
    backend = {"replicas": [{"url": "http://127.0.0.1:9", "region": "us-east"}]}
    async with serving(settings_for([], backend=backend, **HERE)) as gateway:
        new = {**HERE, "latency_ms": {"eu-west": {"us-east": 70.0}}}
        gateway.runtime.reload(settings_for([], backend=backend, **new))
        replica: Replica = gateway.runtime.fleet.pools["pool"].replicas[0]
        assert replica.speed.network_ms == 70.0


async def test_a_pool_tells_how_long_each_new_connection_took() -> None:
    told: list[float] = []
    async with FakeEngine() as engine:
        pool = ConnectionPool(Origin.parse(engine.url))
        pool.on_connect = told.append
        first = await pool.acquire(10.0)
        second = await pool.acquire(10.0)
        assert len(told) == 2
        assert all(0.0 < each < 60.0 for each in told)
        del first, second
        await pool.aclose(force=True)


async def test_a_region_that_the_matrix_does_not_have_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def settings(region: str | None, *regions: str | None) -> Settings:
        replicas = [{"url": f"http://127.0.0.1:{port}", "region": each} for port, each in enumerate(regions, 1)]
        return settings_for([], backend={"replicas": replicas}, region=region, latency_ms=HERE["latency_ms"])

    misspelt = "latency_ms has nothing between eu-west and us-eats: 100 ms until it is measured"
    async with serving(settings("eu-west", "us-eats", "eu-west", "us-east", None)) as gateway:
        assert caplog.messages == [misspelt]
        gateway.runtime.reload(settings("eu-west", "us-eats"))
        assert caplog.messages == [misspelt]
        gateway.runtime.reload(settings("eu-west", "us-east"))
        assert caplog.messages == [misspelt]
        gateway.runtime.reload(settings(None, "us-east"))
        assert caplog.messages[1:] == ["latency_ms is not used, since region does not say where this gateway is"]
