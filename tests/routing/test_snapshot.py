"""Indexes in bytes."""

from __future__ import annotations

from collections.abc import Generator
from random import Random

import pytest

from routing import snapshot
from routing.router import PoolState
from routing.sharing import Peerage
from routing.types import Replica


def peerage(replicas: int = 3) -> Peerage:
    made = [Replica(f"r{n}", "pool", f"http://engine{n}:1", "vllm") for n in range(replicas)]
    return Peerage(b"worker 1", PoolState(), made, lambda _: None)


def fill(peers: Peerage, keys: int, seed: int = 1) -> None:
    rng = Random(seed)
    for replica in peers.replicas:
        digests = [rng.getrandbits(64) for _ in range(keys)]
        peers.state.index.add(peers.state.slot(replica), digests, [10] * keys)


def held(peers: Peerage) -> dict[bytes, tuple[list[int], list[int]]]:
    state = peers.state
    return {peers.identity(each): state.index.held(state.slot(each)) for each in peers.replicas}


def packed(making: Generator[None, None, bytes]) -> bytes:
    while True:
        try:
            next(making)
        except StopIteration as done:
            return bytes(done.value)


def test_what_is_restored_is_what_was_packed() -> None:
    one, two = peerage(), peerage()
    fill(one, 5_000)
    blob = packed(snapshot.pack(one, "1234-5", 1_000_000))
    assert snapshot.cursor_of(blob) == "1234-5"
    steps = sum(1 for _ in snapshot.restore(two, blob))
    assert steps == 9
    assert held(two) == held(one)
    assert len(blob) < 3 * (5_000 * 12 + 20)


def test_an_empty_index_has_a_snapshot() -> None:
    blob = packed(snapshot.pack(peerage(), "", 1000))
    assert list(snapshot.restore(peerage(), blob)) == []


def test_too_much_is_cut_to_what_was_used_last() -> None:
    one, two = peerage(), peerage()
    fill(one, 1_000)
    blob = packed(snapshot.pack(one, "c", 6_000))
    assert 5_500 < len(blob) <= 6_000
    for _ in snapshot.restore(two, blob):
        pass
    for identity, (digests, _) in held(two).items():
        assert 150 < len(digests) < 170
        assert digests == held(one)[identity][0][-len(digests) :]


def test_no_room_at_all_is_an_empty_one() -> None:
    one, two = peerage(), peerage()
    fill(one, 1_000)
    for _ in snapshot.restore(two, packed(snapshot.pack(one, "c", 80))):
        pass
    assert sum(len(digests) for digests, _ in held(two).values()) <= 3


def test_caches_that_have_begun_anew_and_strangers_are_passed_over() -> None:
    one, two = peerage(3), peerage(2)
    fill(one, 10)
    for replica in one.replicas:
        replica.epoch = "e1"
    for replica, epoch in zip(two.replicas, ("e1", "e2"), strict=True):
        replica.epoch = epoch
    blob = packed(snapshot.pack(one, "c", 10_000))
    for _ in snapshot.restore(two, blob):
        pass
    assert [len(digests) for digests, _ in held(two).values()] == [10, 0]


def test_what_is_no_snapshot_is_refused() -> None:
    one = peerage()
    fill(one, 10)
    blob = packed(snapshot.pack(one, "c", 10_000))
    for broken in (b"", b"\x02" + blob[1:], blob[:-1], blob[:20], b"\x01\x05\x00\xff\xff\xff\xff\xff"):
        with pytest.raises(snapshot.SnapshotError):
            list(snapshot.restore(peerage(), broken))


def test_a_replica_that_leaves_while_a_snapshot_is_made_is_left_out_and_not_known_again() -> None:
    one = peerage()
    fill(one, 100)
    first, *others = one.replicas
    making = snapshot.pack(one, "c", 100_000)
    next(making)
    for each in others:
        one.state.forget(each)
    one.refresh([first])
    two = peerage()
    for _ in snapshot.restore(two, packed(making)):
        pass
    assert [len(digests) for digests, _ in held(two).values()] == [100, 0, 0]
    assert one.state.slots.keys() == {first}


def test_what_was_known_of_one_life_of_a_replica_is_not_said_of_the_next() -> None:
    one, two = peerage(1), peerage(1)
    for peers, epoch in ((one, "1"), (two, "2")):
        for each in peers.replicas:
            each.epoch = epoch
    fill(one, 100)
    making = snapshot.pack(one, "c", 100_000)
    next(making)
    for each in one.replicas:
        each.epoch = "2"
    for _ in snapshot.restore(two, packed(making)):
        pass
    assert [len(digests) for digests, _ in held(two).values()] == [0]
