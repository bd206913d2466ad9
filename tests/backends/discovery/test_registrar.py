"""The client of registrations, against a stand-in over a real socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.discovery.member import Member
from backends.discovery.registrar import (
    AgentReport,
    GatewayAway,
    PoolReport,
    Registrar,
    RegistrationRefused,
)
from tests.support.registrations import StandIn

MEMBER = Member(url="http://10.0.0.5:30000", name="r0", weight=2.0)


async def test_a_replica_is_registered_and_taken_out() -> None:
    async with StandIn(in_flight=3) as gateway, Registrar(gateway.url, gateway.token) as registrar:
        lease = await registrar.put("a pool/x", MEMBER)
        assert (lease.ttl_s, lease.renew_in_s, lease.in_flight, lease.empty) == (1.0, 0.2, 3, False)
        assert gateway.puts == [{"url": "http://10.0.0.5:30000", "name": "r0", "weight": 2.0}]
        assert gateway.heads[0].startswith("PUT /admin/registrations/a%20pool%2Fx/r0 HTTP/1.1\r\n")
        await registrar.remove("pool", "r0")
        assert gateway.members == {}


async def test_no_connection_is_kept_between_two_questions() -> None:
    """A gateway's admin listener has room for 200, and a fleet may have more replicas that register themselves."""
    async with StandIn() as gateway, Registrar(gateway.url, gateway.token) as registrar:
        for _ in range(3):
            await registrar.put("pool", MEMBER)
            await gateway.until(lambda: gateway.connections == 0)
        gateway.refusal = (403, "registration_refused", "Not here.")
        with pytest.raises(RegistrationRefused):
            await registrar.put("pool", MEMBER)
        await gateway.until(lambda: gateway.connections == 0)


async def test_an_agents_report_is_answered_with_orders() -> None:
    async with StandIn() as gateway, Registrar(gateway.url, gateway.token) as registrar:
        orders = await registrar.report("gpu1", AgentReport(pools={"pool": PoolReport(launched=2, ready=1, max=4)}))
        assert (orders.pools["pool"].count, orders.pools["pool"].leave, orders.pools["pool"].roll) == (3, ("a",), 1)
        assert gateway.reports == [{"pools": {"pool": {"launched": 2, "ready": 1, "max": 4, "roll": 0}}}]


async def test_a_refusal_has_its_code_and_message() -> None:
    async with StandIn(refusal=(403, "registration_refused", "Not here.")) as gateway:
        async with Registrar(gateway.url, gateway.token) as registrar:
            with pytest.raises(RegistrationRefused, match="Not here") as caught:
                await registrar.put("pool", MEMBER)
        assert (caught.value.status, caught.value.code) == (403, "registration_refused")


async def test_taking_out_what_is_not_there_is_done() -> None:
    async with (
        StandIn(refusal=(404, "unknown_pool", "No.")) as gateway,
        Registrar(gateway.url, gateway.token) as registrar,
    ):
        await registrar.remove("pool", "r0")


async def test_a_token_that_is_not_known_is_a_refusal() -> None:
    async with StandIn() as gateway, Registrar(gateway.url, None) as registrar:
        with pytest.raises(RegistrationRefused) as caught:
            await registrar.put("pool", MEMBER)
        assert caught.value.status == 401
        assert "authorization" not in gateway.heads[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"ttl_s": "x"}'[:-1],
        b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 302 X\r\nlocation: /admin/elsewhere\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n" + b" " * 2_000_000,
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
async def test_what_does_not_answer_as_a_gateway_is_away(raw: bytes) -> None:
    async with StandIn(raw=raw) as gateway, Registrar(gateway.url, gateway.token) as registrar:
        with pytest.raises(GatewayAway) as caught:
            await registrar.put("pool", MEMBER)
        assert caught.value.address == gateway.url
        assert gateway.asked == 1  # no redirect is followed


async def test_nobody_there_and_silence_are_away() -> None:
    gateway = StandIn()
    await gateway.start()
    await gateway.stop()
    async with Registrar(gateway.url, gateway.token) as registrar:
        with pytest.raises(GatewayAway, match=f"no gateway answers at {gateway.url}: "):
            await registrar.put("pool", MEMBER)
    async with (
        StandIn(raw=b"HTTP/1.1 200 OK\r\n") as silent,
        Registrar(silent.url, silent.token, timeout_s=0.2) as registrar,
    ):
        with pytest.raises(GatewayAway, match=r"no answer within 0.2 s"):
            await registrar.put("pool", MEMBER)


async def test_proxies_of_the_environment_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with StandIn() as gateway, Registrar(gateway.url, gateway.token) as registrar:
        await registrar.put("pool", MEMBER)


async def test_a_gateway_that_says_zero_is_not_asked_without_a_pause() -> None:
    async with StandIn(renew_in_s=0.0) as gateway, Registrar(gateway.url, gateway.token) as registrar:
        assert (await registrar.put("pool", MEMBER)).renew_in_s == 0.1


@pytest.mark.parametrize("url", ["127.0.0.1:7401", "http://", "http://h:0", "http://h/x", "http://u:p@h", "ftp://h"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the address of an admin listener"):
        Registrar(url, None)


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    with pytest.raises(OSError, match=r"(?i)certificate|PEM|X509"):
        Registrar("https://127.0.0.1:7401", None, file)


async def test_without_a_name_nothing_is_sent() -> None:
    async with StandIn() as gateway, Registrar(gateway.url, gateway.token) as registrar:
        with pytest.raises(ValueError, match="has no name"):
            await registrar.put("pool", Member(url="http://10.0.0.5:1"))
        assert gateway.asked == 0
