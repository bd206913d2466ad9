"""The limiter in memory and the scripts in a real Redis, side by side on one clock: every answer is the same.

Gateways admit, settle, cancel and renew, say things twice or late, and crash, which is that they never settle. What was
admitted is held against the guarantees of the limits: no interval sees more than burst and rate allow, there are never
more leases than may be, and what is taken comes back without anybody's help.
"""

from __future__ import annotations

from dataclasses import dataclass

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from gateway.store.limits import US_PER_MINUTE, Admission, Budget, Cost, Held, Rate, Scope, Unit
from gateway.store.memory_limits import RECORD_US, TOMBSTONE_US, Limiter
from tests.gateway.store.limits.limiter_halves import START_US, Lua
from tests.support.effort import LONG
from tests.support.redis_server import RedisServer

EXAMPLES = 150 if LONG else 60
STEPS = 50
DAY_US = 86_400_000_000
PERIODS = (("d20261118", START_US + DAY_US), ("d20261119", START_US + 2 * DAY_US), ("d20261120", 0))

amounts = st.one_of(st.just(0), st.integers(1, 12), st.integers(0, 200))
costs = st.builds(Cost, st.sampled_from((1, 1, 1, 0, 3)), amounts, amounts, amounts, amounts)
leases_us = st.sampled_from((1, 1_000_000, 1_000_001, 5_000_000, 60_000_000))
steps_us = st.one_of(
    st.integers(0, 3),
    st.integers(0, 2_000_000),
    st.sampled_from((1_000_000, 5_000_000, 60_000_000, TOMBSTONE_US - 1, DAY_US, RECORD_US)),
)


@st.composite
def rates(draw: st.DrawFn, unit: Unit) -> Rate:
    burst = draw(st.integers(1, 40))
    per_minute = draw(st.sampled_from((1, 7, 60, 333, 60_000, 7_000_001)))
    return Rate(unit, per_minute, burst, burst + draw(st.sampled_from((0, 0, 30, 1000))))


@st.composite
def scopes_of(draw: st.DrawFn, key: str) -> Scope:
    units = draw(st.lists(st.sampled_from(list(Unit)), unique=True, max_size=3))
    concurrent = draw(st.one_of(st.none(), st.integers(0, 4)))
    budgets = []
    if draw(st.booleans()):
        budgets.append(Budget("", draw(st.integers(0, 400))))
    if draw(st.integers(0, 3)) == 0:
        budgets.append(Budget("m202611", draw(st.integers(0, 900)), 0, START_US + 20 * DAY_US))
    return Scope(
        key, tuple(draw(rates(unit)) for unit in units), concurrent, tuple(budgets), draw(st.integers(0, 4)) == 0
    )


@dataclass
class Request:
    """One that was sent at least once."""

    id: str
    scopes: tuple[Scope, ...]
    cost: Cost
    answer: Admission
    ended: bool = False
    put_back: bool = False
    """Never admitted, as far as the store knows: a renewal brought it."""


class SideBySide(RuleBasedStateMachine):
    """Times are microseconds from `START_US`; ids are numbers."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.memory = Limiter(prune=2)
        self.lua = Lua(self.client, prune=2)
        self.now_us = START_US
        self.requests: list[Request] = []
        self.scopes: tuple[Scope, ...] = ()
        self.taken: dict[tuple[str, Unit], list[tuple[int, int, int]]] = {}
        self.ids = 0

    @initialize(data=st.data())
    def limits(self, data: st.DataObject) -> None:
        self.scopes = tuple(data.draw(scopes_of(key)) for key in ("{t}:key:a", "{t}:tenant", "{m}:model:x"))

    def _named(self, which: list[int], period: int, floor_micros: int) -> tuple[Scope, ...]:
        """Some of the scopes, as a gateway sees them that knows this period and this spend."""
        name, ends_at_us = PERIODS[period]
        named = []
        for scope in (self.scopes[index] for index in which):
            budgets = tuple(
                budget if budget.period else Budget(name, budget.limit_micros, floor_micros, ends_at_us)
                for budget in scope.budgets
            )
            named.append(Scope(scope.key, scope.rates, scope.concurrent, budgets, scope.shadow))
        return tuple(named)

    @rule(step_us=steps_us)
    def time_passes(self, step_us: int) -> None:
        self.now_us += step_us

    @rule(
        which=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        cost=costs,
        lease_us=leases_us,
        period=st.integers(0, 2),
        floor_micros=st.sampled_from((0, 0, 100, 500)),
    )
    def admit(self, which: list[int], cost: Cost, lease_us: int, period: int, floor_micros: int) -> None:
        scopes = self._named(which, period, floor_micros)
        id = self._new_id()
        answer = self._admit(id, scopes, cost, lease_us)
        self.requests.append(Request(id, scopes, cost, answer))
        if not answer.admitted:
            assert any(not refusal.shadow for refusal in answer.refusals)
            assert all(refusal.wait_us != 0 for refusal in answer.refusals)
            return
        free = {refusal.scope for refusal in answer.refusals}
        self._hold_to_the_limits(scopes, cost, answer, free)

    def _new_id(self) -> str:
        self.ids += 1
        return f"req-{self.ids}"

    def _admit(self, id: str, scopes: tuple[Scope, ...], cost: Cost, lease_us: int) -> Admission:
        answer = self.memory.admit(id, scopes, cost, lease_us, self.now_us)
        assert self.lua.admit(id, scopes, cost, lease_us, self.now_us) == answer
        return answer

    def _hold_to_the_limits(self, scopes: tuple[Scope, ...], cost: Cost, answer: Admission, free: set[int]) -> None:
        in_use = iter(answer.in_use)
        spent = iter(answer.spent_micros)
        for index, scope in enumerate(scopes):
            live = next(in_use) if scope.concurrent is not None else 0
            sums = [next(spent) for _ in scope.budgets]
            if index in free:
                continue
            for rate in scope.rates:
                units = (cost.requests, cost.input, cost.output, cost.total)[rate.unit]
                self._take(scope.key, rate, units)
            assert scope.concurrent is None or live <= scope.concurrent
            if cost.micros:
                assert all(used <= budget.limit_micros for used, budget in zip(sums, scope.budgets, strict=True))

    def _take(self, key: str, rate: Rate, units: int) -> None:
        """In every interval that ends now, at most burst + rate x time. What one takes beyond a burst is owed."""
        taken = self.taken.setdefault((key, rate.unit), [])
        total, slack = min(units, rate.burst), 0
        for at_us, before, settled in reversed(taken):
            total += before
            slack += settled  # charges are rounded up to 1 us, so the difference of two may be 1 us too small
            allowed = rate.burst * US_PER_MINUTE + (self.now_us - at_us + slack) * rate.per_minute
            assert not units or total * US_PER_MINUTE <= allowed, (rate, taken, units)
        taken.append((self.now_us, units, 0))

    def _give(self, request: Request, used: Cost) -> None:
        """A settlement counts as taken or given back when it comes."""
        if request.put_back:
            return
        free = {refusal.scope for refusal in request.answer.refusals}
        for index, scope in enumerate(request.scopes):
            for rate in scope.rates if index not in free else ():
                before = (request.cost.requests, request.cost.input, request.cost.output, request.cost.total)[rate.unit]
                after = (used.requests, used.input, used.output, used.total)[rate.unit]
                if after != before:
                    self.taken.setdefault((scope.key, rate.unit), []).append((self.now_us, after - before, 1))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), used=costs)
    def settle(self, data: st.DataObject, used: Cost) -> None:
        request = data.draw(st.sampled_from(self.requests))
        done = self.memory.settle(request.id, request.scopes, request.cost, used, self.now_us)
        assert self.lua.settle(request.id, request.scopes, request.cost, used, self.now_us) == done
        assert not (done and request.ended)
        if done:
            request.ended = True
            self._give(request, used)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        done = self.memory.cancel(request.id, request.scopes, request.cost, self.now_us)
        assert self.lua.cancel(request.id, request.scopes, request.cost, self.now_us) == done
        if done:
            request.ended = True
            self._give(request, Cost(0))

    @rule(cost=costs)
    def cancel_comes_first(self, cost: Cost) -> None:
        id = self._new_id()
        scopes = self._named([0, 1], 0, 0)
        assert not self.memory.cancel(id, scopes, cost, self.now_us)
        assert not self.lua.cancel(id, scopes, cost, self.now_us)
        answer = self._admit(id, scopes, cost, 1_000_000)
        assert not answer.admitted
        assert answer.refusals == ()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def admit_twice(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        forgotten = self.now_us >= request.answer.now_us + RECORD_US
        if not request.answer.admitted or request.ended or request.put_back or forgotten:
            return
        assert self._admit(request.id, request.scopes, request.cost, 1_000_000) == request.answer

    @precondition(lambda self: any(request.ended for request in self.requests))
    @rule(data=st.data())
    def admit_an_echo(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([one for one in self.requests if one.ended]))
        self.memory.cancel(request.id, request.scopes, request.cost, self.now_us)
        self.lua.cancel(request.id, request.scopes, request.cost, self.now_us)
        answer = self._admit(request.id, request.scopes, request.cost, 1_000_000)
        assert not answer.admitted
        assert answer.refusals == ()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), lease_us=leases_us)
    def renew(self, data: st.DataObject, lease_us: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.requests))), min_size=1, max_size=4, unique=True))
        alive = [self.requests[index] for index in chosen if self.requests[index].answer.admitted]
        alive = [one for one in alive if one.ended or self.now_us < one.answer.now_us + RECORD_US]
        late = [one for one in alive if one.ended and self.memory._ended.get(one.id, 0) <= self.now_us]
        held = [Held(one.id, one.scopes, one.cost) for one in alive if one not in late]
        self.memory.renew(held, lease_us, self.now_us)
        self.lua.renew(held, lease_us, self.now_us)

    @rule(which=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True), cost=costs, lease_us=leases_us)
    def renew_what_the_store_has_lost(self, which: list[int], cost: Cost, lease_us: int) -> None:
        scopes = self._named(which, 1, 0)
        held = [Held(self._new_id(), scopes, cost)]
        self.memory.renew(held, lease_us, self.now_us)
        self.lua.renew(held, lease_us, self.now_us)
        answer = self._admit(held[0].id, scopes, cost, lease_us)
        assert answer.admitted
        self.requests.append(Request(held[0].id, scopes, cost, answer, put_back=True))

    def teardown(self) -> None:
        """Nobody settles any more: in time everything is there again, but for what was spent."""
        if not self.scopes:
            return
        self.now_us += 400 * DAY_US
        scopes = tuple(Scope(scope.key, scope.rates, 100, scope.budgets) for scope in self._named([0, 1, 2], 0, 0))
        answer = self._admit("the last", scopes, Cost(0), 1_000_000)
        assert answer.admitted
        assert set(answer.marks_us) <= {self.now_us}
        assert set(answer.in_use) == {1}
        assert set(answer.spent_micros) <= {0}


def test_memory_and_redis_answer_the_same(redis_server: RedisServer) -> None:
    with redis_server.client() as client:

        class Machine(SideBySide):
            pass

        Machine.client = client
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
