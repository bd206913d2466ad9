"""The cool-down after failures."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.cooldown import FIRST_COOLDOWN_S, MAX_COOLDOWN_S, Cooldown


def test_a_new_replica_is_not_cooling_down() -> None:
    assert not Cooldown().active(0.0)


def test_it_is_active_up_to_its_end_and_not_at_it() -> None:
    cooldown = Cooldown()
    cooldown.failed(100.0)
    assert cooldown.active(100.0 + FIRST_COOLDOWN_S - 0.001)
    assert not cooldown.active(100.0 + FIRST_COOLDOWN_S)


def test_it_doubles_with_each_failure_in_a_row_up_to_the_limit() -> None:
    cooldown = Cooldown()
    lengths = []
    for _ in range(7):
        now = cooldown.until
        cooldown.failed(now)
        lengths.append(cooldown.until - now)
    assert lengths == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_failures_while_it_lasts_do_not_lengthen_it() -> None:
    cooldown = Cooldown()
    cooldown.failed(0.0)
    until = cooldown.until
    for _ in range(50):
        cooldown.failed(0.1)
    assert cooldown == Cooldown(until, 1)


def test_a_success_ends_it_and_forgets_the_failures() -> None:
    cooldown = Cooldown()
    cooldown.failed(0.0)
    cooldown.failed(10.0)
    cooldown.succeeded()
    assert not cooldown.active(10.0)
    cooldown.failed(20.0)
    assert cooldown.until == 20.0 + FIRST_COOLDOWN_S


def test_ten_thousand_failures_in_a_row_do_not_overflow() -> None:
    cooldown = Cooldown()
    for _ in range(10_000):
        cooldown.failed(cooldown.until)
    assert cooldown.active(cooldown.until - 0.001)


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=50))
def test_a_pause_is_never_longer_than_the_limit(steps: list[tuple[float, bool]]) -> None:
    cooldown = Cooldown()
    now = 0.0
    for elapsed_s, worked in steps:
        now += elapsed_s
        if worked:
            cooldown.succeeded()
        else:
            cooldown.failed(now)
        assert not cooldown.active(now + MAX_COOLDOWN_S)
        assert cooldown.active(now) is not worked
