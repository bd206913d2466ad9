"""What workers tell each other, in one process: messages go from one `Peerage` to the other by hand."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.policies import make_policy
from routing.prefix import Prefix
from routing.router import Change, PoolState, Router
from routing.sharing import DEAD_AFTER_S, MAX_MESSAGE_BYTES, MAX_UNTOLD, Peerage
from routing.types import InferenceRequest, Replica
from routing.work import AT_ONCE_TOKENS, NOTHING, Totals, Work


class Worker:
    """One gateway worker as far as routing goes, with its own replicas of the same engines."""

    def __init__(self, name: str, replicas: int = 2) -> None:
        self.replicas = [Replica(f"r{n}", "pool", f"http://engine{n}:1", "vllm") for n in range(replicas)]
        self.router = Router(make_policy("cost", Random(1)), PoolState())
        self.wakes: list[bool] = []
        self.peerage = Peerage(name.encode().ljust(8), self.router.state, self.replicas, self.wakes.append)

    def dispatch(self, id: str, replica: int = 0, prefix: Prefix | None = None, tokens: int = 1000) -> InferenceRequest:
        request = InferenceRequest(id, "m", True, 4 * tokens, prompt_tokens=tokens, prefix=prefix)
        self.router.dispatched(request, self.replicas[replica], 1.0)
        return request

    def hears(self, messages: Iterable[bytes], now: float = 1.0) -> list[bool]:
        return [self.peerage.absorb(message, now) for message in messages]

    def match(self, prefix: Prefix) -> dict[str, int]:
        state = self.router.state
        return {state.by_slot[slot].name: units for slot, units in state.index.match(prefix).items()}


def prefix(seed: int, checkpoints: int = 3) -> Prefix:
    digests = [seed * 1000 + number for number in range(checkpoints)]
    ends = [512 * (number + 1) for number in range(checkpoints)]
    return Prefix(digests, ends, ends[-1] + 100, [(seed * 1000 + 999, ends[-1] + 100)])


def work_of(replica: Replica) -> tuple[int, int, int, int]:
    work = replica.work
    return work.queued, work.queued_tokens, work.running, work.running_tokens


def test_work_of_one_worker_counts_with_the_other() -> None:
    one, two = Worker("one"), Worker("two")
    request = one.dispatch("a", tokens=1000)
    two.dispatch("b", tokens=500)
    two.hears(one.peerage.pack())
    assert work_of(two.replicas[0]) == (2, 1500, 0, 0)
    assert two.replicas[0].work.own == Totals(1, 500)
    one.router.first_token(request, one.replicas[0], 1.1)
    two.hears(one.peerage.pack())
    assert work_of(two.replicas[0]) == (1, 500, 1, 1000)
    one.router.finished(request, one.replicas[0], 1.2)
    two.hears(one.peerage.pack())
    assert work_of(two.replicas[0]) == (1, 500, 0, 0)


def test_what_has_not_changed_is_not_told_and_a_heartbeat_tells_it_again() -> None:
    one, two = Worker("one"), Worker("two")
    assert one.peerage.pack() == []
    assert one.peerage.pack(heartbeat=True) == []
    one.dispatch("a")
    (first,) = one.peerage.pack()
    assert one.peerage.pack() == []
    (again,) = one.peerage.pack(heartbeat=True)
    two.hears([again])
    assert work_of(two.replicas[0]) == (1, 1000, 0, 0)
    assert len(first) < 60


def test_a_prompt_that_one_worker_sent_is_believed_by_the_other() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a", 1, prefix(7))
    two.hears(one.peerage.pack())
    assert two.match(prefix(7)) == one.match(prefix(7)) == {"r1": prefix(7).total}
    assert two.match(prefix(8)) == {}
    assert two.peerage.pack() == []  # what was heard is not told on


def test_what_is_dropped_after_a_failure_is_dropped_at_the_peer() -> None:
    one, two = Worker("one"), Worker("two")
    request = one.dispatch("a", 0, prefix(7))
    two.hears(one.peerage.pack())
    one.router.failed(request, one.replicas[0], 1.1)
    two.hears(one.peerage.pack())
    assert two.match(prefix(7)) == {}
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)


def test_only_the_end_of_a_back_and_forth_is_told() -> None:
    one, two = Worker("one"), Worker("two")
    state, replica = one.router.state, one.replicas[0]
    assert state.on_change is not None
    state.on_change(Change(replica, (1, 2), (128, 128)))
    state.on_change(Change(replica, dropped=(1, 2)))
    state.on_change(Change(replica, (2, 3), (100, 100)))
    two.hears(one.peerage.pack())
    held, _ = two.router.state.index.held(two.router.state.slot(two.replicas[0]))
    assert sorted(held) == [2, 3]


def test_messages_told_twice_or_by_oneself_count_once() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a")
    messages = one.peerage.pack()
    one.hears(messages)
    two.hears([*messages, *messages])
    assert work_of(one.replicas[0]) == work_of(two.replicas[0]) == (1, 1000, 0, 0)


def test_a_gap_is_noticed_and_absolute_totals_repair_it() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a")
    two.hears(one.peerage.pack())
    one.dispatch("b")
    assert one.peerage.pack()  # and lost
    one.dispatch("c")
    assert two.hears(one.peerage.pack()) == [False]
    assert two.peerage.gaps == 1
    assert work_of(two.replicas[0]) == (3, 3000, 0, 0)


def test_a_worker_that_begins_late_has_missed_nothing() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a")
    assert one.peerage.pack()
    one.dispatch("b")
    assert two.hears(one.peerage.pack()) == [True]


def test_silence_ends_a_peers_work_but_not_what_it_knew() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a", 0, prefix(7))
    two.hears(one.peerage.pack(), now=10.0)
    assert two.peerage.peers == 1
    two.peerage.expire(10.0 + DEAD_AFTER_S)
    assert work_of(two.replicas[0]) == (1, 1000, 0, 0)
    assert two.peerage.expire(10.1 + DEAD_AFTER_S) == 1
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)
    assert two.peerage.peers == 0
    assert two.match(prefix(7)) == {"r0": prefix(7).total}
    two.hears(one.peerage.pack(heartbeat=True), now=20.0)
    assert work_of(two.replicas[0]) == (1, 1000, 0, 0)


def test_a_farewell_ends_it_at_once() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a")
    two.hears(one.peerage.pack())
    two.hears([one.peerage.leave()])
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)
    one.dispatch("b")
    assert one.router.state.on_change is None
    assert one.peerage.pack() == []


def test_old_messages_tell_of_caches_only() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a", 0, prefix(7))
    for message in one.peerage.pack():
        two.peerage.absorb(message, 1.0, old=True)
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)
    assert two.match(prefix(7)) == {"r0": prefix(7).total}


@pytest.mark.parametrize(
    ("told", "own", "believed"),
    [("e1", "e1", True), ("e1", "e2", False), (None, "e2", True), ("e1", None, True), (None, None, True)],
)
def test_keys_of_another_epoch_are_passed_over(told: str | None, own: str | None, believed: bool) -> None:
    one, two = Worker("one"), Worker("two")
    one.replicas[0].epoch = told
    two.replicas[0].epoch = own
    one.dispatch("a", 0, prefix(7))
    two.hears(one.peerage.pack())
    assert bool(two.match(prefix(7))) == believed
    assert work_of(two.replicas[0])[0] == 1


def test_keys_of_an_epoch_that_ended_before_they_were_told_are_not_told() -> None:
    one, two = Worker("one"), Worker("two")
    one.replicas[0].epoch = "e1"
    one.dispatch("a", 0, prefix(7))
    one.replicas[0].epoch = two.replicas[0].epoch = "e2"
    two.hears(one.peerage.pack())
    assert two.match(prefix(7)) == {}


@pytest.mark.parametrize("learned", ["e1", "e2"])
def test_what_was_believed_before_the_epoch_was_known_is_checked_when_it_is(learned: str) -> None:
    one, two = Worker("one"), Worker("two")
    one.replicas[0].epoch = "e1"
    one.dispatch("a", 0, prefix(7))
    two.hears(one.peerage.pack())
    assert two.match(prefix(7))
    two.replicas[0].epoch = learned
    two.peerage.pack(heartbeat=True)
    assert bool(two.match(prefix(7))) == (learned == "e1")


def test_a_large_dispatch_is_told_at_once_and_others_wake_once() -> None:
    one = Worker("one")
    one.dispatch("a")
    one.dispatch("b", 1)
    one.dispatch("c", 0, prefix(7))
    assert one.wakes == [False]
    one.dispatch("d", tokens=AT_ONCE_TOKENS)
    assert one.wakes == [False, True]
    one.peerage.pack()
    one.dispatch("e", 0, prefix(8))
    assert one.wakes == [False, True, False]


def test_replicas_come_and_go() -> None:
    one, two = Worker("one", 3), Worker("two", 2)
    request = one.dispatch("a", 2, prefix(7))
    messages = one.peerage.pack()
    two.hears(messages)  # of a replica that is not there
    assert two.peerage.unreadable == 0
    third = Replica("r2", "pool", "http://engine2:1", "vllm")
    two.replicas.append(third)
    two.peerage.refresh(two.replicas)
    two.hears(one.peerage.pack(heartbeat=True))
    assert work_of(third) == (1, 1000, 0, 0)
    two.peerage.refresh(two.replicas[:2])
    assert work_of(third) == (0, 0, 0, 0)
    one.peerage.refresh(one.replicas[:2])
    one.router.finished(request, one.replicas[2], 2.0)
    assert one.peerage.pack(heartbeat=True) == []


def test_much_is_told_in_several_messages() -> None:
    one, two = Worker("one", 1200), Worker("two", 1200)
    assert one.router.state.on_change is not None
    for number in range(1200):
        one.dispatch(str(number), number)
    one.router.state.slot(one.replicas[0])
    digests = list(range(1, 9001))
    one.router.state.on_change(Change(one.replicas[0], digests, [10] * len(digests)))
    messages = one.peerage.pack()
    assert len(messages) > 3
    assert max(map(len, messages)) <= MAX_MESSAGE_BYTES
    assert all(two.hears(messages))
    assert [work_of(each) for each in two.replicas] == [(1, 1000, 0, 0)] * 1200
    state = two.router.state
    assert state.index.held(state.slot(two.replicas[0]))[0] == digests


def test_what_nobody_takes_does_not_grow() -> None:
    one = Worker("one")
    on_change = one.router.state.on_change
    assert on_change is not None
    for number in range(3 * MAX_UNTOLD):
        on_change(Change(one.replicas[0], (number,), (100,)))
    assert len(one.peerage._changes) <= MAX_UNTOLD
    assert len(one.peerage._works) <= len(one.replicas)


def test_many_lives_of_workers_are_not_remembered_for_ever() -> None:
    two = Worker("two")
    for number in range(1500):
        one = Worker("x")
        one.peerage._worker = struct.pack("<Q", number)
        one.dispatch("a")
        two.hears(one.peerage.pack(), now=float(number))
    assert len(two.peerage._peers) == 1024
    two.peerage.expire(10_000.0)
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)


@given(st.binary(max_size=80), st.integers(0, 100), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_message_can_do_harm(noise: bytes, cut: int, true_head: bool) -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a", 0, prefix(7))
    (message,) = one.peerage.pack()
    two.peerage.absorb((message[:cut] + noise) if true_head else noise, 1.0)
    assert all(number >= 0 for each in two.replicas for number in work_of(each))


def test_another_version_is_passed_over() -> None:
    one, two = Worker("one"), Worker("two")
    one.dispatch("a")
    (message,) = one.peerage.pack()
    assert two.hears([b"\x02" + message[1:]]) == [True]
    assert work_of(two.replicas[0]) == (0, 0, 0, 0)
    assert two.peerage.unreadable == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_after_any_history_all_workers_agree(steps: Sequence[tuple[int, int, int]]) -> None:
    workers = [Worker(name) for name in ("one", "two", "three")]
    flying: list[tuple[Worker, InferenceRequest, Replica]] = []
    for count, (number, kind, seed) in enumerate(steps):
        worker = workers[number]
        if kind < 2:
            request = worker.dispatch(f"r{count}", seed % 2, prefix(seed + 1), 100 * (seed + 1))
            flying.append((worker, request, worker.replicas[seed % 2]))
        elif flying:
            mine, request, replica = flying.pop(seed % len(flying))
            if kind == 2:
                mine.router.first_token(request, replica, 2.0)
            mine.router.finished(request, replica, 3.0)
        messages = worker.peerage.pack(heartbeat=seed == 3)
        for other in workers:
            other.hears(messages)
    for worker in workers:
        messages = worker.peerage.pack()
        for other in workers:
            other.hears(messages)
    assert len({tuple(map(work_of, worker.replicas)) for worker in workers}) == 1
    for seed in range(1, 5):
        assert len({tuple(sorted(worker.match(prefix(seed)).items())) for worker in workers}) == 1
    for worker in workers:
        worker.hears(other.peerage.leave() for other in workers if other is not worker)
        assert [Totals(*work_of(each)) for each in worker.replicas] == [each.work.own for each in worker.replicas]


def test_without_work_nothing_is_negative() -> None:
    one, two = Worker("one"), Worker("two")
    one.replicas[0].work.queue(100, 1.0)
    one.replicas[0].work.unqueue(200, 1.0)
    two.hears(one.peerage.pack())
    assert two.replicas[0].work.queued_tokens == 0


def test_what_a_request_pays_is_an_append() -> None:
    """About 0.5 us for the four events of a request; asserted with room for a busy machine."""
    one = Worker("one")
    work = one.replicas[0].work
    best = min(_seconds_of_events(work) for _ in range(5))
    assert best / 10_000 < 10e-6
    assert work.own == NOTHING


def _seconds_of_events(work: Work) -> float:
    begun = time.perf_counter()
    for _ in range(10_000):
        work.queue(100, 1.0)
        work.begin(100, 100, 1.0)
        work.end(100)
    return time.perf_counter() - begun
