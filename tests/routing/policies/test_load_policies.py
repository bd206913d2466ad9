"""Round robin, random and power of two, and what counts as load."""

from __future__ import annotations

from collections import Counter
from random import Random

from routing.policies.balanced import AtRandom, LeastOutstanding, PowerOfTwo, RoundRobin, outstanding, warm
from routing.work import Totals
from tests.routing.policies.examples import NOW, busy, replica, replicas, request, view, warming


def test_round_robin_takes_each_in_turn() -> None:
    fleet = replicas(4)
    policy = RoundRobin(Random(1))
    order = [policy(request(), fleet, view()) for _ in range(12)]
    assert set(order[:4]) == set(fleet)
    assert order[4:8] == order[:4]
    assert order[8:] == order[:4]


def test_round_robin_interleaves_by_weight() -> None:
    heavy, light = replica("heavy", weight=3.0), replica("light")
    policy = RoundRobin(Random(1))
    names = [policy(request(), [heavy, light], view()).name for _ in range(40)]
    assert Counter(names) == {"heavy": 30, "light": 10}
    assert all(names[index : index + 4].count("light") == 1 for index in range(0, 40, 4))


def test_round_robin_goes_on_with_whoever_is_left_and_whoever_comes() -> None:
    fleet = replicas(5)
    policy = RoundRobin(Random(1))
    counts = Counter(policy(request(), fleet[:4], view()) for _ in range(10))
    counts += Counter(policy(request(), fleet[1:4], view()) for _ in range(9))
    assert min(counts[each] for each in fleet[1:4]) >= 5
    after = Counter(policy(request(), fleet, view()) for _ in range(50))
    assert max(after.values()) - min(after.values()) <= 4


def test_round_robin_forgets_replicas_that_are_gone() -> None:
    policy = RoundRobin(Random(1))
    for _ in range(300):
        policy(request(), replicas(2), view())
    assert len(policy._credit) < 300


def test_random_follows_the_weights() -> None:
    heavy, light = replica("heavy", weight=3.0), replica("light")
    policy = AtRandom(Random(2))
    counts = Counter(policy(request(), [heavy, light], view()) for _ in range(4000))
    assert 2900 < counts[heavy] < 3100


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    fleet = [busy(f"r{load}", running=load) for load in range(4)]
    policy = PowerOfTwo(Random(3))
    counts = Counter(policy(request(), fleet, view()).name for _ in range(6000))
    # Of 6 pairs the least loaded is in 3, the next is the lesser in 2, then 1; the most loaded never is.
    assert abs(counts["r0"] - 3000) < 150
    assert abs(counts["r1"] - 2000) < 150
    assert abs(counts["r2"] - 1000) < 150
    assert counts["r3"] == 0


def test_power_of_two_weighs_load_by_weight() -> None:
    light, heavy = busy("light", running=2), busy("heavy", running=3)
    heavy.weight = 2.0
    assert PowerOfTwo(Random(1))(request(), [light, heavy], view()) is heavy


def test_load_is_what_this_worker_has_in_flight_or_what_all_gateways_have_when_that_is_more() -> None:
    one = replica()
    one.in_flight = 3
    assert outstanding(one) == 3
    one.work.queue(100, NOW)
    one.work.peer("other", Totals(2, 10, 4, 10), NOW)
    assert outstanding(one) == 7
    idle = replica("idle", in_flight=6)
    assert LeastOutstanding(Random(1))(request(), [one, idle], view()) is idle


def test_one_in_slow_start_is_passed_over_by_its_share_unless_all_are() -> None:
    back, other = warming("back"), replica("other")
    rng = Random(1)
    seen = sum(back in warm([back, other], NOW, rng) for _ in range(2000))
    assert 150 < seen < 250
    assert all(list(warm([back, warming("too")], NOW, rng)) for _ in range(50))
    assert len(warm([back, warming("too")], NOW, rng)) == 2
    fleet = [other, replica("another")]
    assert warm(fleet, NOW, rng) is fleet
