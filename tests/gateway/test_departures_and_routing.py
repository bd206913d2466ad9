"""What routing learns from clients that leave."""

from __future__ import annotations

from loadtests.engine import FakeEngine
from routing.speed import Speed
from routing.work import NOTHING
from tests.support.client import connect, post, until
from tests.support.serving import serving, settings_for

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def test_a_client_that_leaves_before_any_content_teaches_nothing_about_the_replica() -> None:
    """Else forty impatient clients would make a replica look a hundred times faster than it is."""
    async with FakeEngine(hang=True) as engine, serving(settings_for([engine.url])) as gateway:
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        for stream in (False, True, True):
            async with connect(gateway.host, gateway.port) as client:
                await client.send(post("/v1/chat/completions", {**BODY, "stream": stream}))
                await engine.received()
                client.leave("close")
                await until(lambda: not gateway.runtime.in_flight)
        assert replica.work.own == NOTHING
        assert not gateway.runtime.fleet.pools["pool"].routing.flights
        network_ms = replica.speed.network_ms
        rtt_ms = replica.speed.rtt_ms
        assert replica.speed == Speed(rtt_ms=rtt_ms, network_ms=network_ms), "only how long connecting took"
