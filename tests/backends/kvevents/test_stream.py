from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kvevents.stream import Doubt, EventStream, ReplayRequest
from tests.backends.kvevents.publisher import CLEARED, Diary, packed, stored


def number(n: int) -> bytes:
    """Batch n of a publisher: it stores block n."""
    return packed(stored(n))


def a_stream(replay: bool = True, **more: Any) -> tuple[EventStream, Diary]:
    diary = Diary()
    stream = EventStream(diary, replay=replay, **more)
    stream.connected()
    return stream, diary


def answer(stream: EventStream, *numbers: int) -> None:
    """A whole replay."""
    for n in numbers:
        stream.replayed(n, number(n))
    stream.replay_ended()


def begun(replay: bool = True, **more: Any) -> tuple[EventStream, Diary]:
    """A trusted stream that has batches 0 to 2."""
    stream, diary = a_stream(replay, **more)
    if replay:
        answer(stream)
    for n in range(3):
        stream.batch(n, number(n))
    assert diary.trusted
    return stream, diary


def test_a_stream_from_batch_0_on_is_trusted() -> None:
    stream, diary = begun(replay=False)
    assert diary.told == [0, 1, 2]
    assert diary.reasons == ["complete"]
    assert stream.report().counters.batches == 3


def test_late_join_without_replay_is_told_but_not_trusted() -> None:
    stream, diary = a_stream(replay=False)
    stream.batch(7, number(7))
    assert (diary.told, diary.reasons, stream.doubt) == ([7], ["late_join"], Doubt.LATE_JOIN)


def test_late_join_replays_all_history_and_is_trusted() -> None:
    stream, diary = a_stream()
    assert stream.request == ReplayRequest(0, 1)
    stream.batch(2, number(2))
    assert diary.told == []
    answer(stream, 0, 1, 2)
    assert (diary.told, diary.trusted) == ([0, 1, 2], True)


def test_late_join_beyond_the_publishers_memory_stays_late() -> None:
    stream, diary = a_stream()
    answer(stream, 5, 6)
    assert (diary.told, diary.reasons) == ([5, 6], ["late_join"])


def test_a_publisher_that_remembers_nothing_is_joined_late() -> None:
    stream, diary = a_stream()
    answer(stream)
    assert diary.reasons == []  # nothing was published so far, as it seems
    stream.batch(4, number(4))
    answer(stream)
    assert (diary.told, diary.reasons, stream.request) == ([4], ["late_join"], None)


def test_a_gap_is_filled_in_order_before_newer_batches() -> None:
    stream, diary = begun()
    stream.batch(5, number(5))
    assert (diary.trusted, diary.reasons[-1]) == (False, "gap")
    assert stream.request is not None
    assert stream.request.start == 2  # the last one it had, to compare
    stream.batch(6, number(6))
    answer(stream, 2, 3, 4, 5)
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3, 4, 5, 6], True)
    counters = stream.report().counters
    assert (counters.gaps, counters.replayed, counters.lost_batches) == (1, 3, 0)


def test_a_gap_without_replay_is_counted_and_never_forgotten() -> None:
    stream, diary = begun(replay=False)
    stream.batch(5, number(5))
    stream.batch(6, number(6))
    assert (diary.told, diary.reasons) == ([0, 1, 2, 5, 6], ["complete", "gap"])
    assert stream.report().counters.lost_batches == 2


def test_clearing_makes_up_for_what_was_missed() -> None:
    stream, diary = begun(replay=False)
    stream.batch(5, number(5))
    stream.batch(6, packed(CLEARED, stored(60)))
    assert (diary.told[-2:], diary.trusted) == (["cleared", 60], True)


def test_a_gap_that_the_publisher_has_forgotten_stays() -> None:
    stream, diary = begun()
    stream.batch(9, number(9))
    answer(stream, 8, 9)
    assert (diary.told, diary.trusted, stream.doubt) == ([0, 1, 2, 8, 9], False, Doubt.GAP)
    assert stream.report().counters.lost_batches == 5


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    stream, diary = begun()
    stream.batch(9, number(9))
    for n in (2, 3, 4, 7):
        stream.replayed(n, number(n))
    assert stream.request == ReplayRequest(4, 3)
    answer(stream, 4, 5, 6, 7, 8, 9)
    assert (diary.told, diary.trusted) == (list(range(10)), True)


def test_a_hole_that_stays_is_jumped() -> None:
    stream, diary = begun()
    stream.batch(9, number(9))
    for n in (2, 3, 4, 7):
        stream.replayed(n, number(n))
    answer(stream, 4, 7, 8, 9)
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3, 4, 7, 8, 9], False)
    assert stream.report().counters.lost_batches == 2


def test_repetitions_are_dropped() -> None:
    stream, diary = begun()
    stream.batch(1, number(1))
    assert (diary.told, diary.trusted, stream.report().counters.duplicates) == ([0, 1, 2], True, 1)


def test_going_back_is_a_restart() -> None:
    stream, diary = begun(replay=False)
    stream.batch(0, packed(stored(100)))
    assert diary.told == [0, 1, 2, "cleared", 100]
    assert diary.reasons == ["complete", "restart", "complete"]
    stream.batch(1, packed(stored(101)))
    assert diary.trusted


def test_restart_joined_late_without_replay() -> None:
    stream, diary = begun(replay=False)
    stream.batch(1, packed(stored(101)))
    assert (diary.told, diary.reasons[-1]) == ([0, 1, 2, "cleared", 101], "late_join")


def test_restart_behind_a_lost_connection_is_seen_though_numbers_continue() -> None:
    stream, diary = begun()
    stream.disconnected()
    assert (diary.trusted, diary.reasons[-1]) == (False, "disconnected")
    stream.connected()
    stream.batch(3, packed(stored(103)))
    stream.replayed(2, packed(stored(102)))  # not the batch 2 that we know
    assert diary.told[-1] == "cleared"
    assert diary.reasons[-1] == "restart"
    assert stream.request is not None
    assert stream.request.start == 0
    for n in range(4):
        stream.replayed(n, packed(stored(100 + n)))
    stream.replay_ended()
    assert (diary.told[-4:], diary.trusted) == ([100, 101, 102, 103], True)


def test_restart_with_less_than_we_had_is_seen() -> None:
    stream, diary = begun()
    stream.disconnected()
    stream.connected()
    stream.replay_ended()
    assert diary.told == [0, 1, 2, "cleared"]
    stream.replayed(0, packed(stored(100)))
    stream.replay_ended()
    assert (diary.told[3:], diary.trusted) == (["cleared", 100], True)


def test_lost_connection_is_made_up_for_by_replay() -> None:
    stream, diary = begun()
    stream.disconnected()
    stream.connected()
    assert not diary.trusted
    answer(stream, 2, 3)
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3], True)


def test_lost_connection_without_replay_is_not_forgotten() -> None:
    stream, diary = begun(replay=False)
    stream.disconnected()
    stream.connected()
    stream.batch(3, number(3))
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3], False)


def test_batch_that_comes_before_news_of_the_connection_proves_nothing() -> None:
    stream, diary = begun()
    stream.disconnected()
    stream.batch(3, packed(stored(103)))
    assert stream.request is not None
    assert stream.request.start == 2
    assert diary.told == [0, 1, 2]


def test_undecodable_batch_is_never_made_up_for() -> None:
    stream, diary = begun()
    stream.batch(3, b"\xc1")
    stream.batch(4, number(4))
    assert (diary.told, diary.reasons[-1]) == ([0, 1, 2, 4], "undecodable")
    stream.check()
    answer(stream, 4)
    assert not diary.trusted
    stream.batch(5, packed(CLEARED))
    assert diary.trusted


def test_message_without_a_number_ends_trust() -> None:
    stream, diary = begun()
    stream.malformed()
    assert diary.reasons[-1] == "undecodable"


def test_unknown_events_are_counted() -> None:
    stream, diary = begun()
    stream.batch(3, packed({"type": "BlockMoved"}, stored(3)))
    assert (diary.told[-1], diary.trusted, stream.report().counters.unknown) == (3, True, 1)


def test_a_check_keeps_trust_and_finds_a_lost_last_batch() -> None:
    stream, diary = begun()
    stream.check()
    assert diary.trusted
    answer(stream, 2, 3)
    assert (diary.told, diary.reasons) == ([0, 1, 2, 3], ["complete"])


def test_a_gap_right_after_a_check_that_found_nothing_is_asked_for() -> None:
    stream, diary = begun()
    stream.check()
    stream.batch(4, number(4))  # published, as was the lost 3, after the question was read
    answer(stream, 2)
    assert (diary.trusted, stream.request) == (False, ReplayRequest(2, 3))
    answer(stream, 2, 3, 4)
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3, 4], True)


def test_unanswered_replay_leaves_a_gap_and_goes_on() -> None:
    stream, diary = begun()
    stream.batch(5, number(5))
    stream.batch(6, number(6))
    stream.replay_failed()
    stream.batch(7, number(7))
    assert (diary.told, diary.reasons[-1], stream.request) == ([0, 1, 2, 5, 6, 7], "gap", None)


def test_a_replay_that_breaks_off_is_asked_to_go_on() -> None:
    stream, diary = begun()
    stream.batch(9, number(9))
    for n in (2, 3, 4):
        stream.replayed(n, number(n))
    stream.replay_failed()
    assert stream.request == ReplayRequest(4, 3)
    answer(stream, 4, 5, 6, 7, 8)
    assert (diary.told, diary.trusted) == (list(range(10)), True)


def test_unanswered_replay_at_the_start_is_a_late_join() -> None:
    stream, diary = a_stream()
    stream.batch(5, number(5))
    stream.replay_failed()
    assert (diary.told, diary.reasons) == ([5], ["late_join"])


def test_unanswered_replay_after_a_lost_connection_proves_nothing() -> None:
    stream, diary = begun()
    stream.disconnected()
    stream.connected()
    stream.batch(3, number(3))
    stream.replay_failed()
    assert (diary.told, diary.trusted, stream.doubt) == ([0, 1, 2, 3], False, Doubt.DISCONNECTED)


def test_what_is_held_back_is_bounded_and_asked_for_again() -> None:
    stream, diary = begun(max_waiting=2)
    for n in range(4, 10):
        stream.batch(n, number(n))
    answer(stream, 2, 3, 4)  # 4 and 5 were held back; 6 to 9 were not
    assert (diary.told, diary.trusted) == ([0, 1, 2, 3, 4, 5], False)
    answer(stream, 5, 6, 7, 8, 9)
    assert (diary.told, diary.trusted) == (list(range(10)), True)
    assert stream.report().counters.overflows == 1


def test_bytes_held_back_are_bounded_too() -> None:
    stream, diary = begun(max_waiting_bytes=2 * len(number(4)))
    for n in range(4, 8):
        stream.batch(n, number(n))
    answer(stream, 2, 3)
    assert diary.told == [0, 1, 2, 3, 4, 5]
    assert stream.request is not None


def test_told_of_a_restart_it_forgets_and_reads_anew() -> None:
    stream, diary = begun()
    stream.restarted()
    assert (diary.told[-1], diary.trusted) == ("cleared", False)
    answer(stream, 0, 1)
    assert (diary.told[-2:], diary.trusted) == ([0, 1], True)


# Any order of events: a publisher that clears, restarts and forgets, over a connection that loses and breaks.


@dataclass
class World:
    """The publisher, the network and the stream, played by hand."""

    replay: bool
    memory: int
    diary: Diary = field(default_factory=Diary)
    history: list[bytes] = field(default_factory=list)
    blocks: int = 0
    online: bool = False
    asked: ReplayRequest | None = None
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    sure: int = 0

    def __post_init__(self) -> None:
        self.stream = EventStream(self.diary, replay=self.replay, max_waiting=3)

    def publish(self, clear: bool, lost: bool) -> None:
        self.blocks += 1
        events = [CLEARED, stored(self.blocks)] if clear else [stored(self.blocks)]
        self.history.append(packed(*events))
        if self.online and not lost:
            self.stream.batch(len(self.history) - 1, self.history[-1])

    def toggle(self, restart: bool) -> None:
        if self.online:
            self.stream.disconnected()
        self.online = not self.online
        if restart and not self.online:
            self.history.clear()
        if self.online:
            self.stream.connected()

    def serve(self, count: int, lose: bool, fail: bool) -> None:
        """Hand over some of an answer, the request having been read when its first part goes out."""
        request = self.stream.request
        if request is None:
            return
        if fail:
            self.stream.replay_failed()
            return
        if request is not self.asked:
            self.asked = request
            kept = range(max(request.start, len(self.history) - self.memory), len(self.history))
            self.answers = [(n, self.history[n]) for n in kept]
            self.sure = 2
        for _ in range(count):
            if self.stream.request is not request:
                return
            if not self.answers:
                self.stream.replay_ended()
                return
            item = self.answers.pop(0)
            # Never the first of an answer (the last batch we had, and the next): the ROUTER's queue is empty then.
            if lose and self.sure == 0:
                lose = False
                continue
            self.sure = max(0, self.sure - 1)
            self.stream.replayed(*item)

    def expected(self, upto: int) -> list[object]:
        """What a sink holds that was told the first batches of this publisher."""
        diary = Diary()
        reference = EventStream(diary, replay=False)
        for n in range(upto):
            reference.batch(n, self.history[n])
        return _since_cleared(diary.told)

    def verify(self) -> None:
        held = _since_cleared(self.diary.told)
        assert len(set(held)) == len(held)  # nothing twice
        assert self.diary.trusted == (self.stream.doubt is None)
        if self.diary.trusted:
            assert held == self.expected(self.stream.report().next_sequence or 0)


def _since_cleared(told: list[object]) -> list[object]:
    last = max((i for i, entry in enumerate(told) if entry == "cleared"), default=-1)
    return told[last + 1 :]


_action = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from([False] * 9 + [True]), st.booleans()),
    st.tuples(st.just("publish"), st.just(False), st.just(False)),
    st.tuples(st.just("toggle"), st.booleans()),
    st.tuples(st.just("serve"), st.integers(1, 9), st.sampled_from([False] * 3 + [True]), st.just(False)),
)
_failure = st.tuples(st.just("serve"), st.just(1), st.just(False), st.just(True))
_check = st.tuples(st.just("check"))


def _play(world: World, actions: list[tuple[Any, ...]]) -> None:
    for name, *arguments in actions:
        if name == "check":
            world.stream.check()
        else:
            getattr(world, name)(*arguments)
        world.verify()


@settings(max_examples=400, deadline=None)
@given(st.lists(_action | _check, max_size=50))
def test_with_replay_nothing_is_lost_doubled_or_out_of_order(actions: list[tuple[Any, ...]]) -> None:
    world = World(replay=True, memory=1000)
    _play(world, [("toggle", False), *actions])
    if not world.online:
        world.toggle(False)
    world.publish(False, False)
    for _ in range(3):
        world.stream.check()
        for _ in range(60):
            world.serve(1000, False, False)
    assert world.stream.request is None
    assert world.stream.report().next_sequence == len(world.history)
    assert _since_cleared(world.diary.told) == world.expected(len(world.history))


@settings(max_examples=400, deadline=None)
@given(st.booleans(), st.integers(0, 5), st.lists(_action | _check | _failure, max_size=50))
def test_trust_always_means_a_complete_history(replay: bool, memory: int, actions: list[tuple[Any, ...]]) -> None:
    _play(World(replay, memory), [("toggle", False), *actions])


@pytest.mark.parametrize("replay", [True, False])
def test_numbers_of_any_size_are_taken(replay: bool) -> None:
    stream, _ = begun(replay)
    stream.batch(2**64 - 2, number(5))
    stream.replay_failed()
    assert stream.report().counters.lost_batches == 2**64 - 5
