"""The limiter in memory has a short way for requests that nothing speaks against; it must not be told from the long."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.store.limit_state import Plan
from gateway.store.limits import Cost, Rate, Scope, Unit
from gateway.store.memory_limits import Limiter

SECOND_US = 1_000_000


class LongWay(Limiter):
    """Takes the long way always."""

    def _plan(self, scopes: Sequence[Scope]) -> Plan:
        plan = super()._plan(scopes)
        plan.simple = False
        return plan


def rates(unit: Unit) -> st.SearchStrategy[Rate]:
    made = st.builds(
        lambda per_minute, burst, above: Rate(unit, per_minute, burst, burst + above),
        st.sampled_from((1, 7, 60, 333, 9_001, 70_000_001)),
        st.integers(1, 40),
        st.integers(0, 20),
    )
    return made


scopes = st.builds(
    lambda key, requests, total, concurrent, shadow: Scope(
        f"{{t}}:{key}", tuple(each for each in (requests, total) if each), concurrent, (), shadow
    ),
    st.sampled_from("abc"),
    st.none() | rates(Unit.REQUESTS),
    st.none() | rates(Unit.TOTAL),
    st.none() | st.integers(0, 3),
    st.booleans(),
)
plans = st.lists(scopes, min_size=1, max_size=3, unique_by=lambda scope: scope.key).map(tuple)
costs = st.builds(lambda requests, total: Cost(requests, total, 0, total), st.integers(0, 2), st.integers(0, 50))
steps = st.tuples(
    st.sampled_from(("admit", "admit", "settle", "cancel")),
    st.integers(0, 5),
    st.integers(0, 2),
    costs,
    st.sampled_from((0, 1, 999, SECOND_US, 20 * SECOND_US, 90 * SECOND_US)),
)


def kept(limiter: Limiter, now_us: int) -> dict[str, tuple[list[int], int]]:
    """Marks ahead of now, and how many leases run."""
    return {
        key: ([max(0, mark_us - now_us) for mark_us in state.marks_us], sum(end > now_us for end, _ in state.leases))
        for key, state in limiter._states.items()
    }


@settings(max_examples=300, deadline=None)
@given(st.lists(plans, min_size=3, max_size=3), st.lists(steps, max_size=40))
def test_the_short_way_leads_where_the_long_one_does(
    known: list[tuple[Scope, ...]], asked: list[tuple[str, int, int, Cost, int]]
) -> None:
    short, long = Limiter(), LongWay()
    now_us = 1_800_000_000 * SECOND_US
    admitted: dict[str, tuple[tuple[Scope, ...], Cost]] = {}
    for kind, number, which, cost, later_us in asked:
        now_us += later_us
        id = f"r{number}"
        if kind == "admit":
            plan = admitted[id][0] if id in admitted else known[which]
            answers = [each.admit(id, plan, cost, 30 * SECOND_US, now_us) for each in (short, long)]
            assert answers[0] == answers[1]
            if answers[0].admitted and id not in admitted:
                admitted[id] = (plan, cost)
        else:
            plan, reserved = admitted.pop(id, (known[which], cost))
            if kind == "settle":
                ended = [each.settle(id, plan, reserved, cost, now_us) for each in (short, long)]
            else:
                ended = [each.cancel(id, plan, reserved, now_us) for each in (short, long)]
            assert ended[0] == ended[1]
        assert len(short) == len(long)
        assert kept(short, now_us) == kept(long, now_us)
