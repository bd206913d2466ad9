"""Memory and Lua side by side on one clock: whatever happens, they answer the same, and no promise is broken."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.store.places import Band, Room, State, Ticket
from tests.gateway.store.places.halves_of_places import START_US, Clock, MemoryHalf, Pool, RedisHalf
from tests.support.redis_server import RedisServer

GATEWAYS = ["g1", "g2", "g3"]
TENANTS = ["a", "b", "B-2", "c.d"]
BANDS = st.sampled_from(list(Band))
WEIGHTS = st.sampled_from([0.001, 0.3, 1.0, 2.0, 7.25, 1e6])
COSTS = st.one_of(st.integers(1, 50), st.integers(1, 200_000), st.just(10**9))
TOKENS = st.one_of(st.integers(0, 30), st.just(1000))
USED = st.one_of(st.none(), st.integers(0, 400_000))
PASSED_US = st.one_of(
    st.integers(0, 1000),
    st.integers(0, 3_500_000),
    st.sampled_from([31_000_000, 61_000_000, 400_000_000, 3_700_000_000]),
)
SHARES = st.sampled_from([(50, 30, 15, 5), (50, 50, 0, 0), (0, 0, 0, 0), (100, 100, 30, 7)])
LIMITS = st.sampled_from([None, None, 0, 20, 40, 40, 100])
ROOMS = st.builds(
    lambda requests, tokens, shares, waiting, own: Room(requests, tokens, shares, waiting, own),
    st.sampled_from([0, 1, 2, 3, 3, 8, 20]),
    LIMITS,
    SHARES,
    st.sampled_from([4, 8, 50]),
    st.sampled_from([2, 5, 50]),
)


class SideBySide(RuleBasedStateMachine):
    redis: ClassVar[RedisHalf]

    @initialize(room=ROOMS)
    def begin(self, room: Room) -> None:
        self.clock = self.redis.clock
        self.clock.now_us = START_US
        self.redis.begin_anew()
        self.memory = MemoryHalf(self.clock)
        self.pool = Pool(self.memory, self.redis)
        self.pool.room = room
        self.tickets: dict[str, Ticket] = {}
        self.running: set[str] = set()
        self.waiting: list[str] = []
        self.left: set[str] = set()
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.drain()

    # ---- what happens ----

    @rule(
        tenant=st.sampled_from(TENANTS),
        gateway=st.sampled_from(GATEWAYS),
        band=BANDS,
        weight=WEIGHTS,
        cost=COSTS,
        tokens=TOKENS,
        max_wait_us=st.sampled_from([0, 1000, 10**12, 10**12, 10**12]),
        times=st.integers(1, 4),
    )
    def enter(self, times: int, **fields: Any) -> None:
        for _ in range(times):
            self.count += 1
            self._enter(Ticket(id=f"req-{self.count}", **fields))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def enter_again(self, data: st.DataObject) -> None:
        self._enter(self.tickets[data.draw(st.sampled_from(sorted(self.tickets)))])

    def _enter(self, ticket: Ticket) -> None:
        self.tickets[ticket.id] = ticket
        self.held_before = set(self.memory.inside()["held"])
        answer = self.pool.enter(ticket)
        if answer.reason == "left":
            assert ticket.id in self.left
        if answer.state is State.GRANTED and ticket.id not in self.running:
            self._granted(ticket.id)
        elif answer.state is State.WAITING and ticket.id not in self.waiting:
            self.waiting.append(ticket.id)
            self.running.discard(ticket.id)
        self._told()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), used=USED)
    def leave_place(self, data: st.DataObject, used: int | None) -> None:
        self._leave(data.draw(st.sampled_from(sorted(self.running))), used)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), used=USED)
    def leave_anything(self, data: st.DataObject, used: int | None) -> None:
        self._leave(data.draw(st.sampled_from(sorted(self.tickets))), used)

    def _leave(self, id: str, used: int | None) -> None:
        self.running.discard(id)
        if id in self.waiting:
            self.waiting.remove(id)
        self.left.add(id)
        self.held_before = set(self.memory.inside()["held"])
        for granted in self.pool.leave(id, self.tickets[id].gateway, used).ids:
            self._granted(granted)
        self._told()

    @rule(gateway=st.sampled_from(GATEWAYS), data=st.data())
    def renew(self, gateway: str, data: st.DataObject) -> None:
        held = [id for id in sorted(self.running) if self.tickets[id].gateway == gateway]
        held = [id for id in held if data.draw(st.integers(0, 4))]
        self._renew(gateway, held)

    @precondition(lambda self: self.tickets)
    @rule(gateway=st.sampled_from(GATEWAYS), data=st.data())
    def renew_anything(self, gateway: str, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.tickets)))
        if id in self.waiting:
            self.waiting.remove(id)
        self._renew(gateway, [id])

    def _renew(self, gateway: str, held: list[str]) -> None:
        mine = [id for id in self.waiting if self.tickets[id].gateway == gateway]
        self.held_before = {*self.memory.inside()["held"], *held}
        renewal = self.pool.renew(gateway, [self.tickets[id] for id in held], mine)
        for id in renewal.lost:
            self.waiting.remove(id)
        for id in renewal.granted:
            self._granted(id)
        self._told()

    @rule(us=PASSED_US)
    def time_passes(self, us: int) -> None:
        self.clock.pass_(us)

    @rule(room=ROOMS)
    def room_changes(self, room: Room) -> None:
        self.pool.room = room

    # ---- what holds ----

    def _told(self) -> None:
        for _, id in self.pool.take_told():
            self._granted(id)

    def _granted(self, id: str) -> None:
        if id in self.waiting:
            self.waiting.remove(id)
        self.running.add(id)
        if id not in self.held_before and id in self.memory.inside()["held"]:
            standing = self.pool.standing()
            assert sum(standing.running) <= self.pool.room.requests
            assert self.pool.room.tokens is None or standing.tokens <= self.pool.room.tokens

    @invariant()
    def the_same_inside(self) -> None:
        assert self.memory.inside() == self.redis.inside()

    @invariant()
    def nothing_is_counted_that_is_not_there(self) -> None:
        inside = self.memory.inside()
        assert sum(inside["numbers"][8:12]) == len(inside["held"])
        assert sum(inside["numbers"][16:20]) == len(inside["queued"])
        assert all(abs(number) < 2**53 for number in inside["numbers"])

    def drain(self) -> None:
        """Everybody who still waits is served in their tenant's order, and in the end nothing is left."""
        room = self.pool.room
        self.pool.room = Room(max(1, room.requests), room.tokens or None, room.shares)
        self.clock.pass_(self.pool.room.gateway_us // 2)
        queue: list[str] = []
        for gateway in GATEWAYS:
            for _ in range(2):
                self._renew(gateway, [])
        numbers = self.memory.inside()["queued"]
        queue = sorted(numbers, key=lambda id: numbers[id])
        served: list[str] = []
        for _ in range(len(queue) + len(self.memory.inside()["held"]) + 1):
            held = sorted(self.memory.inside()["held"])
            if not held:
                break
            self._leave(held[0], None)
            served += [id for id in numbers if id not in served and id not in self.memory.inside()["queued"]]
            for gateway in GATEWAYS:
                self._renew(gateway, [id for id in self.memory.inside()["held"] if self.tickets[id].gateway == gateway])
        standing = self.pool.standing()
        assert (sum(standing.running), standing.tokens, sum(standing.waiting)) == (0, 0, 0)
        assert sorted(served) == sorted(queue)
        self.the_same_inside()


@pytest.fixture
def machine(redis_server: RedisServer) -> Iterator[type[SideBySide]]:
    SideBySide.redis = RedisHalf(redis_server, Clock())
    yield SideBySide
    SideBySide.redis.close()


def test_memory_and_lua_answer_the_same(machine: type[SideBySide]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seed", range(3))
def test_memory_and_lua_are_the_same_inside_after_thousands_of_steps(redis_server: RedisServer, seed: int) -> None:
    """Long queues under load, which short random sequences hardly build up."""
    rng = random.Random(seed)
    clock = Clock()
    memory, redis = MemoryHalf(clock), RedisHalf(redis_server, clock)
    pool = Pool(memory, redis)
    tickets: dict[str, Ticket] = {}
    for number in range(2500):
        if number % 250 == 0:
            limit = rng.choice([None, 60, 200])
            pool.room = Room(rng.choice([2, 6, 12]), limit, rng.choice([(50, 30, 15, 5), (50, 50, 0, 0)]), 60, 25)
        inside = memory.inside()
        held, queued = sorted(inside["held"]), sorted(inside["queued"])
        act = rng.random()
        clock.pass_(rng.choice([0, 7, 1000, 20_000]))
        if act < 0.5:
            new = Ticket(
                f"r{number}", rng.choice(GATEWAYS), rng.choice(TENANTS), rng.choice([0.3, 1.0, 2.0, 7.25]),
                rng.choice(list(Band)), int(100 * rng.paretovariate(1.2)), rng.choice([1, 10, 30, 500]), 10**12,
            )  # fmt: skip
            tickets[new.id] = new
            pool.enter(new)
        elif act < 0.85 and held:
            id = rng.choice(held)
            used = rng.choice([None, int(tickets[id].cost * rng.uniform(0, 4))])
            pool.leave(id, tickets[id].gateway, used)
        elif act < 0.88 and queued:
            id = rng.choice(queued)
            pool.leave(id, tickets[id].gateway)
        elif act < 0.89 and queued:
            pool.enter(tickets[rng.choice(queued)])
        elif act < 0.892:
            clock.pass_(rng.choice([2_100_000, 3_100_000, 30_000_000]))
        else:
            gateway = rng.choice(GATEWAYS)
            mine = [tickets[id] for id in held if tickets[id].gateway == gateway]
            pool.renew(gateway, mine, [id for id in queued if tickets[id].gateway == gateway])
        pool.take_told()
        assert memory.inside() == redis.inside(), (seed, number)
    redis.close()
