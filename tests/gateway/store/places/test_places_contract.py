"""What the queue promises, in memory and in Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gateway.store.places import Band, Entry, Granted, Room, State, Ticket
from tests.gateway.store.places.halves_of_places import POOL, Clock, MemoryHalf, Pool, RedisHalf, drive, ticket
from tests.support.redis_server import RedisServer

GRANTED = Entry(State.GRANTED)
SECOND_US = 1_000_000


@pytest.fixture(params=["memory", "redis"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """One pool with two places on a clock that the test moves."""
    clock = Clock()
    if request.param == "memory":
        yield Pool(MemoryHalf(clock))
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    half = RedisHalf(server, clock)
    yield Pool(half)
    half.close()


def fill(pool: Pool, *ids: str, make: Callable[[str], Ticket] = ticket) -> None:
    for id in ids:
        assert pool.enter(make(id)) == GRANTED


def wait(pool: Pool, *tickets: Ticket) -> list[int]:
    """Their positions."""
    answers = [pool.enter(each) for each in tickets]
    assert [answer.state for answer in answers] == [State.WAITING] * len(tickets)
    return [answer.position for answer in answers]


def serve(pool: Pool, *running: str) -> list[str]:
    """Who is granted, one after the other, when those leave and then who was granted."""
    served: list[str] = []
    left = list(running)
    while left:
        id = left.pop(0)
        granted = pool.leave(id).ids
        served += granted
        left += granted
    return served


def test_a_place_is_granted_at_once_while_there_is_room(pool: Pool) -> None:
    fill(pool, "a", "b")
    assert pool.enter(ticket("c")).state is State.WAITING
    standing = pool.standing()
    assert (standing.running, standing.tokens, standing.waiting) == ((0, 2, 0, 0), 20, (0, 1, 0, 0))


def test_tokens_are_room_too(pool: Pool) -> None:
    pool.room = Room(10, tokens=100)
    fill(pool, "a", make=lambda id: ticket(id, tokens=60))
    assert pool.enter(ticket("b", tokens=41)).state is State.WAITING
    assert pool.leave("a") == Granted(("b",))


def test_a_request_larger_than_the_pool_takes_all_of_it(pool: Pool) -> None:
    pool.room = Room(10, tokens=100)
    fill(pool, "a", make=lambda id: ticket(id, tokens=5000))
    assert pool.standing().tokens == 100
    assert pool.enter(ticket("b", tokens=1)).state is State.WAITING


@pytest.mark.parametrize("room", [Room(0), Room(5, tokens=0)])
def test_without_capacity_everybody_waits_and_goes_on_when_it_comes_back(pool: Pool, room: Room) -> None:
    pool.room = room
    wait(pool, ticket("a"))
    pool.room = Room(5, tokens=1000)
    assert pool.renew(waiting=["a"]).granted == ("a",)


def test_capacity_below_what_is_in_use_grants_nothing_until_it_is_given_back(pool: Pool) -> None:
    pool.room = Room(3)
    fill(pool, "a", "b", "c")
    pool.room = Room(1)
    wait(pool, ticket("d"))
    assert pool.leave("a") == Granted()
    assert pool.leave("b") == Granted()
    assert pool.leave("c") == Granted(("d",))


def test_the_same_id_gets_what_it_has(pool: Pool) -> None:
    fill(pool, "a", "b", "a")
    first = pool.enter(ticket("c"))
    assert pool.enter(ticket("c")) == first
    assert sum(pool.standing().running) == 2
    assert sum(pool.standing().waiting) == 1


def test_who_has_left_may_not_enter_again_for_a_minute(pool: Pool) -> None:
    fill(pool, "a")
    pool.leave("a")
    pool.leave("never seen")
    for id in ("a", "never seen"):
        assert pool.enter(ticket(id)) == Entry(State.REFUSED, reason="left")
    pool.clock.pass_(59 * SECOND_US)
    assert pool.enter(ticket("a")).reason == "left"
    pool.clock.pass_(62 * SECOND_US)
    assert pool.enter(ticket("a")) == GRANTED


def test_a_tenants_requests_are_served_in_the_order_they_came(pool: Pool) -> None:
    fill(pool, "x", "y")
    ids = [f"r{n}" for n in (3, 1, 2, 10, 5)]
    wait(pool, *(ticket(id, cost=n * 100 + 1) for n, id in enumerate(ids)))
    assert serve(pool, "x", "y") == ids


def test_tenants_take_turns_by_cost_over_weight(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "x", make=lambda id: ticket(id, "zero"))
    heavy = [ticket(f"h{n}", "heavy", cost=100) for n in range(4)]
    double = [ticket(f"d{n}", "double", weight=2.0, cost=100) for n in range(4)]
    wait(pool, *heavy, *double)
    assert serve(pool, "x") == ["h0", "d0", "d1", "h1", "d2", "d3", "h2", "h3"]


def test_a_light_tenant_comes_before_the_backlog_of_a_heavy_one(pool: Pool) -> None:
    fill(pool, "x", "y", make=lambda id: ticket(id, "heavy"))
    wait(pool, *(ticket(f"h{n}", "heavy") for n in range(5)))
    assert wait(pool, ticket("light", "light")) == [0]
    assert pool.leave("x") == Granted(("light",))


def test_an_idle_tenant_saves_nothing_up(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "x", make=lambda id: ticket(id, "idle", cost=1))
    wait(pool, *(ticket(f"h{n}", "busy") for n in range(6)))
    assert pool.leave("x").ids == ("h0",)
    assert pool.leave("h0").ids == ("h1",)
    assert pool.leave("h1").ids == ("h2",)
    wait(pool, *(ticket(f"i{n}", "idle") for n in range(4)))
    assert serve(pool, "h2") == ["i0", "h3", "i1", "h4", "i2", "h5", "i3"]


def test_the_real_cost_corrects_the_order(pool: Pool) -> None:
    fill(pool, "a0", make=lambda id: ticket(id, "a", cost=100))
    fill(pool, "b0", make=lambda id: ticket(id, "b", cost=150))
    wait(pool, ticket("a1", "a"), ticket("b1", "b"))
    assert pool.leave("a0", used=1000).ids == ("b1",)  # a would have been first, and has used more than b


def test_nothing_stays_charged_of_one_who_gives_up_waiting(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "x", make=lambda id: ticket(id, "other"))
    wait(pool, ticket("a0", "a", cost=10_000), ticket("b0", "b"), ticket("b1", "b"), ticket("a1", "a"))
    assert pool.leave("a0") == Granted()
    assert serve(pool, "x") == ["b0", "a1", "b1"]


def test_bands_get_their_guarantee_and_borrow_what_is_idle(pool: Pool) -> None:
    pool.room = Room(4, shares=(50, 50, 0, 0))
    batch = [ticket(f"b{n}", "b", band=Band.STANDARD) for n in range(6)]
    for each in batch[:4]:
        assert pool.enter(each) == GRANTED
    wait(pool, *batch[4:], *(ticket(f"c{n}", "c", band=Band.CRITICAL) for n in range(3)))
    assert pool.leave("b0").ids == ("c0",)
    assert pool.leave("b1").ids == ("c1",)
    assert pool.leave("b2").ids == ("b4",), "critical has what it is guaranteed"


def test_a_request_that_does_not_fit_keeps_others_from_borrowing_but_not_from_their_guarantee(pool: Pool) -> None:
    pool.room = Room(100, tokens=100, shares=(50, 30, 15, 5))
    fill(pool, "x", make=lambda id: ticket(id, "x", tokens=50, band=Band.STANDARD))
    wait(pool, ticket("long", "l", tokens=60, band=Band.BATCH))
    assert pool.enter(ticket("c", "c", tokens=40, band=Band.CRITICAL)) == GRANTED
    assert pool.enter(ticket("s", "s", tokens=6, band=Band.SHEDDABLE)).state is State.WAITING, "beyond 5 %"
    assert pool.leave("x").ids == ("long",)


def test_queues_are_bounded_by_tenant_and_in_all(pool: Pool) -> None:
    pool.room = Room(1, max_waiting=4, max_waiting_per_tenant=2)
    fill(pool, "x")
    wait(pool, ticket("a0", "a"), ticket("a1", "a", band=Band.BATCH))
    assert pool.enter(ticket("a2", "a")).reason == "tenant_full"
    wait(pool, ticket("b0", "b", band=Band.SHEDDABLE), ticket("c0", "c"))
    assert pool.enter(ticket("d0", "d")).reason == "pool_full"
    assert pool.enter(ticket("a2", "a")).state is State.REFUSED, "a refusal leaves nothing behind"
    assert pool.standing().waiting == (0, 2, 1, 1)


def test_sheddable_requests_may_take_half_of_the_queue(pool: Pool) -> None:
    pool.room = Room(1, max_waiting=4)
    fill(pool, "x")
    wait(pool, *(ticket(f"s{n}", band=Band.SHEDDABLE) for n in range(2)))
    assert pool.enter(ticket("s2", band=Band.SHEDDABLE)).reason == "pool_full"
    wait(pool, ticket("a"))


def test_without_patience_it_is_a_place_now_or_none(pool: Pool) -> None:
    assert pool.enter(ticket("a", max_wait_us=0)) == GRANTED
    fill(pool, "b")
    assert pool.enter(ticket("c", max_wait_us=0)).reason == "too_late"
    assert sum(pool.standing().waiting) == 0
    assert pool.leave("a") == Granted()
    assert pool.enter(ticket("c", max_wait_us=0)) == GRANTED


def test_the_wait_is_predicted_from_the_pace_of_releases(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "r0")
    wait(pool, *(ticket(f"r{n}") for n in range(1, 9)))
    for n in range(5):
        pool.clock.pass_(200_000)
        assert pool.leave(f"r{n}").ids == (f"r{n + 1}",)
        pool.renew(held=[ticket(f"r{n + 1}")])
    assert pool.standing().release_interval_us == 200_000
    answer = pool.enter(ticket("late", max_wait_us=799_999))
    assert (answer.state, answer.reason, answer.position, answer.wait_us) == (State.REFUSED, "too_late", 3, 800_000)
    assert pool.enter(ticket("patient", max_wait_us=800_000)).wait_us == 800_000
    pool.clock.pass_(1_200_000)
    assert pool.standing().release_interval_us == 300_000, "a pool that stalls is slower than it was"


def test_an_old_pace_says_nothing(pool: Pool) -> None:
    test_the_wait_is_predicted_from_the_pace_of_releases(pool)
    for id in ("r5", "r6", "r7", "r8", "patient"):
        pool.leave(id)
    assert pool.standing().release_interval_us > 0
    pool.clock.pass_(301 * SECOND_US)
    assert pool.standing().release_interval_us == 0


def test_positions_count_own_requests_and_the_turns_of_others(pool: Pool) -> None:
    fill(pool, "x", "y", make=lambda id: ticket(id, "other"))
    assert wait(pool, *(ticket(f"a{n}", "a") for n in range(3))) == [0, 1, 2]
    assert wait(pool, *(ticket(f"b{n}", "b") for n in range(3))) == [1, 3, 5]
    assert wait(pool, ticket("c", "c", band=Band.CRITICAL)) == [0]
    assert wait(pool, ticket("s", "s", band=Band.BATCH)) == [3], "1 x 30/15 of standard and 1 of critical"


def test_a_grant_to_another_gateway_is_told(pool: Pool) -> None:
    fill(pool, "a", "b")
    wait(pool, ticket("c", gateway="g2"), ticket("d"))
    assert pool.leave("a", "g1") == Granted()
    assert pool.take_told() == [("g2", "c")]
    assert pool.leave("b", "g1") == Granted(("d",))
    assert pool.take_told() == []


def test_an_unconfirmed_grant_goes_to_the_next(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "a")
    wait(pool, ticket("b", gateway="g2"), ticket("c"))
    pool.leave("a")
    pool.clock.pass_(2 * SECOND_US)
    assert pool.renew(waiting=["c"]).granted == ("c",)
    assert pool.renew("g2", waiting=["b"]).lost == ("b",)


def test_a_confirmed_grant_is_a_place_for_a_lease(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "a")
    wait(pool, ticket("b"))
    assert pool.leave("a").ids == ("b",)
    pool.renew(held=[ticket("b")])
    pool.clock.pass_(29 * SECOND_US)
    assert sum(pool.standing().running) == 1
    pool.clock.pass_(1 * SECOND_US)
    assert sum(pool.standing().running) == 0


def test_a_message_that_was_lost_is_made_up_for_by_a_renewal(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "a")
    wait(pool, ticket("b", gateway="g2"))
    pool.leave("a")
    pool.take_told()
    pool.clock.pass_(1_900_000)
    assert pool.renew("g2", waiting=["b"]).granted == ("b",)
    pool.clock.pass_(1_900_000)
    assert sum(pool.standing().running) == 1, "its gateway has just been told"


def test_a_dead_gateway_loses_its_places_and_is_passed_over(pool: Pool) -> None:
    pool.room = Room(200)
    fill(pool, *(f"d{n}" for n in range(150)), make=lambda id: ticket(id, gateway="dead"))
    pool.room = Room(150)
    wait(pool, *(ticket(f"w{n}", "first", gateway="dead") for n in range(3)), ticket("alive", "second"))
    pool.clock.pass_(29 * SECOND_US)
    pool.renew(waiting=["alive"])
    assert pool.standing().waiting == (0, 1, 0, 0), "requests of the dead are dropped"
    pool.clock.pass_(1 * SECOND_US)
    assert pool.renew(waiting=["alive"]).granted == ("alive",)
    for _ in range(3):  # a bounded number at a time
        pool.renew()
    pool.renew(held=[ticket("alive")])
    assert sum(pool.standing().running) == 1


def test_a_gateway_that_was_silent_for_a_moment_keeps_its_turn(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "a", make=lambda id: ticket(id, gateway="g2"))
    wait(pool, ticket("b", gateway="g1"))
    pool.clock.pass_(3 * SECOND_US)
    assert pool.leave("a", "g2") == Granted()
    assert pool.take_told() == [("g1", "b")]


def test_a_place_the_store_has_lost_is_put_back_even_without_room(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "a")
    pool.clock.pass_(31 * SECOND_US)
    fill(pool, "b")
    pool.renew(held=[ticket("a")])
    assert sum(pool.standing().running) == 2
    assert pool.enter(ticket("c")).state is State.WAITING


def test_a_late_renewal_does_not_bring_back_who_has_left(pool: Pool) -> None:
    fill(pool, "a")
    pool.leave("a")
    pool.renew(held=[ticket("a")])
    assert sum(pool.standing().running) == 0


def test_five_hundred_places_of_a_dead_gateway_come_back(pool: Pool) -> None:
    pool.room = Room(500)
    fill(pool, *(f"d{n}" for n in range(500)), make=lambda id: ticket(id, gateway="dead"))
    pool.clock.pass_(30 * SECOND_US)
    for _ in range(8):
        pool.standing()
    assert pool.standing().running == (0, 0, 0, 0)
    assert pool.standing().tokens == 0


def test_endless_new_tenants_do_not_starve_one(pool: Pool) -> None:
    pool.room = Room(1)
    fill(pool, "x", make=lambda id: ticket(id, "x"))
    wait(pool, ticket("z", "zzz"))
    running = "x"
    for n in range(3):
        wait(pool, ticket(f"n{n}", f"a{n}"))
        running = pool.leave(running).ids[0]
        if running == "z":
            return
    raise AssertionError("equal tags have to go by arrival")


def test_tags_start_again_before_they_lose_their_exactness(pool: Pool) -> None:
    pool.room = Room(1, max_waiting=8)
    heavy = 10**12
    fill(pool, "r0", make=lambda id: ticket(id, "t0", cost=heavy, weight=0.001))
    running = "r0"
    for n in range(1, 2200):
        wait(pool, ticket(f"r{n}", f"t{n % 2}", cost=heavy, weight=0.001))
        (running,) = pool.leave(running).ids
        assert running == f"r{n}"


def test_pools_have_nothing_to_do_with_each_other(pool: Pool) -> None:
    fill(pool, "a", "b")
    places = pool.halves[0].places
    assert drive(places.enter("other", ticket("a"), pool.room)) == GRANTED
    assert sum(drive(places.standing("other")).running) == 1
    assert POOL != "other"
