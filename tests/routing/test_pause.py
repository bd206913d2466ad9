"""Pauses that servers ask for, by model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.pause import MAX_PAUSE_S, Pauses


def test_a_model_is_paused_and_the_others_are_not() -> None:
    pauses = Pauses()
    assert pauses.begin("m", 5.0, 100.0) == 105.0
    assert pauses.until("m", 104.9) == 105.0
    assert pauses.until("m", 105.0) == 0.0
    assert pauses.until("other", 101.0) == 0.0
    assert pauses.latest == 105.0


def test_a_pause_is_cut_and_never_shortened() -> None:
    pauses = Pauses()
    assert pauses.begin("m", 1e9, 0.0) == MAX_PAUSE_S
    assert pauses.begin("m", 1.0, 0.0) == MAX_PAUSE_S
    assert pauses.begin("n", -5.0, 10.0) == 0.0
    assert pauses.running(10.0) == {"m": MAX_PAUSE_S}


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-10, 1e6), st.floats(0, 50)), max_size=60))
def test_what_is_asked_is_kept_and_what_is_over_is_forgotten(steps: list[tuple[str, float, float]]) -> None:
    pauses = Pauses()
    now = 1000.0
    expected: dict[str, float] = {}
    for model, length_s, after_s in steps:
        now += after_s
        pauses.begin(model, length_s, now)
        expected[model] = max(expected.get(model, 0.0), now + min(max(length_s, 0.0), MAX_PAUSE_S))
        for each, end in expected.items():
            assert pauses.until(each, now) == (end if end > now else 0.0)
            assert pauses.latest >= pauses.until(each, now)
    assert len(pauses._until) <= 6
