"""The record of failures: the window, the time out, the row, and the trial."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.ejection import ALONE_AFTER_S, Ejection, Rules, Window

RULES = Rules()


def ejected(now: float = 100.0, rng: Random | None = None, rules: Rules = RULES) -> Ejection:
    one = Ejection(rng)
    verdicts = [one.failed(rules, now) for _ in range(rules.consecutive)]
    assert verdicts == [False] * (rules.consecutive - 1) + [True]
    one.eject(rules, now)
    return one


def recovered(one: Ejection, rules: Rules = RULES) -> float:
    """Let the trial succeed at the first moment it may; when that is."""
    now = one.until
    one.begin_trial(rules, now)
    assert [one.answered(rules, now) for _ in range(rules.trial_successes)] == [False, False, True]
    return now


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, [0, 0, 1, 1, 2, 2, 3]), (1.0, [0, 0, 1, 2, 3, 4, 5]), (0.34, [0, 0, 0, 1, 1, 1, 2]), (0.0, [0] * 7)],
)
def test_the_ceiling_is_a_share_rounded_down_and_never_all(share: float, expected: list[int]) -> None:
    assert [Rules(ejected_share=share).ceiling(replicas) for replicas in range(7)] == expected


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=60))
def test_the_window_counts_all_of_25_seconds_and_nothing_older_than_30(steps: list[tuple[float, bool]]) -> None:
    window, now = Window(), 0.0
    seen: list[tuple[float, bool]] = []
    for elapsed_s, worked in steps:
        now += elapsed_s
        window.roll(now, 30.0)
        if worked:
            window.answered += 1
        else:
            window.failed += 1
        seen.append((now, worked))
        for kind, count in zip((True, False), window.totals(now, 30.0), strict=True):
            ages = [now - at for at, what in seen if what is kind]
            assert sum(age < 24.999 for age in ages) <= count <= sum(age <= 30.001 for age in ages)


@pytest.mark.parametrize(
    ("outcomes", "due"),
    [
        ("xxxx", False),
        ("xxxxx", True),
        ("xxxxoxxxx", False),  # nine samples say nothing, whatever their share
        ("xoxoxoxox", False),
        ("xoxoxoxoxx", True),
        ("oooooooooooxxxx", False),
        ("oooooxxxxoxxxx", True),  # 8 of 14
        ("oooooooooxxxx", False),
        ("oooooooooxxxxx", True),
    ],
)
def test_it_is_due_after_five_in_a_row_or_half_of_at_least_ten(outcomes: str, due: bool) -> None:
    one = Ejection(None)
    verdict = False
    for outcome in outcomes:
        if outcome == "x":
            verdict = one.failed(RULES, 100.0)
        else:
            one.answered(RULES, 100.0)
    assert verdict is due


def test_old_failures_do_not_count_towards_the_ratio() -> None:
    one = Ejection(None)
    for _ in range(6):
        one.answered(RULES, 100.0)
        one.failed(RULES, 100.0) if one.window.failed < 4 else None
    for _ in range(4):
        one.answered(RULES, 131.0)
        assert not one.failed(RULES, 131.0)


def test_the_time_out_grows_with_each_failed_trial_up_to_the_limit() -> None:
    one = ejected(100.0)
    times = [one.until - 100.0]
    for _ in range(35):
        now = one.until
        one.begin_trial(RULES, now)
        assert one.failed(RULES, now)
        one.eject(RULES, now)
        times.append(one.until - now)
    assert times == [min(300.0, 10.0 * each) for each in range(1, 37)]


def test_the_jitter_stays_within_a_fifth_and_uses_all_of_it() -> None:
    times = [ejected(0.0, Random(seed)).until for seed in range(300)]
    assert 8.0 <= min(times) < 8.2
    assert 11.8 < max(times) <= 12.0


@pytest.mark.parametrize(("healthy_s", "time_s"), [(0.0, 40.0), (9.9, 40.0), (10.0, 30.0), (25.0, 20.0), (1e6, 10.0)])
def test_each_healthy_interval_takes_one_off_the_row(healthy_s: float, time_s: float) -> None:
    one = ejected(0.0)
    for _ in range(2):
        one.begin_trial(RULES, one.until)
        assert one.failed(RULES, one.until)
        one.eject(RULES, one.until)
    assert one.in_a_row == 3
    now = recovered(one) + healthy_s
    for _ in range(5):
        one.failed(RULES, now)
    one.eject(RULES, now)
    assert one.until - now == pytest.approx(time_s)


def test_failures_while_it_is_out_do_not_lengthen_it() -> None:
    one = ejected(0.0)
    until = one.until
    assert not any(one.failed(RULES, now) for now in (0.0, 5.0, until, until + 5.0))
    assert (one.until, one.in_a_row) == (until, 1)


def test_an_answer_before_its_time_changes_nothing() -> None:
    one = ejected(0.0)
    assert not any(one.answered(RULES, one.until - 0.1) for _ in range(10))
    assert one.reason(one.until - 0.1) == "ejected"


def test_a_trial_lets_in_one_then_two_then_four() -> None:
    rules = Rules(trial_successes=4)
    one = ejected(0.0, rules=rules)
    now = one.until
    assert one.reason(now) == "half_open"
    one.begin_trial(rules, now)
    room = []
    back = False
    while not back:
        while one.reason(now) is None:
            one.trial_in_flight += 1
        room.append(one.trial_in_flight)
        back = one.answered(rules, now)
    assert room == [1, 2, 4, 8]
    assert one.reason(now) is None


def test_a_trial_cannot_be_begun_before_its_time() -> None:
    one = ejected(0.0)
    one.begin_trial(RULES, one.until - 0.1)
    assert one.reason(one.until) == "half_open"


def test_beginning_a_trial_again_keeps_its_successes() -> None:
    one = ejected(0.0)
    back = []
    for second in range(3):
        one.begin_trial(RULES, one.until + second)
        back.append(one.answered(RULES, one.until + second))
    assert back == [False, False, True]


def test_a_trial_whose_request_hangs_can_be_begun_anew_after_a_while() -> None:
    one = ejected(0.0)
    begun = one.until
    one.begin_trial(RULES, begun)
    hanging = one.trial
    one.trial_in_flight += 1
    one.begin_trial(RULES, begun + RULES.stall_s - 0.1)
    assert one.reason(begun + RULES.stall_s) == "half_open"
    one.begin_trial(RULES, begun + RULES.stall_s)
    assert one.reason(begun + RULES.stall_s) is None
    assert one.trial != hanging


def test_a_trial_of_requests_longer_than_that_keeps_what_succeeded() -> None:
    one = ejected(0.0)
    back = []
    for count in range(3):
        now = one.until + count * RULES.stall_s
        one.begin_trial(RULES, now)
        back.append(one.answered(RULES, now))
    assert back == [False, False, True]


def test_without_being_given_the_trial_a_worker_tries_by_itself_in_the_end() -> None:
    one = ejected(0.0)
    assert one.reason(one.until + ALONE_AFTER_S - 0.1) == "half_open"
    assert one.reason(one.until + ALONE_AFTER_S) is None
    assert one.failed(RULES, one.until + ALONE_AFTER_S)


def hint(one: Ejection, observer: str, until: float, now: float, suspected: bool = False) -> bool:
    return one.hinted(RULES, observer, until, suspected, now)


def test_one_observer_is_not_believed_and_two_are() -> None:
    one = Ejection(None)
    assert not hint(one, "worker-1", 110.0, 100.0)
    assert not hint(one, "worker-1", 115.0, 101.0)
    assert hint(one, "worker-2", 112.0, 102.0)


def test_an_observer_whose_time_is_over_does_not_count() -> None:
    one = Ejection(None)
    assert not hint(one, "worker-1", 110.0, 100.0)
    assert not hint(one, "worker-2", 120.0, 110.0)
    assert not hint(one, "worker-3", 105.0, 111.0)


@pytest.mark.parametrize(("history", "follows"), [("x", True), ("xo", False), ("ox", True), ("", False)])
def test_one_observer_is_believed_after_an_own_failure_without_an_answer_since(history: str, follows: bool) -> None:
    one = Ejection(None)
    for outcome in history:
        one.failed(RULES, 100.0) if outcome == "x" else one.answered(RULES, 100.0)
    assert hint(one, "worker-1", 140.0, 110.0) is follows
    assert not hint(one, "worker-1", 140.0, 131.0)


def test_an_own_failure_after_the_hint_counts_the_same_and_takes_the_time_of_the_hint() -> None:
    one = Ejection(None)
    hint(one, "worker-1", 117.0, 100.0)
    assert one.failed(RULES, 101.0)
    one.eject(RULES, 101.0)
    assert one.until == 117.0


def test_an_adopted_time_is_no_longer_than_an_own_one_could_be() -> None:
    one = Ejection(None)
    one.adopt(RULES, float("inf"), 100.0)
    assert one.until == 460.0


def test_a_hint_moves_the_end_of_an_ejection_but_not_under_a_running_trial() -> None:
    one = ejected(0.0)
    assert not hint(one, "worker-1", 30.0, 11.0)
    assert one.until == 30.0
    one.begin_trial(RULES, 30.0)
    hint(one, "worker-1", 60.0, 31.0)
    assert one.until == 30.0
