"""How often a pool may be asked again, and what moves without being counted."""

from __future__ import annotations

from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from routing.retry_budget import WINDOW_S, Losses, Retries, RetryBudget, Ruling


def test_a_quiet_pool_has_ten_seconds_worth_of_retries_and_no_more() -> None:
    budget = RetryBudget(share=0.1, per_s=1.0)
    assert [budget.retry(5.0) for _ in range(11)] == [True] * 10 + [False]
    assert not budget.retry(5.0 + WINDOW_S - 0.01)
    assert budget.retry(5.0 + WINDOW_S + 1.01)


def test_ten_requests_pay_for_one_retry() -> None:
    budget = RetryBudget(share=0.1, per_s=0.0)
    for _ in range(9):
        budget.request(0.0)
    assert not budget.retry(0.0)
    budget.request(0.0)
    assert budget.retry(0.0)
    assert not budget.retry(0.0)


def test_what_was_paid_in_is_forgotten() -> None:
    budget = RetryBudget(share=0.5, per_s=0.0)
    for _ in range(100):
        budget.request(0.0)
    assert budget.left(9.9) == 50.0
    assert budget.left(11.1) == 0.0


def test_with_nothing_allowed_nothing_is() -> None:
    budget = RetryBudget(share=0.0, per_s=0.0)
    for _ in range(1000):
        budget.request(0.0)
    assert not budget.retry(0.0)


def test_those_under_way_when_a_replica_dies_move_without_charge() -> None:
    losses = Losses()
    assert all(losses.moves("a", dispatched_at=1.0, in_flight=200 - lost, now=2.0) for lost in range(200))
    assert not losses.moves("a", dispatched_at=1.0, in_flight=1, now=2.0), "no more than were in flight"
    assert losses.moves("b", dispatched_at=1.0, in_flight=1, now=2.0), "another replica is another event"


def test_what_is_sent_after_the_first_loss_is_charged() -> None:
    losses = Losses()
    assert losses.moves("a", dispatched_at=1.0, in_flight=100, now=2.0)
    assert not losses.moves("a", dispatched_at=2.1, in_flight=100, now=2.2)
    assert losses.moves("a", dispatched_at=2.0, in_flight=100, now=2.3)


def test_one_replica_has_one_event_in_ten_seconds_and_old_ones_are_dropped() -> None:
    losses = Losses()
    assert losses.moves("a", 0.0, 1, 1.0)
    assert not losses.moves("a", 10.5, 1, 10.9)
    assert losses.moves("a", 10.5, 1, 11.0)
    for number in range(1000):
        losses.moves(number, float(number), 1, float(number))
    assert len(losses._events) <= 11


def test_new_settings_keep_what_was_taken() -> None:
    retries = Retries(Random(0), share=0.0, per_s=1.0)
    assert [retries.rule("a", 2.0, 1, 1.0) for _ in range(11)] == [Ruling.ALLOWED] * 10 + [Ruling.REFUSED]
    retries.configure(0.0, 1.1, 2)
    assert [retries.rule("a", 2.0, 1, 1.0) for _ in range(2)] == [Ruling.ALLOWED, Ruling.REFUSED]
    assert retries.counts == {Ruling.ALLOWED: 11, Ruling.MOVED: 0, Ruling.REFUSED: 2}


def test_what_is_paid_back_can_be_used_again_and_only_once() -> None:
    budget = RetryBudget(share=0.0, per_s=0.1)
    assert budget.retry(3.0)
    assert not budget.retry(4.0)
    budget.refund(3.0, 5.0)
    assert budget.left(5.0) == 1.0
    budget.refund(3.0, 5.0)
    assert budget.left(5.0) == 1.0
    assert budget.retry(5.0)
    budget.refund(5.0, 17.0)
    assert budget.left(17.0) == 1.0, "what is forgotten is not given back too"


STEPS = st.lists(
    st.tuples(
        st.floats(0.0, 4.0),  # seconds since the step before
        st.integers(0, 30),  # requests
        st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 20.0)), max_size=30),  # losses: where, how long ago
    ),
    max_size=60,
)


@given(st.sampled_from([0.0, 0.1, 0.25, 1.0]), st.sampled_from([0.0, 0.5, 1.0, 3.0]), STEPS)
def test_sends_stay_within_the_published_bound(
    share: float, per_s: float, steps: list[tuple[float, int, list[tuple[str, float]]]]
) -> None:
    retries = Retries(Random(0), share, per_s)
    in_flight = 7
    now = start = 1000.0
    requests = events = 0
    began: dict[str, float] = {}
    for after_s, asked, lost in steps:
        now += after_s
        for _ in range(asked):
            requests += 1
            retries.budget.request(now)
        for target, ago_s in lost:
            if now - began.get(target, 0.0) >= WINDOW_S:
                began[target] = now
                events += 1
            retries.rule(target, now - ago_s, in_flight, now)
        granted = retries.counts[Ruling.ALLOWED] + retries.counts[Ruling.MOVED]
        most = requests * share + per_s * (now - start + WINDOW_S) + events * in_flight
        assert granted <= most + 1e-6


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans()), max_size=80), st.floats(0.0, 12.0))
def test_with_paying_back_no_more_is_used_than_without_those(steps: list[tuple[float, bool]], later_s: float) -> None:
    budget = RetryBudget(share=0.0, per_s=0.5)
    now = 0.0
    kept: list[float] = []
    for after_s, answered in steps:
        now += after_s
        if budget.retry(now):
            if answered and later_s == 0.0:
                budget.refund(now, now)
            else:
                kept.append(now)
        assert sum(1 for at in kept if now - at < WINDOW_S) <= 5


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 20)), max_size=50))
@example([(0.0, 0), (1.0, 1), (10.0, 9), (2.0, 0)])
def test_the_share_of_ten_seconds_is_never_more_than_what_they_paid_for(steps: list[tuple[float, int]]) -> None:
    """Whenever one is granted, not only since the beginning: a good hour buys no storm."""
    budget = RetryBudget(share=0.1, per_s=1.0)
    now = 0.0
    paid: list[tuple[float, int]] = []
    taken: list[float] = []
    for after_s, asked in steps:
        now += after_s
        for _ in range(asked):
            budget.request(now)
        paid.append((now, asked))
        # What paid for those of a moment ago may be forgotten by now: it is looked at when they are granted.
        while budget.retry(now):
            taken.append(now)
            recent = sum(1 for at in taken if now - at < WINDOW_S)
            assert recent <= 0.1 * sum(count for at, count in paid if now - at < WINDOW_S + 1.0 + 1e-9) + 10.0 + 1e-6
