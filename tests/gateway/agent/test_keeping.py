from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.agent.keeping import (
    HOPELESS_AFTER,
    KILL_AFTER_S,
    LONGEST_DELAY_S,
    SILENT_S,
    STABLE_S,
    Answered,
    Doomed,
    Empty,
    Event,
    Exited,
    Hurry,
    Keeper,
    Leave,
    Limits,
    Phase,
    Say,
    Silent,
)

LIMITS = Limits(start_timeout_s=60, stop_timeout_s=20)
DIED = Exited("ended with exit code 1", "CUDA out of memory")


def middle(low: float, high: float) -> float:
    return (low + high) / 2


def keeper(now: float = 0.0) -> Keeper:
    return Keeper(LIMITS, now, middle)


def ready(now: float = 0.0) -> Keeper:
    found = keeper(now)
    assert found.decide(now) == ["start"]
    found.decide(now, [Answered()])
    return found


def said(actions: list[object]) -> str:
    return " | ".join(action.text for action in actions if isinstance(action, Say))


def test_server_is_started_at_once_and_ready_when_it_answers() -> None:
    server = keeper()
    assert server.decide(0.0) == ["start"]
    assert server.decide(30.0, [Silent("refused")]) == []
    assert server.decide(42.5, [Answered()]) == [Say("ready in 42.5 s")]
    assert (server.phase, server.started_in_s, server.restarts) == (Phase.READY, 42.5, 0)


def test_one_that_does_not_get_ready_says_what_it_answered_last() -> None:
    server = keeper()
    server.decide(0.0)
    server.decide(59.0, [Silent("/health answered 404")])
    late = "was not ready within 60 s (/health answered 404)"
    assert said([*server.decide(61.0)]) == f"{late}; ending it"
    assert said([*server.decide(62.0, [Exited("was ended by SIGTERM")])]).startswith(f"{late}; starts again")
    server = keeper()
    server.decide(0.0)
    server.decide(1.0, [Silent("refused"), Answered()])
    assert server.trouble == ""


def delays(server: Keeper, count: int, lives_s: float = 0.0) -> list[float]:
    found, now = [], 0.0
    for _ in range(count):
        server.decide(now)
        if lives_s:
            server.decide(now, [Answered()])
            now += lives_s
        server.decide(now, [DIED])
        assert server.phase is Phase.WAITING
        found.append(round(server.due - now, 6))
        now = server.due
    return found


def test_failed_starts_wait_twice_as_long_each_and_five_in_a_row_the_longest() -> None:
    assert delays(keeper(), 7) == [1, 2, 4, 8, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S]


def test_fifth_failed_start_in_a_row_says_so_once() -> None:
    server, now, texts = keeper(), 0.0, []
    for _ in range(HOPELESS_AFTER + 2):
        server.decide(now)
        texts.append(said([*server.decide(now, [DIED])]))
        now = server.due
    assert [("in a row" in text) for text in texts] == [False] * 4 + [True, False, False]
    assert texts[0] == "ended with exit code 1: CUDA out of memory; starts again in 1 s"


def test_delay_begins_anew_after_a_stable_run_and_not_after_a_short_one() -> None:
    assert delays(keeper(), 5, lives_s=STABLE_S) == [1] * 5
    assert delays(keeper(), 5, lives_s=STABLE_S / 2) == [1, 2, 4, 8, 16]


def test_start_that_takes_too_long_is_ended_and_tried_again() -> None:
    server = keeper()
    server.decide(0.0)
    assert server.decide(60.0) == []
    assert server.decide(61.0) == [Say("was not ready within 60 s; ending it"), "terminate"]
    actions = server.decide(62.0, [Exited("ended with exit code 0")])
    assert said([*actions]) == "was not ready within 60 s; starts again in 1 s"
    assert server.failed_starts == 1


def test_start_that_cannot_succeed_is_ended_at_once() -> None:
    server = keeper()
    server.decide(0.0)
    assert "terminate" in server.decide(1.0, [Doomed("the port is in use")])


def test_server_that_lives_and_does_not_answer_is_started_again() -> None:
    server = ready()
    server.decide(10.0, [Answered()])
    assert server.decide(10.0 + SILENT_S, [Silent("no answer within 5 s")]) == []
    actions = server.decide(10.1 + SILENT_S)
    assert actions[-1] == "terminate"
    assert said([*actions]) == "has not answered for 180 s (no answer within 5 s); ending it"
    assert server.decide(11 + SILENT_S, [Exited("ended with exit code 0")])
    assert server.failed_starts == 0


def test_one_answer_ends_a_silence() -> None:
    server = ready()
    server.decide(SILENT_S, [Silent("busy")])
    server.decide(SILENT_S, [Answered()])
    assert server.decide(2 * SILENT_S) == []
    assert server.trouble == ""


def test_server_that_leaves_is_drained_first_and_killed_if_it_does_not_end() -> None:
    server = ready()
    assert server.decide(1.0, [Leave()]) == [Say("draining")]
    assert server.decide(5.0) == []
    assert server.decide(6.0, [Empty()]) == ["terminate"]
    assert server.decide(6.0 + KILL_AFTER_S)[-1] == "kill"
    assert server.decide(7.0 + KILL_AFTER_S) == []
    server.decide(8.0 + KILL_AFTER_S, [Exited("was ended by SIGKILL")])
    assert server.phase is Phase.GONE


def test_drain_ends_when_its_time_is_over() -> None:
    server = ready()
    server.decide(1.0, [Leave()])
    assert "terminate" not in server.decide(20.9)
    assert server.decide(21.0)[-1] == "terminate"


def test_restart_that_was_asked_for_waits_for_nothing_but_the_drain() -> None:
    server = ready()
    server.decide(1.0, [Leave(again=True), Empty()])
    assert server.phase is Phase.STOPPING
    assert server.decide(2.0, [Exited("ended with exit code 0")]) == [Say("stopped, and starts again"), "start"]
    assert (server.restarts, server.failed_starts) == (1, 0)


def test_server_without_requests_yet_leaves_without_a_drain() -> None:
    starting = keeper()
    starting.decide(0.0)
    assert starting.decide(1.0, [Leave()]) == ["terminate"]
    waiting = keeper(5.0)
    assert waiting.decide(0.0, [Leave()]) == []
    assert waiting.phase is Phase.GONE


def test_hurry_ends_a_drain_and_then_kills() -> None:
    server = ready()
    server.decide(1.0, [Leave()])
    assert server.decide(2.0, [Hurry()]) == ["terminate"]
    assert server.decide(3.0, [Hurry()]) == ["kill"]
    assert server.decide(4.0, [Hurry()]) == []


EVENTS = st.sampled_from(
    [DIED, Answered(), Silent("x"), Doomed("x"), Empty(), Leave(), Leave(again=True), Hurry()],
)


@given(st.lists(st.tuples(st.floats(0, 400), EVENTS), max_size=60))
def test_any_history_starts_one_process_at_a_time_and_none_after_it_is_gone(history: list[tuple[float, Event]]) -> None:
    server, now, process, left = keeper(), 0.0, False, False
    for passed, event in history:
        now += passed
        if isinstance(event, Exited):
            if not process:
                continue
            process = False
        left = left or (isinstance(event, Leave) and not event.again)
        for action in server.decide(now, [event]):
            if action == "start":
                assert not process
                process = True
            elif action in ("terminate", "kill"):
                assert process
        assert process == server.running
        if left:
            assert server.leaving or server.phase is Phase.GONE
        if server.phase is Phase.GONE:
            assert left
            assert not process
        if server.phase is Phase.WAITING:
            assert server.due - now <= LONGEST_DELAY_S


@given(st.lists(st.tuples(st.floats(0, 400), EVENTS), max_size=40))
def test_whatever_happened_a_server_that_is_to_leave_is_gone_in_bounded_time(
    history: list[tuple[float, Event]],
) -> None:
    server, now = keeper(), 0.0
    process = False
    for passed, event in history:
        now += passed
        if isinstance(event, Exited) and not process:
            continue
        server.decide(now, [event])
        process = server.running
    server.decide(now, [Leave()])
    now += LIMITS.stop_timeout_s
    actions = server.decide(now)
    now += KILL_AFTER_S
    actions += server.decide(now)
    if server.running:
        server.decide(now, [Exited("was ended by SIGKILL")])
    assert server.phase is Phase.GONE
