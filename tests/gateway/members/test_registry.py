"""Leases of replicas that register: what ends one, and what must not."""

from __future__ import annotations

import msgspec
import pytest

from backends.discovery.member import Member
from gateway.config.discovery import Registration
from gateway.members.places import may_be_at, not_here
from gateway.members.registry import MAX_GAP_S, Posted, Registry, notice_key

TTL_S = 15.0


def posted(renewal: str, state: str = "ready", *, gone: bool = False) -> Posted:
    return Posted(Member(url="http://10.0.0.1:1", name="r", state=state), TTL_S, renewal, gone)  # type: ignore[arg-type]


def run(registry: Registry, from_s: float, to_s: float, *, there: bool = True) -> list[tuple[str, str]]:
    """Look twice a second."""
    over: list[tuple[str, str]] = []
    while from_s < to_s:
        from_s += 0.5
        over += registry.expire(from_s, store_is_there=there)
    return over


def test_a_lease_ends_when_it_is_not_renewed_and_not_before() -> None:
    registry = Registry()
    assert registry.take("p", "r", posted("1"), 0.0)
    assert run(registry, 0.0, 14.5) == []
    assert not registry.take("p", "r", posted("2"), 14.5)
    assert run(registry, 14.5, 29.0) == []
    assert run(registry, 29.0, 30.0) == [("p", "r")]


def test_a_store_that_has_forgotten_everything_takes_nobody_out_of_work() -> None:
    registry = Registry()
    registry.read({notice_key("p", "r"): msgspec.json.encode(posted("1"))}, 0.0)
    assert not registry.read({}, 1.0)
    assert ("p", "r") in registry.leases
    assert not registry.read({notice_key("p", "r"): msgspec.json.encode(posted("2"))}, 5.0)
    assert run(registry, 5.0, 19.5) == []


def test_while_the_store_is_away_no_lease_ends_and_after_it_there_is_time_to_be_heard_of() -> None:
    registry = Registry()
    registry.take("p", "r", posted("1"), 0.0)
    assert run(registry, 0.0, 120.0, there=False) == []
    assert run(registry, 120.0, 134.0) == []
    assert run(registry, 134.0, 136.0) == [("p", "r")]


def test_a_gateway_that_was_stopped_for_a_while_does_not_take_its_own_absence_for_the_replicas() -> None:
    registry = Registry()
    registry.take("p", "r", posted("1"), 0.0)
    run(registry, 0.0, 5.0)
    assert registry.expire(5.0 + MAX_GAP_S + 300.0, store_is_there=True) == []
    assert run(registry, 310.5, 320.0) == []


def test_who_has_left_is_gone_at_once_and_an_old_renewal_does_not_bring_it_back() -> None:
    registry = Registry()
    registry.take("p", "r", posted("1"), 0.0)
    gone = {notice_key("p", "r"): msgspec.json.encode(posted("2", gone=True))}
    assert registry.read(gone, 1.0)
    assert registry.leases == {}
    assert not registry.read(gone, 2.0)
    assert registry.leases == {}


@pytest.mark.parametrize("gone", [False, True])
def test_a_notice_that_is_still_under_way_does_not_undo_what_was_said_since(gone: bool) -> None:
    registry = Registry()
    key = ("p", "r")
    older = {notice_key(*key): msgspec.json.encode(posted("1"))}
    registry.take_first(*key, posted("1"), 0.0)
    assert not registry.read(older, 0.1)
    assert registry.take_first(*key, posted("2", "draining", gone=gone), 1.0)
    for _ in range(2):  # a look between the answer and the store, and one between the store and the worker
        assert not registry.read(older, 1.1)
        assert [lease.member.state for lease in registry.leases.values()] == ([] if gone else ["draining"])
        registry.told(*key, posted("2"), 1.1)
    newer = {notice_key(*key): msgspec.json.encode(posted("2", "draining", gone=gone))}
    assert not registry.read(newer, 1.5)
    # What another gateway has heard since counts.
    assert registry.read({notice_key(*key): msgspec.json.encode(posted("3"))}, 2.0)
    assert registry.leases[key].member.state == "ready"


def test_what_another_gateway_says_counts_in_the_end_also_where_ours_is_never_shown() -> None:
    registry = Registry()
    registry.take_first("p", "r", posted("1"), 0.0)
    registry.told("p", "r", posted("1"), 0.0)
    other = {notice_key("p", "r"): msgspec.json.encode(posted("2", "draining"))}
    assert not registry.read(other, 1.0)
    assert registry.read(other, 3.5)


def test_what_another_version_has_posted_is_passed_over() -> None:
    registry = Registry()
    assert not registry.read({notice_key("p", "r"): b'{"member": 3}', "member/p": b"{}", "agent/x": b"{}"}, 0.0)


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("http://10.1.2.3:1", True),
        ("http://127.0.0.1:1", True),
        ("http://localhost:1", True),
        ("http://[fd00::5]:1", True),
        ("http://169.254.169.254:80", False),
        ("http://[fe80::1]:1", False),
        ("http://[::ffff:169.254.169.254]:80", False),
        ("http://[::ffff:10.0.0.1]:80", True),
        ("http://8.8.8.8:1", False),
        ("http://gpu1.internal:1", False),
        ("http+unix://%2Fvar%2Frun%2Fdocker.sock", False),
        ("http://0.0.0.0:1", False),
    ],
)
def test_a_replica_may_register_from_private_networks_only(url: str, may: bool) -> None:
    assert may_be_at(url, Registration()) is may


def test_names_count_where_they_are_listed() -> None:
    registration = Registration(hosts=(".gpu.internal", "one.example"))
    allowed = ["http://a.gpu.internal:1", "http://one.example:1", "http://A.GPU.internal.:1"]
    refused = ["http://gpu.internal:1", "http://evilgpu.internal:1", "http://two.example:1", "http://one.example.org:1"]
    assert [may_be_at(url, registration) for url in allowed] == [True] * 3
    assert [may_be_at(url, registration) for url in refused] == [False] * 4


@pytest.mark.parametrize(
    ("events", "may"),
    [
        ("auto", True),
        ("tcp://10.0.0.7:5557", True),
        ("tcp://[fd00::7]:5557", True),
        ("ipc:///var/run/docker.sock", False),
        ("tcp://169.254.169.254:80", False),
        ("tcp://10.0.0.7;169.254.169.254:80", False),
        ("tcp://10.0.0.7:5557/x", False),
        ("tcp://10.0.0.7@8.8.8.8:5557", False),
        ("tcp://*:5557", False),
    ],
)
def test_the_gateway_is_not_had_to_read_cache_events_from_anywhere_else(events: str, may: bool) -> None:
    member = Member(url="http://10.0.0.7:30000", name="r", kv_events=events)
    assert (not_here(member, Registration()) == "") is may
