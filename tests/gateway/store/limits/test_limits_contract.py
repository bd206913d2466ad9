"""Every rule of `gateway.store.limits`, held against the limiter in memory and against the scripts in a real Redis."""

from __future__ import annotations

import pytest

from gateway.store.limits import Admission, Budget, Cost, Held, Rate, Refusal, Scope, Unit
from gateway.store.memory_limits import RECORD_US, TOMBSTONE_US
from tests.gateway.store.limits.limiter_halves import START_US as T
from tests.gateway.store.limits.limiter_halves import Half

LEASE_US = 10_000_000
SECOND_US = 1_000_000
FREE = Cost(0)


def requests(per_minute: int = 60, burst: int = 10, largest: int | None = None, key: str = "{a}:key:k") -> Scope:
    return Scope(key, (Rate(Unit.REQUESTS, per_minute, burst, largest or burst),))


def money(limit: int, floor: int = 0, period: str = "d20261118", ends_at_us: int = T + 3600 * SECOND_US) -> Scope:
    return Scope("{a}:tenant", budgets=(Budget(period, limit, floor, ends_at_us),))


def at(limiter: Half, id: str, scopes: tuple[Scope, ...], cost: Cost, now_us: int) -> Admission:
    return limiter.admit(id, scopes, cost, LEASE_US, now_us)


def count_admitted(limiter: Half, scopes: tuple[Scope, ...], cost: Cost, now_us: int, tries: int = 50) -> int:
    return sum(at(limiter, f"{now_us}-{number}", scopes, cost, now_us).admitted for number in range(tries))


def test_a_burst_then_the_rate(limiter: Half) -> None:
    scopes = (requests(60, 10),)
    assert count_admitted(limiter, scopes, Cost(), T) == 10
    assert count_admitted(limiter, scopes, Cost(), T + SECOND_US - 1) == 0
    assert count_admitted(limiter, scopes, Cost(), T + SECOND_US) == 1
    assert count_admitted(limiter, scopes, Cost(), T + 4 * SECOND_US) == 3
    assert count_admitted(limiter, scopes, Cost(), T + 400 * SECOND_US) == 10  # never more than a burst


@pytest.mark.parametrize(("per_minute", "burst"), [(7, 1), (7, 3), (333, 55), (60_000_001, 1000), (1, 1)])
def test_a_whole_burst_passes_at_once_and_is_waited_for(limiter: Half, per_minute: int, burst: int) -> None:
    scopes = (requests(per_minute, burst),)
    assert at(limiter, "a", scopes, Cost(burst), T).admitted
    refused = at(limiter, "b", scopes, Cost(burst), T)
    (refusal,) = refused.refusals
    assert refusal.wait_us == -(-burst * 60_000_000 // per_minute)
    assert not at(limiter, "c", scopes, Cost(burst), T + refusal.wait_us - 1).admitted
    assert at(limiter, "d", scopes, Cost(burst), T + refusal.wait_us).admitted


@pytest.mark.parametrize("units", [1, 3, 7, 10])
def test_a_wait_is_true_to_the_microsecond(limiter: Half, units: int) -> None:
    scopes = (requests(77, 10),)
    assert at(limiter, "a", scopes, Cost(10), T).admitted
    (refusal,) = at(limiter, "b", scopes, Cost(units), T + 12_345).refusals
    early = at(limiter, "c", scopes, Cost(units), T + 12_345 + refusal.wait_us - 1)
    assert [one.wait_us for one in early.refusals] == [1]
    assert at(limiter, "d", scopes, Cost(units), T + 12_345 + refusal.wait_us).admitted


def test_more_than_a_burst_passes_when_nothing_is_owed_and_is_owed_by_the_next(limiter: Half) -> None:
    scopes = (requests(60, 10, largest=30),)
    assert at(limiter, "a", scopes, Cost(30), T).marks_us == (T + 30 * SECOND_US,)
    (refusal,) = at(limiter, "b", scopes, Cost(1), T).refusals
    assert refusal.wait_us == 21 * SECOND_US
    (refusal,) = at(limiter, "b", scopes, Cost(30), T).refusals
    assert refusal.wait_us == 30 * SECOND_US
    (refusal,) = at(limiter, "b", scopes, Cost(31), T + 1000 * SECOND_US).refusals
    assert refusal.wait_us == -1


def test_what_takes_nothing_is_not_refused(limiter: Half) -> None:
    scopes = (Scope("{a}:k", (Rate(Unit.OUTPUT, 60, 1, 100),), budgets=(Budget("d1", 5, 5, T + SECOND_US),)),)
    assert at(limiter, "a", scopes, Cost(output=100), T).admitted
    assert at(limiter, "b", scopes, Cost(input=7), T).admitted


def test_all_or_nothing_and_a_refusal_takes_nothing(limiter: Half) -> None:
    wide, narrow = requests(60, 10), requests(60, 1, key="{a}:tenant")
    counted = Scope("{a}:model", concurrent=5, budgets=(Budget("d1", 100, 0, T + 3600 * SECOND_US),))
    assert at(limiter, "a", (narrow,), Cost(), T).admitted
    refused = at(limiter, "b", (wide, counted, narrow), Cost(micros=7), T)
    assert refused == Admission(False, T, (T, T + SECOND_US), (0,), (0,), (Refusal(2, "requests", SECOND_US),))
    assert count_admitted(limiter, (wide,), Cost(), T) == 10
    seen = at(limiter, "c", (counted,), FREE, T)
    assert (seen.in_use, seen.spent_micros) == ((1,), (0,))
    assert at(limiter, "b", (wide, counted, narrow), Cost(micros=7), T + SECOND_US).admitted


def test_every_limit_that_says_no_is_named(limiter: Half) -> None:
    rates = tuple(Rate(unit, 60, 5, 5) for unit in Unit)
    scopes = (Scope("{a}:k", rates, 0, (Budget("d1", 1, 0, T + 1), Budget("m1", 1, 0, T + 1))),)
    refused = at(limiter, "a", scopes, Cost(6, 6, 6, 6, 6), T)
    assert [one.limit for one in refused.refusals] == ["requests", "input", "output", "total", "concurrent", "d1", "m1"]
    assert {one.wait_us for one in refused.refusals} == {-1}


def test_shadow_reports_and_is_not_charged(limiter: Half) -> None:
    shadow = Scope("{a}:s", (Rate(Unit.REQUESTS, 60, 1, 1), Rate(Unit.TOTAL, 60, 50, 50)), 1, shadow=True)
    scopes = (requests(), shadow)
    assert at(limiter, "a", scopes, Cost(total=5), T).refusals == ()
    second = at(limiter, "b", scopes, Cost(total=5), T)
    assert second.admitted
    assert second.refusals == (Refusal(1, "requests", SECOND_US, True), Refusal(1, "concurrent", LEASE_US, True))
    assert second.marks_us == (T + 2 * SECOND_US, T + SECOND_US, T + 5 * SECOND_US)
    assert second.in_use == (1,)
    assert limiter.settle("b", scopes, Cost(total=5), Cost(total=50), T)
    assert at(limiter, "c", scopes, Cost(total=1), T).marks_us[2] == T + 5 * SECOND_US


def test_concurrency_ends_with_leases_and_settlements(limiter: Half) -> None:
    scopes = (Scope("{a}:k", concurrent=2),)
    assert at(limiter, "a", scopes, Cost(), T).in_use == (1,)
    assert at(limiter, "b", scopes, Cost(), T + SECOND_US).in_use == (2,)
    refused = at(limiter, "c", scopes, Cost(), T + 2 * SECOND_US)
    assert refused.refusals == (Refusal(0, "concurrent", LEASE_US - 2 * SECOND_US),)
    assert limiter.settle("b", scopes, Cost(), Cost(), T + 2 * SECOND_US)
    assert at(limiter, "d", scopes, Cost(), T + 2 * SECOND_US).admitted
    assert not at(limiter, "e", scopes, Cost(), T + LEASE_US - 1).admitted
    assert at(limiter, "f", scopes, Cost(), T + LEASE_US).in_use == (2,)  # "a" has run out just now


def test_a_lowered_limit_waits_for_enough_leases(limiter: Half) -> None:
    for number in range(4):
        assert at(limiter, f"{number}", (Scope("{a}:k", concurrent=4),), Cost(), T + number).admitted
    refused = at(limiter, "x", (Scope("{a}:k", concurrent=2),), Cost(), T + 10)
    assert refused.refusals == (Refusal(0, "concurrent", LEASE_US + 2 - 10),)
    assert at(limiter, "x", (Scope("{a}:k", concurrent=2),), Cost(), T + LEASE_US + 2).admitted


def test_many_leases_that_ran_out_count_for_nothing_at_once(limiter: Half) -> None:
    scopes = (Scope("{a}:k", concurrent=500, budgets=(Budget("d1", 5000, 0, T + 3600 * SECOND_US),)),)
    assert count_admitted(limiter, scopes, Cost(micros=10), T, 500) == 500
    assert limiter.admit("long", (Scope("{a}:k", concurrent=501),), FREE, 3 * LEASE_US, T).in_use == (501,)
    after = at(limiter, "x", scopes, Cost(micros=5000), T + LEASE_US)
    assert after.admitted
    assert after.in_use == (2,)
    assert after.spent_micros == (5000,)


def test_a_renewal_prolongs_a_lease_and_puts_a_lost_one_back(limiter: Half) -> None:
    scopes = (Scope("{a}:k", concurrent=1, budgets=(Budget("d1", 100, 0, T + 3600 * SECOND_US),)),)
    held = [Held("a", scopes, Cost(micros=40))]
    assert at(limiter, "a", scopes, Cost(micros=40), T).admitted
    limiter.renew(held, LEASE_US, T + 9 * SECOND_US)
    assert not at(limiter, "b", scopes, Cost(), T + 18 * SECOND_US).admitted
    limiter.renew(held, LEASE_US, T + 30 * SECOND_US)
    seen = at(limiter, "b", scopes, Cost(), T + 31 * SECOND_US)
    assert (seen.admitted, seen.in_use, seen.spent_micros) == (False, (1,), (40,))
    assert limiter.settle("a", scopes, Cost(micros=40), Cost(micros=30), T + 31 * SECOND_US)
    limiter.renew(held, LEASE_US, T + 32 * SECOND_US)  # late: it is settled
    seen = at(limiter, "b", scopes, Cost(), T + 32 * SECOND_US)
    assert (seen.admitted, seen.in_use, seen.spent_micros) == (True, (1,), (30,))


def test_a_store_that_lost_its_memory_is_told_by_renewals(limiter: Half) -> None:
    scopes = (Scope("{a}:k", (Rate(Unit.TOTAL, 60, 10, 10),), 2, (Budget("d1", 100, 0, T + 3600 * SECOND_US),)),)
    limiter.renew([Held(f"{n}", scopes, Cost(total=5, micros=20)) for n in range(2)], LEASE_US, T)
    seen = at(limiter, "x", scopes, Cost(), T)
    assert (seen.admitted, seen.in_use, seen.spent_micros) == (False, (2,), (40,))
    assert at(limiter, "1", scopes, Cost(total=5, micros=20), T).admitted
    assert limiter.settle("1", scopes, Cost(total=5, micros=20), Cost(total=1, micros=7), T)
    seen = at(limiter, "y", scopes, Cost(total=10), T)
    assert (seen.admitted, seen.in_use, seen.spent_micros) == (True, (2,), (27,))


def test_settling_gives_back_and_never_beyond_a_full_burst(limiter: Half) -> None:
    scopes = (Scope("{a}:k", (Rate(Unit.TOTAL, 60, 100, 100),)),)
    assert at(limiter, "a", scopes, Cost(total=80), T).admitted
    assert at(limiter, "b", scopes, Cost(total=20), T).admitted
    assert limiter.settle("a", scopes, Cost(total=80), Cost(total=50), T + 5 * SECOND_US)
    assert at(limiter, "c", scopes, Cost(total=36), T + 5 * SECOND_US).refusals[0].wait_us == SECOND_US
    assert limiter.settle("b", scopes, Cost(total=20), FREE, T + 500 * SECOND_US)
    assert at(limiter, "d", scopes, Cost(total=100), T + 500 * SECOND_US).admitted
    assert not at(limiter, "e", scopes, Cost(total=1), T + 500 * SECOND_US).admitted


def test_using_more_leaves_a_debt_even_when_all_had_been_refilled(limiter: Half) -> None:
    scopes = (Scope("{a}:k", (Rate(Unit.TOTAL, 60, 10, 10),)),)
    assert at(limiter, "a", scopes, Cost(total=1), T).admitted
    now_us = T + 100 * SECOND_US
    assert limiter.settle("a", scopes, Cost(total=1), Cost(total=31), now_us)
    assert at(limiter, "b", scopes, Cost(total=1), now_us).refusals == (Refusal(0, "total", 21 * SECOND_US),)


def test_settling_twice_or_what_never_was_changes_nothing(limiter: Half) -> None:
    scopes = (requests(), money(100))
    assert at(limiter, "a", scopes, Cost(micros=10), T).admitted
    assert not limiter.settle("b", scopes, Cost(micros=10), Cost(micros=99), T)
    assert limiter.settle("a", scopes, Cost(micros=10), Cost(micros=7), T)
    assert not limiter.settle("a", scopes, Cost(micros=10), Cost(micros=7), T)
    assert not limiter.cancel("a", scopes, Cost(micros=10), T)
    seen = at(limiter, "c", scopes, FREE, T)
    assert (seen.marks_us, seen.spent_micros) == ((T + SECOND_US,), (7,))


def test_what_was_used_was_used_even_after_the_lease(limiter: Half) -> None:
    scopes = (Scope("{a}:k", (Rate(Unit.TOTAL, 60, 10, 10),), 1), money(100))
    assert at(limiter, "a", scopes, Cost(total=1, micros=60), T).admitted
    later_us = T + LEASE_US
    assert at(
        limiter, "b", scopes, Cost(total=1, micros=50), later_us
    ).admitted  # the reservation stood in nobody's way
    assert limiter.settle("a", scopes, Cost(total=1, micros=60), Cost(total=5, micros=45), later_us)
    seen = at(limiter, "c", (scopes[0], scopes[1]), FREE, later_us)
    assert (seen.marks_us, seen.spent_micros) == ((later_us + 5 * SECOND_US,), (95,))
    assert not seen.admitted


def test_the_same_id_gets_the_same_answer_and_is_charged_once(limiter: Half) -> None:
    scopes = (requests(), Scope("{a}:t", concurrent=5), money(100))
    first = at(limiter, "a", scopes, Cost(micros=10), T)
    assert at(limiter, "a", scopes, Cost(micros=10), T + 77) == first
    seen = at(limiter, "b", scopes, FREE, T + 77)
    assert (seen.marks_us, seen.in_use, seen.spent_micros) == ((T + SECOND_US,), (2,), (10,))
    assert at(limiter, "a", scopes, Cost(micros=10), T + RECORD_US).now_us == T + RECORD_US  # forgotten: a new request


def test_an_echo_is_refused_for_a_minute_without_a_reason(limiter: Half) -> None:
    scopes = (requests(),)
    assert at(limiter, "a", scopes, Cost(), T).admitted
    assert limiter.settle("a", scopes, Cost(), Cost(), T + 5)
    assert at(limiter, "a", scopes, Cost(), T + 6) == Admission(False, T + 6, (T + SECOND_US,), (), ())
    assert not at(limiter, "a", scopes, Cost(), T + 5 + TOMBSTONE_US - 1).admitted
    assert at(limiter, "a", scopes, Cost(), T + 5 + TOMBSTONE_US).admitted


def test_cancelling_takes_everything_back(limiter: Half) -> None:
    scopes = (requests(), Scope("{a}:t", concurrent=5), money(100))
    assert at(limiter, "a", scopes, Cost(micros=10), T).admitted
    assert limiter.cancel("a", scopes, Cost(micros=10), T + 1)
    seen = at(limiter, "b", scopes, FREE, T + 1)
    assert (seen.marks_us, seen.in_use, seen.spent_micros) == ((T + 1,), (1,), (0,))


def test_a_cancel_that_comes_first_keeps_the_admission_out(limiter: Half) -> None:
    scopes = (requests(),)
    assert not limiter.cancel("a", scopes, Cost(), T)
    assert at(limiter, "a", scopes, Cost(), T) == Admission(False, T, (T,), (), ())


def test_money_that_is_spent_never_comes_and_reserved_money_may(limiter: Half) -> None:
    scopes = (money(100),)
    assert at(limiter, "a", scopes, Cost(micros=60), T).spent_micros == (60,)
    refused = at(limiter, "b", scopes, Cost(micros=41), T + 1)
    assert refused.refusals == (Refusal(0, "d20261118", LEASE_US - 1),)
    assert at(limiter, "b", scopes, Cost(micros=101), T + 1).refusals[0].wait_us == -1
    assert limiter.settle("a", scopes, Cost(micros=60), Cost(micros=60), T + 1)
    assert at(limiter, "b", scopes, Cost(micros=41), T + 1).refusals[0].wait_us == -1
    assert at(limiter, "b", scopes, Cost(micros=40), T + 1).spent_micros == (100,)


def test_spend_of_record_is_a_floor(limiter: Half) -> None:
    assert at(limiter, "a", (money(100, floor=90),), Cost(micros=10), T).spent_micros == (100,)
    assert not at(limiter, "b", (money(100, floor=90),), Cost(micros=1), T).admitted
    assert limiter.settle("a", (money(100, floor=90),), Cost(micros=10), Cost(micros=2), T)
    assert at(limiter, "c", (money(100),), FREE, T).spent_micros == (92,)
    assert at(limiter, "d", (money(100, floor=95),), FREE, T).spent_micros == (95,)


def test_a_later_period_starts_anew_and_an_earlier_one_changes_nothing(limiter: Half) -> None:
    today, tomorrow = money(100, 0, "d20261118", T + 10), money(100, 0, "d20261119", T + 3600 * SECOND_US)
    assert at(limiter, "a", (today,), Cost(micros=50), T).admitted
    assert at(limiter, "b", (today,), Cost(micros=50), T).admitted
    assert limiter.settle("a", (today,), Cost(micros=50), Cost(micros=50), T)
    turned = at(limiter, "c", (tomorrow,), Cost(micros=10), T + 11)
    assert turned.spent_micros == (60,)  # what "b" reserves goes on
    assert limiter.settle("b", (today,), Cost(micros=50), Cost(micros=30), T + 12)  # and counts when it is settled
    assert at(limiter, "d", (money(100, 77, "d20261118", T + 10),), FREE, T + 12).spent_micros == (40,)


def test_days_and_months_are_counted_side_by_side(limiter: Half) -> None:
    end_us = T + 3600 * SECOND_US
    scopes = (Scope("{a}:t", budgets=(Budget("d20261118", 50, 0, end_us), Budget("m202611", 90, 0, end_us))),)
    assert at(limiter, "a", scopes, Cost(micros=50), T).spent_micros == (50, 50)
    assert limiter.settle("a", scopes, Cost(micros=50), Cost(micros=50), T)
    next_day = (Scope("{a}:t", budgets=(Budget("d20261119", 50, 0, end_us), Budget("m202611", 90, 0, end_us))),)
    refused = at(limiter, "b", next_day, Cost(micros=50), T)
    assert refused.refusals == (Refusal(0, "m202611", -1),)
    assert refused.spent_micros == (0, 50)


def test_a_count_is_forgotten_at_the_end_of_its_period(limiter: Half) -> None:
    scopes = (money(100, 0, "d20261118", T + 10),)
    assert at(limiter, "a", scopes, Cost(micros=50), T).admitted
    assert limiter.settle("a", scopes, Cost(micros=50), Cost(micros=50), T)
    assert at(limiter, "b", scopes, FREE, T + 9).spent_micros == (50,)
    assert at(limiter, "c", scopes, FREE, T + 10).spent_micros == (0,)


def test_large_numbers_are_kept_to_the_last_digit(limiter: Half) -> None:
    rate = Rate(Unit.TOTAL, 1_000_003, 100_000_007, 149_999_993)
    scopes = (Scope("{a}:k", (rate,), budgets=(Budget("m1", 8_000_000_000_000_003, 0, T + SECOND_US),)),)
    cost = Cost(total=99_999_989, micros=7_000_000_000_000_001)
    answer = at(limiter, "a", scopes, cost, T)
    assert answer.marks_us == (T - (-99_999_989 * 60_000_000 // 1_000_003),)
    assert answer.spent_micros == (7_000_000_000_000_001,)
    assert limiter.settle("a", scopes, cost, cost, T)
    assert at(limiter, "b", scopes, FREE, T).spent_micros == (7_000_000_000_000_001,)


def test_no_scopes_are_no_limits(limiter: Half) -> None:
    assert at(limiter, "a", (), Cost(), T) == Admission(True, T, (), (), ())
    assert limiter.settle("a", (), Cost(), Cost(), T)


def test_a_reading_tells_what_is_used_and_what_is_reserved_and_changes_nothing(limiter: Half) -> None:
    scope = Scope(
        "{a}:key:k",
        (Rate(Unit.REQUESTS, 60, 10, 10), Rate(Unit.TOTAL, 6000, 1000, 1000)),
        5,
        (Budget("d20261118", 10_000, 100, T + 3600 * SECOND_US),),
    )
    idle = Scope("{a}:key:other", concurrent=3, budgets=(Budget("d20261118", 10_000, 70, T + 3600 * SECOND_US),))
    assert at(limiter, "a", (scope,), Cost(1, total=200, micros=300), T).admitted
    assert at(limiter, "b", (scope,), Cost(1, total=100, micros=500), T).admitted
    assert limiter.settle("a", (scope,), Cost(1, total=200, micros=300), Cost(1, total=50, micros=40), T)
    reading, nothing = limiter.read((scope, idle), T)
    assert [mark - T for mark in reading.marks_us] == [2 * SECOND_US, 1_500_000]
    assert (reading.in_use, reading.reserved_micros, reading.spent_micros) == (1, 500, (140,))
    assert (nothing.in_use, nothing.reserved_micros, nothing.spent_micros) == (0, 0, (70,))
    assert limiter.read((scope, idle), T) == [reading, nothing]
    ran_out = limiter.read((scope,), T + LEASE_US)[0]
    assert (ran_out.in_use, ran_out.reserved_micros, ran_out.spent_micros) == (0, 0, (140,))
    assert limiter.settle("b", (scope,), Cost(1, total=100, micros=500), Cost(1, total=100, micros=500), T + LEASE_US)
    assert limiter.read((scope,), T + LEASE_US)[0].spent_micros == (640,)
