"""What is learned of a server that says nothing of itself but "too many"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.capacity import Capacity, Meter, pool_capacity, set_ceilings
from routing.concurrency import CALM_S, EVENT_S, FLOOR, Learned
from routing.policies.balanced import LeastOutstanding
from routing.router import Router
from routing.types import InferenceRequest, Replica


def after_calm(learned: Learned, now: float, times: int = 1, in_flight: int | None = None) -> float:
    """Answers while the limit is used to the full, until it may have grown so often."""
    for _ in range(times):
        learned.answered(learned.requests if in_flight is None else in_flight, now + CALM_S / 2)
        now += CALM_S
        learned.answered(learned.requests if in_flight is None else in_flight, now)
    return now


def test_the_first_refusal_allows_half_of_what_ran_beside_it() -> None:
    assert Learned(20, 0.0).requests == 10
    assert Learned(1, 0.0).requests == FLOOR


def test_a_burst_of_refusals_is_one_event_and_the_next_burst_another() -> None:
    learned = Learned(100, 0.0)
    for step in range(50):
        learned.refused(99 - step, step * EVENT_S / 60)
    assert learned.requests == 50
    learned.refused(50, EVENT_S)
    assert learned.requests == 25


def test_it_grows_by_half_of_the_way_back_and_then_by_more_and_more() -> None:
    learned = Learned(100, 0.0)
    now, seen = 0.0, []
    for _ in range(12):
        now = after_calm(learned, now)
        seen.append(learned.requests)
    assert seen == [75, 88, 94, 97, 98, 99, 100, 101, 103, 107, 115, 131]


def test_the_way_back_from_ten_is_as_the_module_says() -> None:
    learned = Learned(10, 0.0)
    now, seen = 0.0, [learned.requests]
    while learned.requests < 11:
        now = after_calm(learned, now)
        seen.append(learned.requests)
    assert seen == [5, 8, 9, 10, 11]


def test_a_limit_that_nobody_reaches_does_not_grow() -> None:
    learned = Learned(100, 0.0)
    after_calm(learned, 0.0, times=20, in_flight=40)
    assert learned.requests == 50


def test_a_refusal_starts_the_wait_anew() -> None:
    learned = Learned(100, 0.0)
    learned.refused(60, 0.9 * CALM_S)
    assert learned.requests == 25
    assert not learned.answered(25, 1.5 * CALM_S)
    assert learned.answered(25, 1.95 * CALM_S)


def test_slow_first_tokens_hold_it_back_and_slow_ones_for_good_do_not() -> None:
    learned = Learned(100, 0.0)
    for _ in range(50):
        learned.first_token(120.0, 100.0)
    assert not learned.slow()
    for _ in range(20):
        learned.first_token(900.0, 100.0)
    assert learned.slow()
    now = after_calm(learned, 0.0, times=3)
    assert learned.requests == 50
    for _ in range(600):  # that is how it is now
        learned.first_token(900.0, 100.0)
    assert not learned.slow()
    after_calm(learned, now)
    assert learned.requests == 75


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["refused", "answered", "first_token"]), st.integers(0, 500), st.floats(0, 30, allow_nan=False)
    ),
    max_size=200,
)


@given(st.integers(0, 500), EVENTS)
def test_it_is_never_below_the_floor_and_recovers_from_anything(
    first: int, events: list[tuple[str, int, float]]
) -> None:
    learned, now = Learned(first, 0.0), 0.0
    for what, number, passed_s in events:
        now += passed_s
        before = learned.requests
        if what == "refused":
            learned.refused(number, now)
            assert learned.requests <= before
        elif what == "answered":
            learned.answered(number, now)
            assert learned.requests >= before
        else:
            learned.first_token(float(number), 100.0)
        assert learned.requests >= FLOOR
    for _ in range(1000):
        learned.first_token(100.0, 100.0)
    after_calm(learned, now, times=20)
    assert learned.requests >= 100


# In a meter.


def test_nothing_is_limited_before_a_refusal_or_by_one_beside_next_to_nothing() -> None:
    meter = Meter()
    meter.answered(500, 0.0)
    meter.refused(FLOOR - 1, 1.0)
    meter.refused(500, 2.0, said=False)
    assert meter.learned is None
    assert meter.capacity == Capacity()


def test_a_refusal_is_learned_from_where_nobody_says_anything() -> None:
    meter = Meter()
    meter.refused(40, 0.0)
    assert meter.capacity == Capacity(20, None, "learned")
    assert meter.capacity.dispatch(5) == 20
    meter.refused(20, 2.0, said=False)
    assert meter.capacity.requests == 10
    meter.answered(10, 2.0 + CALM_S)
    assert meter.capacity.requests == 15


@pytest.mark.parametrize(
    "speak",
    [lambda meter: meter.configure(64, None), lambda meter: meter.state(64, None), lambda meter: meter.observe(3, 0)],
)
def test_who_says_what_it_takes_is_believed_instead(speak: Callable[[Meter], None]) -> None:
    meter = Meter()
    speak(meter)
    before = meter.capacity
    meter.refused(40, 0.0)
    assert meter.learned is None
    assert meter.capacity == before


def test_load_reports_that_begin_take_its_place() -> None:
    meter = Meter()
    meter.refused(40, 0.0)
    meter.observe(12, 0)
    assert meter.capacity == Capacity()


def test_a_learned_limit_is_the_replicas_ceiling_with_or_without_a_queue() -> None:
    known, unknown = (Replica(name, "p", f"http://127.0.0.1:{port}", "openai") for name, port in (("a", 1), ("b", 2)))
    known.meter.refused(40, 0.0)
    assert pool_capacity([known, unknown], 2, 1.0) == (None, None)
    set_ceilings([known, unknown], None)
    assert (known.ceiling, unknown.ceiling) == (20, None)
    assert pool_capacity([known], 2, 1.0) == (20, None)
    set_ceilings([known], 2)
    assert known.ceiling == 20


# Against a server that refuses what is beyond its capacity.


class Server:
    """Takes `capacity` requests at once, each for a random time, and refuses the rest at once."""

    def __init__(self, capacity: int, rng: Random) -> None:
        self.capacity = capacity
        self._rng = rng
        self._ends: list[tuple[float, int]] = []

    def running(self, gateway: int | None = None) -> int:
        return sum(gateway in (None, each) for _, each in self._ends)

    def finish(self, now: float) -> list[int]:
        done = [gateway for end, gateway in self._ends if end <= now]
        self._ends = [each for each in self._ends if each[0] > now]
        return done

    def take(self, gateway: int, now: float) -> bool:
        if len(self._ends) >= self.capacity:
            return False
        self._ends.append((now + self._rng.uniform(0.5, 4.0), gateway))
        return True


def drive(server: Server, meters: Sequence[Meter], since_s: float, until_s: float) -> list[list[int]]:
    """Gateways with more to do than the server takes; every second's limit of each, from the first refusal on."""
    limits: list[list[int]] = [[] for _ in meters]
    for step in range(int(since_s * 10), int(until_s * 10)):
        now = step / 10
        for gateway in server.finish(now):
            meters[gateway].answered(server.running(gateway), now)
        order = list(range(len(meters)))
        for gateway in order[step % len(order) :] + order[: step % len(order)]:
            meter = meters[gateway]
            sent = 0
            while sent < 50 and server.running(gateway) < (meter.capacity.requests or 400):
                sent += 1
                if not server.take(gateway, now):
                    meter.refused(server.running(gateway), now)
        if step % 10 == 0:
            for gateway, meter in enumerate(meters):
                limits[gateway].append(meter.capacity.requests or 0)
    return limits


@pytest.mark.parametrize("capacity", [4, 8, 20, 64, 120])
def test_it_finds_the_capacity_of_a_server_that_refuses_what_is_beyond(capacity: int) -> None:
    server, meter = Server(capacity, Random(capacity)), Meter()
    drive(server, [meter], 0, 120)
    (limits,) = drive(server, [meter], 120, 720)
    assert 0.75 * capacity <= fmean(limits) <= 1.25 * capacity
    assert min(limits) >= max(FLOOR, capacity // 4)


def test_it_follows_a_capacity_that_falls_and_rises() -> None:
    server, meter = Server(100, Random(1)), Meter()
    drive(server, [meter], 0, 300)
    server.capacity = 20
    (falling,) = drive(server, [meter], 300, 330)
    assert falling[-1] <= 25
    (low,) = drive(server, [meter], 330, 630)
    assert 15 <= fmean(low) <= 25
    server.capacity = 100
    drive(server, [meter], 630, 830)
    (high,) = drive(server, [meter], 830, 1430)
    assert 75 <= fmean(high) <= 125


def test_gateways_that_share_an_account_come_to_share_it() -> None:
    """Each halves when it is refused, and they do not tell each other."""
    server, meters = Server(60, Random(2)), [Meter() for _ in range(3)]
    drive(server, meters, 0, 200)
    limits = drive(server, meters, 200, 1400)
    means = [fmean(each) for each in limits]
    assert 0.7 * 60 <= sum(means) <= 1.25 * 60
    assert max(means) <= 2 * min(means)


def test_a_router_tells_it_of_first_tokens_once_something_was_learned() -> None:
    router = Router(LeastOutstanding(Random(1)))

    def first_tokens(replica: Replica, took_s: float) -> Learned | None:
        for number in range(30):
            request = InferenceRequest(f"{took_s}-{number}", "m", stream=True, prompt_bytes=100, prompt_tokens=100)
            assert router.decide(request, [replica], 0.0).replica is replica
            router.dispatched(request, replica, 0.0)
            router.first_token(request, replica, took_s)
        return replica.meter.learned

    untold = Replica("a", "p", "http://127.0.0.1:1", "openai")
    assert first_tokens(untold, 0.1) is None
    refusing = Replica("b", "p", "http://127.0.0.1:2", "openai")
    refusing.meter.refused(10, 0.0)
    learned = first_tokens(refusing, 0.05)
    assert learned is not None
    before = learned.slow()
    first_tokens(refusing, 5.0)
    assert (before, learned.slow()) == (False, True)


def test_a_quota_for_each_minute_is_used_up_each_minute() -> None:
    """A hosted API that allows 600 requests a minute and any number at once, and names no time when it refuses."""
    rng, meter, ends = Random(1), Meter(), list[float]()
    now, minute, used, served = 0.0, 0, 0, 0
    while now < 600.0:
        now += rng.expovariate(20.0)
        if int(now // 60) != minute:
            minute, used = int(now // 60), 0
        while ends and ends[0] <= now:
            ended = heappop(ends)
            meter.answered(len(ends), ended)
        limit = meter.capacity.requests
        if limit is not None and len(ends) >= limit:
            continue
        if used == 600:
            meter.refused(len(ends), now)
            continue
        used += 1
        served += 1
        heappush(ends, now + rng.uniform(2.5, 7.5))
    assert served >= 0.9 * 6000


def test_what_is_refused_beside_next_to_nothing_is_refused_by_rate() -> None:
    meter = Meter()
    meter.refused(40, 0.0)
    meter.refused(19, 2.0)
    meter.refused(9, 4.0)
    assert meter.capacity.requests == 5
    meter.refused(0, 6.0, said=False)  # a silence says nothing of a rate
    assert meter.capacity.requests == 3
    meter.refused(0, 8.0)
    assert meter.capacity.requests == 40
    meter.refused(1, 8.0 + 2 * EVENT_S)
    assert meter.capacity.requests == 40
    meter.refused(30, 20.0)
    assert meter.capacity.requests == 20


def test_a_server_for_two_refuses_its_burst_by_what_it_takes() -> None:
    meter = Meter()
    for beside in (9, 8, 2, 1, 0):
        meter.refused(beside, 0.1)
    assert meter.capacity.requests == 5
    meter.refused(4, 2.0)
    meter.refused(1, 2.1)
    assert meter.capacity.requests == FLOOR
