"""Replicas by name, with a real name server that a test tells what to say."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from backends.discovery.dns import DnsSource
from backends.discovery.member import Member
from tests.support.dns_server import ADDRESS, REFUSED, SERVFAIL, DnsServer

SERVICE = "_sglang._tcp.models.test"


@dataclass
class Told:
    """What a source has told."""

    members: list[list[Member]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tell(self, members: Sequence[Member]) -> None:
        self.members.append(list(members))

    def trouble(self, why: str) -> None:
        self.problems.append(why)

    async def look(self, source: DnsSource) -> float:
        return await source.look(self.tell, self.trouble)

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.members[-1]]


@pytest.fixture
async def names() -> AsyncIterator[DnsServer]:
    async with DnsServer(port=0) as server:
        yield server


def srv_source(names: DnsServer, **settings: object) -> DnsSource:
    return DnsSource(
        SERVICE,
        record="srv",
        servers=(ADDRESS,),
        server_port=names.port,
        timeout_s=settings.pop("timeout_s", 10.0),  # type: ignore[arg-type]
        **settings,  # type: ignore[arg-type]
    )


def resolving(*answers: Sequence[str] | Exception) -> DnsSource:
    """A source whose resolver says these in turn, the last one for ever."""
    left = list(answers)

    def look_up(host: str, port: int) -> Sequence[str]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return DnsSource("pods.test", port=30000, timeout_s=10.0, look_up=look_up)


async def test_addresses_of_the_systems_resolver_are_members() -> None:
    told = Told()
    pause_s = await told.look(DnsSource("localhost", port=30000, interval_s=7.0, timeout_s=10.0))
    assert pause_s == 7.0
    assert "http://127.0.0.1:30000" in told.urls
    assert told.members[-1][0].name == "127.0.0.1-30000"


async def test_addresses_come_once_and_in_the_order_of_their_numbers() -> None:
    told = Told()
    await told.look(resolving(["10.0.0.10", "2001:db8::1", "10.0.0.9", "10.0.0.10", "::ffff:10.0.0.9"]))
    assert told.urls == ["http://10.0.0.9:30000", "http://10.0.0.10:30000", "http://[2001:db8::1]:30000"]
    assert [each.name for each in told.members[-1]][2] == "2001-db8-0-0-0-0-0-1-30000"


async def test_addresses_that_no_replica_has_are_left_out() -> None:
    told = Told()
    await told.look(resolving(["169.254.169.254", "fe80::1%eth0", "224.0.0.1", "0.0.0.0", "10.0.0.9"]))
    assert told.urls == ["http://10.0.0.9:30000"]


async def test_names_stay_when_others_come_and_go() -> None:
    told = Told()
    source = resolving(["10.0.0.7", "10.0.0.8", "10.0.0.9"], ["10.0.0.6", "10.0.0.9", "10.0.0.7"])
    for _ in range(2):
        await told.look(source)
    before, after = ({each.url: each.name for each in members} for members in told.members)
    assert all(before[url] == after[url] for url in before.keys() & after.keys())


async def test_an_absolute_name_is_asked_for_as_it_stands(names: DnsServer) -> None:
    told, asked = Told(), []

    def look_up(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["10.0.0.7"]

    await told.look(DnsSource("pods.test.", port=30000, timeout_s=10.0, look_up=look_up))
    assert (asked, told.urls) == (["pods.test."], ["http://10.0.0.7:30000"])
    names.services[SERVICE] = [(0, 1, 30000, "a.models.test")]
    names.addresses["a.models.test"] = ["10.0.0.8"]
    source = DnsSource(f"{SERVICE}.", record="srv", servers=(ADDRESS,), server_port=names.port, timeout_s=10.0)
    await told.look(source)
    assert told.urls == ["http://10.0.0.8:30000"]


async def test_an_empty_answer_is_believed_at_the_third_time_in_a_row() -> None:
    told = Told()
    none = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    source = resolving(["10.0.0.7"], none, none, ["10.0.0.7"], none, none, none, none)
    for _ in range(6):
        await told.look(source)
    assert [len(each) for each in told.members] == [1, 1]
    assert [each.split(",")[1] for each in told.problems] == [
        " 1 of 3 times in a row: believed at the last",
        " 2 of 3 times in a row: believed at the last",
    ] * 2
    for _ in range(2):
        await told.look(source)
    assert [len(each) for each in told.members] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        socket.gaierror(socket.EAI_FAIL, "Non-recoverable failure"),
        OSError("no thread"),
        UnicodeError("label too long"),
    ],
)
async def test_a_resolver_that_fails_takes_nothing_away(error: Exception) -> None:
    told = Told()
    source = resolving(["10.0.0.7"], error)
    for _ in range(6):
        await told.look(source)
    assert len(told.members) == 1
    assert len(told.problems) == 5
    assert "pods.test cannot be looked up" in told.problems[0]


async def test_a_resolver_that_hangs_blocks_nothing_and_costs_one_thread() -> None:
    released = threading.Event()
    asked = 0

    def hang(host: str, port: int) -> Sequence[str]:
        nonlocal asked
        asked += 1
        released.wait(30.0)
        return ["10.0.0.7"]

    told, ticks = Told(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    before = set(threading.enumerate())  # themselves, since those of former tests may end meanwhile
    source = DnsSource("slow.test", port=1, timeout_s=0.05, look_up=hang)
    ticking = asyncio.create_task(tick())
    started_s = time.monotonic()
    for _ in range(10):
        await told.look(source)
    took_s = time.monotonic() - started_s
    ticking.cancel()
    assert took_s < 15.0
    assert ticks >= 5
    assert told.problems[-1] == "the resolver does not answer within 0.05 s for slow.test"
    assert (asked, len(set(threading.enumerate()) - before)) == (1, 1)
    released.set()
    async with asyncio.timeout(20.0):
        while not told.members:  # the late answer counts, or the next one does
            await told.look(source)
    assert told.urls == ["http://10.0.0.7:1"]


async def test_a_resolver_that_hangs_does_not_hold_up_the_end() -> None:
    released = threading.Event()
    source = DnsSource("slow.test", port=1, timeout_s=20.0, look_up=lambda *_: [str(released.wait(30.0))])
    told = Told()
    running = asyncio.create_task(source.run(told.tell, told.trouble))
    await asyncio.sleep(0)
    running.cancel()
    async with asyncio.timeout(10.0):
        await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    released.set()


def test_addresses_need_a_port() -> None:
    with pytest.raises(ValueError, match="have no port"):
        DnsSource("pods.test")


# -- SRV records


async def test_targets_of_the_best_priority_are_members_with_their_ports_and_weights(names: DnsServer) -> None:
    names.services[SERVICE] = [(10, 30, 30001, "a.test"), (10, 10, 30002, "b.test"), (20, 99, 30003, "c.test")]
    names.addresses |= {"a.test": ["10.0.0.1"], "b.test": ["10.0.0.2"], "c.test": ["10.0.0.3"]}
    told = Told()
    await told.look(srv_source(names))
    assert told.problems == []
    assert told.urls == ["http://10.0.0.1:30001", "http://10.0.0.2:30002"]
    assert [each.weight for each in told.members[-1]] == [1.5, 0.5]


async def test_equal_weights_say_nothing_and_the_settings_port_wins(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 5, 1, "a.test"), (0, 5, 2, "b.test")]
    names.addresses |= {"a.test": ["10.0.0.1"], "b.test": ["10.0.0.2"]}
    told = Told()
    await told.look(srv_source(names, port=8000))
    assert told.urls == ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]
    assert [each.weight for each in told.members[-1]] == [None, None]


async def test_a_certificate_is_for_a_name_so_https_keeps_it(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 0, 443, "B.test"), (0, 0, 443, "a.test")]
    told = Told()
    await told.look(srv_source(names, scheme="https"))
    assert told.urls == ["https://a.test:443", "https://b.test:443"]


async def test_a_target_with_both_families_is_one_replica_and_ipv6_alone_counts(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, "both.test"), (0, 1, 1, "six.test")]
    names.addresses |= {"both.test": ["2001:db8::1", "10.0.0.1"], "six.test": ["2001:db8::2"]}
    told = Told()
    await told.look(srv_source(names))
    assert told.urls == ["http://10.0.0.1:1", "http://[2001:db8::2]:1"]


async def test_addresses_that_come_along_are_not_asked_for(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, f"r{number}.test") for number in range(20)]
    names.addresses |= {f"r{number}.test": [f"10.0.0.{number}"] for number in range(20)}
    names.glue = True
    told = Told()
    await told.look(srv_source(names))
    assert len(told.urls) == 20
    assert names.questions == 1


async def test_records_are_asked_for_again_when_their_time_is_over_and_not_sooner_than_the_interval(
    names: DnsServer,
) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test")]
    names.addresses["a.test"] = ["10.0.0.1"]
    told, source = Told(), srv_source(names, interval_s=5.0)
    assert await told.look(source) == 5.0
    names.ttl_s = 60
    assert await told.look(source) == 60.0
    names.failing[SERVICE] = SERVFAIL
    assert await told.look(source) == 5.0


@pytest.mark.parametrize("code", [SERVFAIL, REFUSED])
async def test_a_name_server_that_fails_takes_nothing_away(names: DnsServer, code: int) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test")]
    names.addresses["a.test"] = ["10.0.0.1"]
    told, source = Told(), srv_source(names)
    await told.look(source)
    names.failing[SERVICE] = code
    for _ in range(4):
        await told.look(source)
    assert len(told.members) == 1
    assert len(told.problems) == 4
    assert f"SRV {SERVICE} cannot be looked up" in told.problems[0]


async def test_a_name_server_that_is_silent_takes_nothing_away(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test")]
    names.addresses["a.test"] = ["10.0.0.1"]
    told = Told()
    names.silent.add(SERVICE)
    await told.look(srv_source(names, timeout_s=0.3))
    assert told.members == []
    assert told.problems == [f"no name server answers within 0.3 s for SRV {SERVICE}"]


async def test_a_service_that_is_gone_is_believed_at_the_third_time(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test")]
    names.addresses["a.test"] = ["10.0.0.1"]
    told, source = Told(), srv_source(names)
    await told.look(source)
    names.services[SERVICE] = [(0, 0, 0, ".")]  # RFC 2782: decidedly not available
    await told.look(source)
    del names.services[SERVICE]
    await told.look(source)
    assert len(told.members) == 1
    await told.look(source)
    assert told.members[-1] == []


async def test_a_target_whose_name_fails_keeps_its_last_addresses(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test"), (0, 1, 1, "b.test"), (0, 1, 1, "c.test")]
    names.addresses |= {"a.test": ["10.0.0.1"], "b.test": ["10.0.0.2"], "c.test": ["10.0.0.3"]}
    told, source = Told(), srv_source(names)
    await told.look(source)
    names.failing |= {"b.test": SERVFAIL}
    names.addresses.pop("c.test")
    for _ in range(4):
        await told.look(source)
    assert [len(each) for each in told.members] == [3, 3, 3, 2, 2]
    assert told.urls == ["http://10.0.0.1:1", "http://10.0.0.2:1"]


async def test_targets_without_any_address_are_trouble_and_not_nothing(names: DnsServer) -> None:
    names.services[SERVICE] = [(0, 1, 1, "a.test")]
    told, source = Told(), srv_source(names)
    for _ in range(4):
        await told.look(source)
    assert told.members == []
    assert "none of the 1 targets" in told.problems[-1]


async def test_servers_that_are_no_addresses_are_said() -> None:
    told = Told()
    await told.look(DnsSource(SERVICE, record="srv", servers=("ns.test",)))
    assert "no name server can be asked" in told.problems[0]
    assert "ns.test" in told.problems[0]
