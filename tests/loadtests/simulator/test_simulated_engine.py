"""The engine model against cases that can be computed by hand."""

from __future__ import annotations

from random import Random

import pytest

from loadtests.simulator.cache import Cache
from loadtests.simulator.engine import Constants, Engine, Sequence
from loadtests.simulator.traffic import Job, prefix_of

PLAIN = Constants(prefill_ms=1.0, curve=0.0, step_ms=10.0, request_ms=1.0, kv_ms=0.0, chunk=100, kv_tokens=10_000)


def job(index: int, *path: tuple[int, int], answer: int = 1, adapter: str | None = None) -> Job:
    tokens = sum(length for _, length in path)
    return Job(index, 0.0, path, tokens, answer, -1 - index, prefix_of(path), adapter=adapter)


class Bench:
    """One engine with a clock; what it says of each request, in milliseconds."""

    def __init__(self, constants: Constants, jump: bool = True) -> None:
        self.first: dict[int, float] = {}
        self.end: dict[int, float] = {}
        self.cached: dict[int, int] = {}
        self.engine = Engine(constants, self._first, self._finish, jump=jump)
        self.due: float | None = None
        self.wakes = 0

    def _first(self, sequence: Sequence, now: float) -> None:
        self.first[sequence.job.index] = round(now * 1000.0, 6)

    def _finish(self, sequence: Sequence, now: float) -> None:
        self.end[sequence.job.index] = round(now * 1000.0, 6)
        self.cached[sequence.job.index] = sequence.cached

    def submit(self, at_ms: float, new: Job) -> Sequence:
        self.run(at_ms)
        sequence = Sequence(new, None)
        due = self.engine.submit(sequence, at_ms / 1000.0)
        self.due = due if due is not None else self.due
        return sequence

    def run(self, until_ms: float = float("inf")) -> None:
        while self.due is not None and self.due * 1000.0 <= until_ms:
            self.wakes += 1
            self.due = self.engine.wake(self.due)


def test_a_prompt_takes_a_step_for_each_chunk_and_an_answer_one_for_each_token_after_the_first() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 250), answer=3))
    bench.run()
    # Chunks of 100, 100 and 50 tokens, each with 10 ms and 1 ms for the request; then two steps of 11 ms.
    assert bench.first[0] == 3 * 11.0 + 250.0
    assert bench.end[0] == bench.first[0] + 22.0


def test_later_tokens_cost_more_where_attention_counts() -> None:
    bench = Bench(Constants(prefill_ms=1.0, curve=0.01, step_ms=0.0, request_ms=0.0, kv_ms=0.0, chunk=100))
    bench.submit(0.0, job(0, (1, 200)))
    bench.run()
    # The integral of 1 + 0.01 x from 0 to 200, whatever the chunks.
    assert bench.first[0] == pytest.approx(200.0 + 0.01 * 200.0**2 / 2.0)


def test_decoding_slows_down_with_every_token_that_is_held() -> None:
    bench = Bench(Constants(prefill_ms=0.0, curve=0.0, step_ms=10.0, request_ms=0.0, kv_ms=0.1, kv_tokens=10_000))
    bench.submit(0.0, job(0, (1, 16), answer=4))
    bench.run()
    # The prefill step holds nothing that is decoded yet; then 17, 18 and 19 tokens.
    assert bench.end[0] == pytest.approx(10.0 + 3 * 10.0 + 0.1 * (17 + 18 + 19))
    assert bench.wakes == 2, "three steps in one jump"


def test_two_requests_share_the_chunk_first_come_first_served() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 150)))
    bench.submit(0.0, job(1, (2, 40)))
    bench.run()
    # Step 1: 100 tokens of the first alone, since the second came when the step had begun. Step 2: its 50, and 40.
    assert bench.first[0] == 111.0 + (10.0 + 2.0 + 50.0 + 40.0)
    assert bench.first[1] == bench.first[0]


def test_an_arrival_is_admitted_at_the_next_step_of_a_jump() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 16), answer=100))
    bench.submit(100.0, job(1, (2, 16)))
    bench.run()
    # Steps of 11 ms since 27 ms: one ends at 104 ms. Then one with 16 prompt tokens and two requests.
    assert bench.first[1] == 104.0 + 10.0 + 2.0 + 16.0


def test_what_was_computed_is_cached_answer_included() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 160), answer=32))
    bench.run()
    bench.submit(1000.0, job(1, (1, 160), (2, 40)))
    bench.submit(2000.0, job(2, (1, 160), (-1, 32), (3, 64)))
    bench.submit(3000.0, job(3, (1, 160)))
    bench.submit(4000.0, job(4, (9, 160)))
    bench.run()
    assert bench.cached == {0: 0, 1: 160, 2: 192, 3: 159, 4: 0}
    assert bench.first[3] == 3000.0 + 12.0, "of a prompt that is cached whole one token is computed"


def test_requests_that_arrive_together_do_not_share_what_neither_has_computed() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (7, 10)))
    bench.submit(0.0, job(1, (1, 64), (2, 16)))
    bench.submit(0.0, job(2, (1, 64), (3, 16)))
    bench.run()
    assert bench.cached[2] == 0
    engine = bench.engine
    # It is stored once all the same: both prompts, their common part once, and three answers of a token.
    assert (engine.cache.tokens, engine.private, engine.cache.locked) == (10 + 64 + 16 + 16 + 3, 0, 0)


def test_who_waits_for_a_part_of_the_chunk_finds_what_was_computed_meanwhile() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 320)))
    bench.submit(0.0, job(1, (1, 320), (2, 16)))
    bench.run()
    # Begun in the fourth step, which the first one leaves 80 tokens of: 300 were there, 288 in whole blocks.
    assert bench.cached[1] == 288
    assert bench.first[1] == bench.first[0] == 3 * 111.0 + (10.0 + 2.0 + 20.0 + 48.0)


def test_least_recently_used_leaves_go_first_and_in_whole_blocks() -> None:
    cache = Cache()
    for number, parent in ((1, None), (2, 1), (3, 1), (4, None)):
        cache.extend(number, parent, 64)
    for path in ([(1, 64), (2, 64)], [(4, 64)], [(1, 64), (3, 64)]):
        cache.lock(path, 0, len(path))
        cache.unlock(path, len(path))
    cache.evict(1)
    assert (cache.tokens, cache.match([(1, 64), (2, 64)])) == (240, (112, 2))
    cache.evict(48)
    assert cache.match([(1, 64), (2, 64)]) == (64, 1)
    cache.evict(128)
    # The leaf that was used last outlives the other branch; its parent is never gone before it.
    assert cache.match([(4, 64)]) == (0, 0)
    assert cache.match([(1, 64), (3, 64)]) == (64, 1)
    cache.evict(1000)
    assert (cache.tokens, cache.evictable) == (0, 0)


def test_what_is_in_use_is_not_evicted() -> None:
    cache = Cache()
    cache.extend(1, None, 64)
    cache.lock([(1, 64)], 0, 1)
    cache.evict(64)
    assert (cache.tokens, cache.locked) == (64, 64)


def test_who_was_admitted_last_is_put_back_when_the_cache_is_full_and_loses_no_token() -> None:
    constants = Constants(prefill_ms=0.1, curve=0.0, step_ms=1.0, request_ms=0.0, kv_ms=0.0, chunk=500, kv_tokens=600)
    bench = Bench(constants)
    first = bench.submit(0.0, job(0, (1, 200), answer=200))
    last = bench.submit(0.0, job(1, (2, 200), answer=200))
    bench.run()
    engine = bench.engine
    assert engine.preemptions == 1
    assert bench.end[0] < bench.end[1]
    assert first.generated == 1
    assert last.generated > 1, "begun again with the tokens that it had"
    assert (engine.private, engine.cache.locked, engine.decoding, engine.context) == (0, 0, 0, 0)
    assert engine.cache.tokens <= constants.kv_tokens


def test_no_more_run_than_may() -> None:
    bench = Bench(Constants(prefill_ms=1.0, curve=0.0, step_ms=10.0, request_ms=0.0, kv_ms=0.0, max_running=1))
    bench.submit(0.0, job(0, (1, 10), answer=3))
    bench.submit(0.0, job(1, (2, 10), answer=1))
    bench.run()
    assert bench.first == {0: 20.0, 1: 40.0 + 20.0}


def test_an_adapter_is_loaded_once_and_the_one_unused_for_longest_goes() -> None:
    constants = Constants(
        prefill_ms=1.0, curve=0.0, step_ms=10.0, request_ms=0.0, kv_ms=0.0, adapter_slots=2, adapter_ms=250.0
    )
    bench = Bench(constants)
    for index, name in enumerate("abacb"):
        bench.submit(1000.0 * index, job(index, (index + 1, 10), adapter=name))
    bench.run()
    assert [bench.first[index] - 1000.0 * index for index in range(5)] == [270.0, 270.0, 20.0, 270.0, 270.0]
    assert bench.engine.adapter_loads == 4
    assert list(bench.engine.loaded) == ["c", "b"]


def test_a_request_waits_while_all_slots_are_in_use_and_others_pass() -> None:
    constants = Constants(
        prefill_ms=1.0, curve=0.0, step_ms=10.0, request_ms=0.0, kv_ms=0.0, adapter_slots=1, adapter_ms=10.0
    )
    bench = Bench(constants)
    bench.submit(0.0, job(0, (1, 10), answer=5, adapter="a"))
    bench.submit(0.0, job(1, (2, 10), adapter="b"))
    bench.submit(0.0, job(2, (3, 10), adapter="a"))
    bench.run()
    assert bench.end[2] < bench.end[0] < bench.first[1]


def test_nobody_waits_for_ever_for_a_slot() -> None:
    constants = Constants(
        prefill_ms=0.0, curve=0.0, step_ms=10.0, request_ms=0.0, kv_ms=0.0, adapter_slots=1, adapter_ms=100.0
    )
    bench = Bench(constants)
    for index in range(40):  # always two of them at once
        bench.submit(100.0 * index, job(index, (index + 1, 10), answer=20, adapter="a"))
        if not index:
            bench.submit(50.0, job(99, (1000, 10), adapter="b"))
    bench.run()
    # Others pass for ten times the 100 ms, then two answers of 200 ms are waited for, and a load.
    assert 1000.0 < bench.first[99] < 1600.0
    assert bench.engine.adapter_loads == 3


def test_a_crash_loses_everything_and_says_what() -> None:
    bench = Bench(PLAIN)
    bench.submit(0.0, job(0, (1, 16), answer=50))
    bench.submit(100.0, job(1, (2, 500)))
    bench.submit(100.0, job(2, (3, 500)))
    bench.run(150.0)
    lost = bench.engine.crash()
    assert sorted(each.job.index for each in lost) == [0, 1, 2]
    assert (bench.engine.cache.tokens, bench.engine.running, bench.engine.busy) == (0, 0, False)


def test_jumps_change_nothing() -> None:
    rng = Random(5)
    jobs = []
    for index in range(200):
        path = ((1 + rng.randrange(20), 400), (1000 + index, 1 + rng.randrange(800)))
        jobs.append((rng.random() * 30_000.0, job(index, *path, answer=1 + rng.randrange(300))))
    jobs.sort(key=lambda each: each[0])
    constants = Constants(prefill_ms=0.2, kv_tokens=12_000, max_running=24, kv_ms=1e-3)
    jumping, stepping = Bench(constants), Bench(constants, jump=False)
    for at_ms, each in jobs:
        jumping.submit(at_ms, each)
        stepping.submit(at_ms, each)
    jumping.run()
    stepping.run()
    assert jumping.engine.preemptions == stepping.engine.preemptions > 0
    assert jumping.cached == stepping.cached
    assert jumping.first == pytest.approx(stepping.first)
    assert jumping.end == pytest.approx(stepping.end)
    assert jumping.wakes * 3 < stepping.wakes
    assert sorted(jumping.end) == list(range(200))
