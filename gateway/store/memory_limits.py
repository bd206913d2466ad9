"""The limiter of one process, and the specification of the others: everything is decided in plain synchronous code.

`Limiter` knows no clock: every call is given `now_us`, microseconds since 1970. `MemoryLimits` puts a clock around it.
The rules, which the Lua scripts of `gateway.store.redis` follow number for number:

*Rates.* A cost of `c` moves a mark by `charge = ceil(c x 60,000,000 / per_minute)` microseconds, from where it lies or
from now, whichever is later. It may go `burst = floor(burst x 60,000,000 / per_minute)` ahead of now: a request that is
too early is told to wait `mark - now - max(0, burst - charge)`. At 600 a minute with a burst of 10, ten requests at
once put the mark 1 s ahead, and the eleventh waits for 100 ms. A cost of nothing is never refused. A mark in the past
is the same as one that is now, in every operation, so what is idle can be forgotten. The exact bound: in every
interval, what was admitted, less what was given back, is at most `burst + per_minute x minutes`.

*Concurrency.* A lease is held from its admission until, and not including, the moment it runs out.

*Money.* A scope has one sum of what its leases reserve. What a request used counts when it is settled, in the period
which the store is in by then: a later one that a request named takes the place of an earlier one, never the other way
round, and reservations go on from one to the next. Leases that ran out are dropped `prune` at a time, but never does
their money refuse a request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil

from gateway.store.limit_state import CHARGED, FREE, LEASED, Plan, Rule, State, read
from gateway.store.limits import Admission, Cost, Held, Reading, Refusal, Scope, Unit

PRUNE = 64
"""Leases that ran out which one operation drops from each scope, unless their money would refuse a request."""
RECORD_US = 25 * 3600 * 1_000_000
"""How long an admission that is never settled is remembered: the longest exchange, a day, and a margin."""
TOMBSTONE_US = 60_000_000
MAX_TOMBSTONES = 1_000_000
"""Settled and cancelled ids in memory. Beyond it, which takes 17,000 requests a second, the oldest go early."""
MAX_PLANS = 4096
SWEEP_EVERY_US = 250_000
SWEEP_SCOPES = 256
"""Looked at every `SWEEP_EVERY_US`, besides two for each new one: below 0.1 ms at once."""

NAMES = tuple(unit.name.lower() for unit in Unit)
_address = id
"""Under a name that requests' ids do not hide."""

_Record = tuple[int, Sequence[int], Admission | None]
"""An admission that is not settled yet: until when it is remembered, how each scope was charged, and the answer."""


class Limiter:
    """The operations of `Limits`. Time that goes back counts as standing still.

    A scope names each unit and each kind of budget at most once, and a request each scope.
    """

    def __init__(self, *, prune: int = PRUNE, echoes: bool = True) -> None:
        self._prune = prune
        self._echoes = echoes
        """Whether a message may come late or twice, so that ids that have ended are remembered."""
        self._now_us = 0
        self._states: dict[str, State] = {}
        self._rounds: deque[str] = deque()
        """Every scope that has a state, each once, in the order in which they are looked at for being idle."""
        self._new_states = 0
        self._swept_us = 0
        self._records: dict[str, _Record] = {}
        self._records_swept_us = 0
        self._ended: dict[str, int] = {}
        """Settled and cancelled ids, and how long they are remembered."""
        self._ends: deque[str] = deque()
        self._plans: dict[int, Plan] = {}
        self._epoch = 0
        """Counts how often states were forgotten."""

    def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int, now_us: int) -> Admission:
        now_us = self._at(now_us)
        ready = self._plans.get(_address(scopes))
        if ready is None or ready.scopes is not scopes:
            ready = self._plan(scopes)
        if ready.simple and id not in self._records and id not in self._ended:
            answer = self._admit_at_once(ready, id, cost, lease_us, now_us)
            if answer is not None:
                return answer
        plan = ready.rules
        record = self._records.get(id)
        if record is not None and record[0] > now_us:
            return record[2] if record[2] is not None else self._look(plan, now_us, admitted=True)
        if self._ended.get(id, 0) > now_us:
            return self._look(plan, now_us, admitted=False)
        micros = cost.micros
        costs = (cost.requests, cost.input, cost.output, cost.total)
        states, marks_us, in_use, spent_micros, charges_us, refusals = self._judge(plan, costs, micros, now_us)
        charged: Sequence[int] = (CHARGED,) * len(plan)
        if refusals:
            if not all(refusal.shadow for refusal in refusals):
                found = tuple(marks_us), tuple(in_use), tuple(spent_micros)
                return Admission(False, now_us, *found, tuple(refusals))
            charged = [CHARGED] * len(plan)
            for refusal in refusals:
                charged[refusal.scope] = FREE
        rate = used = budget = 0
        for rule, state, how in zip(plan, states, charged, strict=False):
            _, rates, concurrent, budgets, leased, _ = rule
            if how:
                marks = state.marks_us
                for one_rate in rates:
                    marks_us[rate] = marks[one_rate[0]] = marks_us[rate] + charges_us[rate]
                    rate += 1
            else:
                rate += len(rates)
            if leased:
                if how:
                    state.hold(id, micros, now_us + lease_us)
                if concurrent is not None:
                    in_use[used] += how
                    used += 1
                for one in budgets:
                    if how:
                        spent_micros[budget] += micros
                        state.budgets[one[0]] = state.budget(one, now_us)
                    budget += 1
        answer = Admission(
            True, now_us, tuple(marks_us), tuple(in_use), tuple(spent_micros), tuple(refusals) if refusals else ()
        )
        self._records[id] = (now_us + RECORD_US, charged, answer)
        return answer

    def _admit_at_once(self, plan: Plan, id: str, cost: Cost, lease_us: int, now_us: int) -> Admission | None:
        """`admit` for a new request that nothing speaks against, of scopes without money; None, and nothing is changed,
        if it is not that simple."""
        if plan.epoch != self._epoch:
            self._bind(plan)
        costs = (cost.requests, cost.input, cost.output, cost.total)
        marks_us = []
        for marks, unit, per_minute, burst, burst_us in plan.rates:
            units = costs[unit]
            mark_us = marks[unit]
            if mark_us < now_us:
                mark_us = now_us
            mark_us += ceil(units * 6e7 / per_minute)
            if units > burst or mark_us > now_us + burst_us:
                return None
            marks_us.append(mark_us)
        in_use: list[int] = []
        for state, concurrent in plan.leased:
            leases = state.leases
            live = len(leases)
            if live >= concurrent or (live and leases[0][0] <= now_us):
                return None
            in_use.append(live + 1)
        for rate, mark_us in zip(plan.rates, marks_us, strict=False):
            rate[0][rate[1]] = mark_us
        for state, _ in plan.leased:
            state.hold(id, cost.micros, now_us + lease_us)
        answer = Admission(True, now_us, tuple(marks_us), tuple(in_use), ())
        self._records[id] = (now_us + RECORD_US, plan.charged, answer)
        return answer

    def _bind(self, plan: Plan) -> None:
        rates: list[tuple[list[int], int, int, int, int]] = []
        leased: list[tuple[State, int]] = []
        for rule in plan.rules:
            state = self._state(rule.key)
            rates += [(state.marks_us, unit, each, burst, most_us) for unit, each, burst, most_us, _ in rule.rates]
            if rule.concurrent is not None:
                leased.append((state, rule.concurrent))
        plan.rates, plan.leased, plan.epoch = tuple(rates), tuple(leased), self._epoch

    def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost, now_us: int) -> bool:
        return self._end(id, scopes, reserved, used, self._at(now_us))

    def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost, now_us: int) -> bool:
        now_us = self._at(now_us)
        if self._end(id, scopes, reserved, Cost(0), now_us):
            return True
        if self._ended.get(id, 0) <= now_us:
            self._bury(id, now_us)
        return False

    def renew(self, held: Sequence[Held], lease_us: int, now_us: int) -> None:
        now_us = self._at(now_us)
        for one in held:
            record = self._records.get(one.id)
            plan = self._plan(one.scopes).rules
            if record is None or record[0] <= now_us:
                if self._ended.get(one.id, 0) > now_us:
                    continue
                record = self._records[one.id] = (now_us + RECORD_US, (LEASED,) * len(plan), None)
            for rule, how in zip(plan, record[1], strict=True):
                if how and rule.leased:
                    state = self._state(rule.key)
                    state.drop_all_expired(now_us)
                    state.hold(one.id, one.reserved.micros, now_us + lease_us)

    def read(self, scopes: Sequence[Scope], now_us: int) -> list[Reading]:
        """How the scopes stand. Nothing is changed, and no state is made of a scope that has none."""
        now_us = max(now_us, self._now_us)
        return [read(self._states.get(scope.key), scope, now_us) for scope in scopes]

    def __len__(self) -> int:
        """Scopes, unsettled admissions and ended ids in memory."""
        return len(self._states) + len(self._records) + len(self._ended)

    def _judge(
        self, plan: tuple[Rule, ...], costs: tuple[int, int, int, int], micros: int, now_us: int
    ) -> tuple[list[State], list[int], list[int], list[int], list[int], list[Refusal] | None]:
        """The scopes' states, their marks, leases and spend without this request, its charges, and who says no."""
        states: list[State] = []
        marks_us: list[int] = []
        in_use: list[int] = []
        spent_micros: list[int] = []
        charges_us: list[int] = []
        refusals: list[Refusal] | None = None
        known = self._states
        for key, rates, concurrent, budgets, leased, shadow in plan:
            state = known.get(key)
            if state is None:
                state = self._state(key)
            states.append(state)
            for unit, per_minute, burst, burst_us, largest in rates:
                mark_us = state.marks_us[unit]
                if mark_us < now_us:
                    mark_us = now_us
                marks_us.append(mark_us)
                units = costs[unit]
                charge_us = ceil(units * 6e7 / per_minute)  # in floating point, as Lua has it: exact up to 1.5e8 units
                charges_us.append(charge_us)
                wait_us = mark_us - now_us
                if units <= burst and charge_us < burst_us:
                    wait_us -= burst_us - charge_us
                if units and (wait_us > 0 or units > largest):
                    refusals = [] if refusals is None else refusals
                    refusal = Refusal(len(states) - 1, NAMES[unit], -1 if units > largest else wait_us, shadow)
                    refusals.append(refusal)
            if leased:
                no = self._judge_leases(state, concurrent, budgets, micros, now_us, in_use, spent_micros)
                if no:
                    refusals = [] if refusals is None else refusals
                    refusals.extend([Refusal(len(states) - 1, limit, wait_us, shadow) for limit, wait_us in no])
        return states, marks_us, in_use, spent_micros, charges_us, refusals

    def _judge_leases(
        self,
        state: State,
        concurrent: int | None,
        budgets: tuple[tuple[str, str, int, int, int], ...],
        micros: int,
        now_us: int,
        in_use: list[int],
        spent_micros: list[int],
    ) -> list[tuple[str, int]] | None:
        """Adds to `in_use` and `spent_micros`; who says no, and for how long."""
        no: list[tuple[str, int]] | None = None
        leases = state.leases
        if leases and leases[0][0] <= now_us:
            state.drop_all_expired(now_us)
            state.prune(now_us, self._prune)
        if concurrent is not None:
            gone = bisect_left(leases, (now_us + 1,)) if leases and leases[0][0] <= now_us else 0
            live = len(leases) - gone
            in_use.append(live)
            if live >= concurrent:
                no = [("concurrent", leases[gone + live - concurrent][0] - now_us if concurrent else -1)]
        if not budgets:
            return no
        spent = [state.budget(budget, now_us)[1] for budget in budgets]
        if micros:
            for (_, period, limit, _, _), already in zip(budgets, spent, strict=True):
                room = limit - already - micros
                while 0 <= room < state.reserved_micros and leases and leases[0][0] <= now_us:
                    state.prune(now_us, self._prune)
                if room < state.reserved_micros:
                    no = [] if no is None else no
                    no.append((period, -1 if room < 0 or not leases else leases[0][0] - now_us))
        spent_micros.extend([already + state.reserved_micros for already in spent])
        return no

    def _look(self, plan: tuple[Rule, ...], now_us: int, *, admitted: bool) -> Admission:
        """How things are, without any charge."""
        _, marks_us, in_use, spent_micros, _, _ = self._judge(plan, (0, 0, 0, 0), 0, now_us)
        return Admission(admitted, now_us, tuple(marks_us), tuple(in_use), tuple(spent_micros))

    def _end(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost, now_us: int) -> bool:
        record = self._records.pop(id, None)
        if record is None or record[0] <= now_us:
            return False
        before = (reserved.requests, reserved.input, reserved.output, reserved.total)
        after = (used.requests, used.input, used.output, used.total)
        plan = self._plans.get(_address(scopes))
        if plan is None or plan.scopes is not scopes:
            plan = self._plan(scopes)
        if plan.simple and record[1] is plan.charged:
            self._end_simply(plan, id, before, after, now_us)
            self._bury(id, now_us)
            return True
        for (key, rates, _, budgets, leased, _), how in zip(plan.rules, record[1], strict=False):
            if not how:
                continue
            state = self._states.get(key)
            if state is None:
                state = self._state(key)
            if how == CHARGED:
                for unit, per_minute, _, _, _ in rates:
                    if before[unit] != after[unit]:
                        mark_us = state.marks_us[unit]
                        if mark_us < now_us:
                            mark_us = now_us
                        mark_us += ceil(after[unit] * 6e7 / per_minute) - ceil(before[unit] * 6e7 / per_minute)
                        state.marks_us[unit] = mark_us if mark_us > now_us else now_us
            if leased:
                if state.lease_until_us <= now_us:
                    state.drop_all_expired(now_us)
                else:
                    state.let_go(id)
                for budget in budgets:
                    period, spent, ends_at_us = state.budget(budget, now_us)
                    state.budgets[budget[0]] = (period, spent + used.micros, ends_at_us)
        self._bury(id, now_us)
        return True

    def _end_simply(
        self, plan: Plan, id: str, before: tuple[int, int, int, int], after: tuple[int, int, int, int], now_us: int
    ) -> None:
        """`_end` of what was charged everywhere, in scopes without money."""
        if plan.epoch != self._epoch:
            self._bind(plan)
        for marks, unit, per_minute, _, _ in plan.rates:
            reserved, used = before[unit], after[unit]
            if reserved != used:
                mark_us = marks[unit]
                if mark_us < now_us:
                    mark_us = now_us
                mark_us += ceil(used * 6e7 / per_minute) - ceil(reserved * 6e7 / per_minute)
                marks[unit] = mark_us if mark_us > now_us else now_us
        for state, _ in plan.leased:
            if state.lease_until_us <= now_us:
                state.drop_all_expired(now_us)
            else:
                state.let_go(id)

    def _bury(self, id: str, now_us: int) -> None:
        if not self._echoes:
            return
        ended, ends = self._ended, self._ends
        while id in ended:  # it is overdue, and so are all before it; it must not be in the queue twice
            del ended[ends.popleft()]
        ended[id] = now_us + TOMBSTONE_US
        ends.append(id)
        if ended[ends[0]] <= now_us or len(ends) > MAX_TOMBSTONES:
            del ended[ends.popleft()]
            if ended[ends[0]] <= now_us:  # twice what is added, so that they never pile up
                del ended[ends.popleft()]

    def _at(self, now_us: int) -> int:
        if self._new_states:
            self._sweep(2 * self._new_states)  # twice what was added, so that idle scopes never pile up
            self._new_states = 0
        if now_us <= self._now_us:
            return self._now_us
        self._now_us = now_us
        if now_us >= self._swept_us:
            self._swept_us = now_us + SWEEP_EVERY_US
            self._sweep(SWEEP_SCOPES)
        return now_us

    def _state(self, key: str) -> State:
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = State()
            self._new_states += 1  # nothing is swept before the operation is over: it would take this one
            self._rounds.append(key)
        return state

    def _sweep(self, scopes: int) -> None:
        """Forget what is idle among the next few scopes, and now and then the admissions that nobody settled."""
        for _ in range(min(scopes, len(self._rounds))):
            key = self._rounds.popleft()
            if self._states[key].idle(self._now_us):
                del self._states[key]
                self._epoch += 1
            else:
                self._rounds.append(key)
        for _ in range(min(scopes, len(self._ends))):
            if self._ended[self._ends[0]] > self._now_us:
                break
            del self._ended[self._ends.popleft()]
        if self._now_us >= self._records_swept_us:
            self._records_swept_us = self._now_us + RECORD_US // 16
            for id in [id for id, record in self._records.items() if record[0] <= self._now_us]:
                del self._records[id]

    def _plan(self, scopes: Sequence[Scope]) -> Plan:
        """Found by identity: callers use the same tuple for many requests."""
        plan = self._plans.get(_address(scopes))
        if plan is not None and plan.scopes is scopes:
            return plan
        plan = Plan(scopes)
        if isinstance(scopes, tuple):  # a list could change
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[_address(scopes)] = plan
        return plan


class MemoryLimits:
    """`Limits` in this process. `clock_us` gives microseconds since 1970; it may jump, but is not followed back.

    The `_now` methods are the same operations for whoever must not suspend between two of them. Nobody else's messages
    can come late or twice: with `echoes` off no id is remembered, which spares memory and its cache misses.
    """

    def __init__(self, clock_us: Callable[[], int] | None = None, *, echoes: bool = True) -> None:
        self._clock_us = clock_us or _unix_us
        self._limiter = Limiter(echoes=echoes)

    def admit_now(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int) -> Admission:
        return self._limiter.admit(id, scopes, cost, lease_us, self._clock_us())

    def settle_now(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost) -> bool:
        return self._limiter.settle(id, scopes, reserved, used, self._clock_us())

    def cancel_now(self, id: str, scopes: Sequence[Scope], reserved: Cost) -> bool:
        return self._limiter.cancel(id, scopes, reserved, self._clock_us())

    def renew_now(self, held: Sequence[Held], lease_us: int) -> None:
        self._limiter.renew(held, lease_us, self._clock_us())

    def read_now(self, scopes: Sequence[Scope]) -> list[Reading]:
        return self._limiter.read(scopes, self._clock_us())

    async def read(self, scopes: Sequence[Scope]) -> list[Reading]:
        return self.read_now(scopes)

    async def admit(self, id: str, scopes: Sequence[Scope], cost: Cost, lease_us: int) -> Admission:
        return self.admit_now(id, scopes, cost, lease_us)

    async def settle(self, id: str, scopes: Sequence[Scope], reserved: Cost, used: Cost) -> bool:
        return self.settle_now(id, scopes, reserved, used)

    async def cancel(self, id: str, scopes: Sequence[Scope], reserved: Cost) -> bool:
        return self.cancel_now(id, scopes, reserved)

    async def renew(self, held: Sequence[Held], lease_us: int) -> None:
        self.renew_now(held, lease_us)


def _unix_us() -> int:
    return time.time_ns() // 1000
