"""The consistent hashes: who moves, who stays, and how much one may get."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.policies.hashing import FORGET_S, BoundedHash, ConsistentHash, Ring, key_of
from routing.types import Replica
from tests.routing.policies.examples import NOW, replica, replicas, request, view


def placed(policy: ConsistentHash, fleet: list[Replica], sessions: int = 300) -> dict[int, Replica]:
    return {number: policy(request(session=f"t\0{number}"), fleet, view()) for number in range(sessions)}


def test_a_removed_replicas_keys_move_and_no_others() -> None:
    fleet = replicas(6)
    policy = ConsistentHash(Random(1))
    before, after = placed(policy, fleet), placed(policy, fleet[1:])
    assert {before[number] for number in before if before[number] is not after[number]} == {fleet[0]}
    assert placed(policy, fleet) == before


def test_they_move_to_all_of_the_others() -> None:
    fleet = replicas(6)
    policy = ConsistentHash(Random(1))
    before, after = placed(policy, fleet, 3000), placed(policy, fleet[1:], 3000)
    assert {after[number] for number in before if before[number] is fleet[0]} == set(fleet[1:])


def test_a_new_replica_takes_its_part_and_nothing_else_moves() -> None:
    fleet = replicas(6)
    policy = ConsistentHash(Random(1))
    before, after = placed(policy, fleet[:5], 3000), placed(policy, fleet, 3000)
    moved = [number for number in before if before[number] is not after[number]]
    assert {after[number] for number in moved} == {fleet[5]}
    assert 350 < len(moved) < 650  # a sixth is 500


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=2, max_size=8), data=st.data())
def test_removal_moves_only_what_it_must(names: list[str], data: st.DataObject) -> None:
    fleet = [replica(name) for name in names]
    left = data.draw(st.lists(st.sampled_from(fleet), unique=True, min_size=1))
    policy = ConsistentHash(Random(1))
    before, after = placed(policy, fleet, 40), placed(policy, left, 40)
    for number, owner in before.items():
        assert after[number] is owner or owner not in left


def test_places_do_not_depend_on_order_or_gateway() -> None:
    fleet = replicas(5)
    again = [replica(f"r{number}") for number in reversed(range(5))]
    here, there = placed(ConsistentHash(Random(1)), fleet), placed(ConsistentHash(Random(2)), again)
    assert [one.name for one in here.values()] == [one.name for one in there.values()]


def test_the_parts_are_even_and_follow_the_weights() -> None:
    fleet = [*replicas(3), replica("heavy", weight=3.0)]
    counts = Counter(placed(ConsistentHash(Random(1)), fleet, 12_000).values())
    for each in fleet:
        assert 0.75 < counts[each] / (2000 * each.weight) < 1.25


def test_the_session_is_the_key_then_the_beginning_of_the_prompt_both_with_the_adapter() -> None:
    assert key_of(request("abc", session="s")) == key_of(request("xyz", session="s"))
    assert key_of(request("abcdef")) == key_of(request("abxyz"))
    assert key_of(request("abc")) != key_of(request("aXc"))
    assert key_of(request("a")) == key_of(request("a"))
    keys = {key_of(request("abc", adapter=adapter)) for adapter in (None, "one", "two")}
    assert len(keys | {key_of(request(session="s")), key_of(request(session="s", adapter="one"))}) == 5
    assert key_of(request()) is None


def test_a_request_without_a_key_goes_anywhere() -> None:
    fleet = replicas(4)
    for policy in (ConsistentHash(Random(1)), BoundedHash(Random(1))):
        assert {policy(request(), fleet, view()) for _ in range(100)} == set(fleet)


def test_replicas_long_gone_leave_the_ring() -> None:
    old, new = replicas(3), replica("new")
    ring = Ring(nodes=160)
    list(ring.walk(7, old, NOW))
    list(ring.walk(7, [new], NOW + FORGET_S / 2))
    assert len(ring._points) == 4 * 160
    list(ring.walk(7, [new, replica("newer")], NOW + FORGET_S + 1.0))
    assert len(ring._points) == 2 * 160


def test_a_walk_visits_every_candidate_once_even_two_that_are_one_engine() -> None:
    twin = Replica("twin", "pool", "http://r0", "openai")
    fleet = [*replicas(3), twin]
    assert Counter(Ring(nodes=8).walk(1, fleet, NOW)) == Counter(fleet)


def test_a_place_with_more_than_125_percent_of_the_mean_is_passed_over() -> None:
    fleet = replicas(4)
    policy = BoundedHash(Random(1))
    home = policy(request("abc"), fleet, view())
    others = [each for each in fleet if each is not home]
    for each in others:
        each.in_flight = 4
    # The bound is 1.25 x (12 + own + 1) / 4: 5.3 with 4 there, which 4 + 1 keeps; 5.6 with 5, which 5 + 1 does not.
    home.in_flight = 4
    assert policy(request("abc"), fleet, view()) is home
    home.in_flight = 5
    neighbour = policy(request("abc"), fleet, view())
    assert neighbour in others
    assert all(policy(request("abc"), fleet, view()) is neighbour for _ in range(20))
    assert policy(request("abc"), [each for each in fleet if each is not home], view()) is neighbour


def test_with_few_requests_all_are_beyond_the_bound_and_the_place_counts_again() -> None:
    fleet = replicas(8)
    policy = BoundedHash(Random(1))
    home = policy(request("abc"), fleet, view())
    home.in_flight = 2  # (2 + 1) / 8 x 1.25 = 0.47 for each
    assert policy(request("abc"), fleet, view()) is home


def test_the_bound_holds_under_one_hot_key() -> None:
    fleet = replicas(5)
    policy = BoundedHash(Random(1))
    for number in range(500):
        policy(request("abc"), fleet, view()).in_flight += 1
        if number > 20:
            assert max(each.in_flight for each in fleet) <= 1.25 * (number + 1) / 5


@pytest.mark.parametrize("weight", [0.01, 1000.0])
def test_extreme_weights_are_bounded(weight: float) -> None:
    fleet = [replica("odd", weight=weight), *replicas(2)]
    assert ConsistentHash(Random(1))(request("abc"), fleet, view()) in fleet
