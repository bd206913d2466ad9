"""What holds after any history of a pool: see each rule and invariant."""

from __future__ import annotations

import ast
from pathlib import Path
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import routing
from routing.filters import SOFT
from routing.health import Change, Evidence, Health, HealthState, Rules
from routing.observing import heed_ejection, observe
from routing.policies.balanced import LeastOutstanding
from routing.router import Router
from routing.types import InferenceRequest, Replica, Reservation

REQUEST = InferenceRequest("req_1", "m", stream=True, prompt_bytes=1)
RULES = Rules()
LONGEST_OUT_S = RULES.max_ejection_s * (1.0 + RULES.jitter)
indexes = st.integers(0, 5)


class Fleet(RuleBasedStateMachine):
    """A pool to which anything may happen, in any order, as one worker sees it."""

    @initialize(count=st.integers(1, 6), seed=st.integers(0, 10))
    def build(self, count: int, seed: int) -> None:
        self.now = 1000.0
        self.pool = [
            Replica(f"r{each}", "p", "http://x", "openai", health=Health(RULES, Random(seed + each)))
            for each in range(count)
        ]
        self.policy = Router(LeastOutstanding(Random(seed)))
        self.held: list[tuple[Replica, Reservation]] = []

    def one(self, index: int) -> Replica:
        return self.pool[index % len(self.pool)]

    @rule(elapsed_s=st.sampled_from((0.01, 1.0, 4.0, 11.0, 31.0, 61.0, 400.0)))
    def time_passes(self, elapsed_s: float) -> None:
        self.now += elapsed_s

    @rule(index=indexes, evidence=st.sampled_from(Evidence), times=st.sampled_from((1, 3, 5, 12)))
    def attempts_end(self, index: int, evidence: Evidence, times: int) -> None:
        replica = self.one(index)
        for _ in range(times):
            was_out = replica.health.out
            change = observe(replica, self.pool, evidence, self.now)
            assert replica.health.out or change is not Change.EJECTED
            assert (change is Change.RECOVERED) == (was_out and not replica.health.out)

    @rule(index=indexes, evidence=st.sampled_from((Evidence.REJECTED, Evidence.OVERLOADED)))
    def a_client_errs(self, index: int, evidence: Evidence) -> None:
        """It may show that a replica is there; it never makes one worse, and never decides about an ejection."""
        replica = self.one(index)
        before, out, row = replica.unavailable_reason(self.now), replica.health.out, replica.health.ejection.consecutive
        assert observe(replica, self.pool, evidence, self.now) is None
        assert (replica.health.out, replica.health.ejection.consecutive) == (out, row)
        after = replica.unavailable_reason(self.now)
        if before is None:
            assert after is None
        elif before not in ("cooling_down", "unresponsive"):
            assert after == before

    @rule()
    def a_request_is_sent(self) -> None:
        replica = self.policy.decide(REQUEST, self.pool, self.now).replica
        assert replica is not None
        reservation = replica.reserve(REQUEST)
        reservation.__enter__()
        self.held.append((replica, reservation))

    @rule(evidence=st.sampled_from((None, *Evidence)), last=st.booleans())
    def a_request_ends(self, evidence: Evidence | None, last: bool) -> None:
        """None: its client has gone, so nothing is learnt."""
        if not self.held:
            return
        replica, reservation = self.held.pop(-1 if last else 0)
        if evidence is not None:
            observe(replica, self.pool, evidence, self.now)
        reservation.__exit__()

    @rule(index=indexes, ready=st.booleans())
    def a_probe_is_answered(self, index: int, ready: bool) -> None:
        self.one(index).health.probed(ready, self.now)

    @rule(index=indexes, refused=st.booleans(), times=st.integers(1, 3))
    def probes_fail(self, index: int, refused: bool, times: int) -> None:
        for _ in range(times):
            self.one(index).health.probe_failed(refused, self.now)

    @rule(index=indexes, engine=st.booleans())
    def the_watchdog_looks(self, index: int, engine: bool) -> None:
        replica = self.one(index)
        replica.health.checked_progress(replica.in_flight, engine, self.now)

    @rule(index=indexes)
    def bytes_come(self, index: int) -> None:
        health = self.one(index).health
        health.progressed_at = self.now
        assert health.unavailable_reason(self.now) not in ("unresponsive", "stalled")

    @rule(index=indexes)
    def this_worker_is_given_the_trial(self, index: int) -> None:
        self.one(index).health.begin_trial(self.now)

    @rule(index=indexes, observer=st.sampled_from("abc"), lasts_s=st.sampled_from((-1.0, 5.0, 100.0, float("inf"))))
    def another_worker_ejects(self, index: int, observer: str, lasts_s: float) -> None:
        heed_ejection(self.one(index), self.pool, observer, self.now + lasts_s, self.now)

    @rule(index=indexes)
    def another_worker_recovers(self, index: int) -> None:
        health = self.one(index).health
        health.hint_recovered(self.now)
        assert not health.out

    @invariant()
    def no_more_than_half_are_out(self) -> None:
        pool = getattr(self, "pool", [])
        assert sum(each.health.out for each in pool) <= len(pool) // 2

    @invariant()
    def someone_can_always_be_chosen(self) -> None:
        if not hasattr(self, "pool"):
            return
        decision = self.policy.decide(REQUEST, self.pool, self.now)
        assert decision.replica is not None
        well = [each for each in self.pool if each.available(self.now)]
        assert decision.replica in (well or self.pool)
        assert (decision.reason in ("all_unhealthy", "all_cooling_down")) == (not well)

    @invariant()
    def the_parts_agree(self) -> None:
        for each in getattr(self, "pool", []):
            health = each.health
            reason, state = health.unavailable_reason(self.now), health.state(self.now)
            assert reason is None or (reason in SOFT and reason == state)
            assert RULES.slow_start_floor <= health.share(self.now) <= 1.0
            assert (state is HealthState.HEALTHY) <= (reason is None and not health.out)
            assert health.ejection.trial_in_flight <= each.in_flight
            assert not health.out or health.ejection.until <= self.now + LONGEST_OUT_S

    def teardown(self) -> None:
        """Whatever has happened: once all work again, all get traffic again, in bounded time."""
        if not hasattr(self, "pool"):
            return
        for replica, reservation in self.held:
            reservation.__exit__()
            assert replica.in_flight >= 0
        end = self.now + LONGEST_OUT_S + 200.0
        while self.now < end:
            for each in self.pool:
                each.health.probed(True, self.now)
                each.health.checked_progress(0, False, self.now)
                if each.health.state(self.now) is HealthState.HALF_OPEN:
                    each.health.begin_trial(self.now)
            for _ in range(5 * len(self.pool)):
                chosen = self.policy.decide(REQUEST, self.pool, self.now).replica
                assert chosen is not None
                with chosen.reserve(REQUEST):
                    observe(chosen, self.pool, Evidence.ANSWERED, self.now)
            self.now += 5.0
        assert [each.health.state(self.now) for each in self.pool] == [HealthState.HEALTHY] * len(self.pool)
        assert {each.health.share(self.now) for each in self.pool} == {1.0}
        assert {each.in_flight for each in self.pool} == {0}


Fleet.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_history = Fleet.TestCase


def test_nobody_in_this_package_can_read_a_clock() -> None:
    """A name that is not imported cannot be called: only these modules are, and none of them has a clock."""
    harmless = {
        "__future__",
        "array",
        "bisect",
        "collections",
        "copy",
        "collections.abc",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "importlib",
        "inspect",
        "itertools",
        "logging",
        "math",
        "operator",
        "contextlib",
        "random",
        "statistics",
        "struct",
        "sys",
        "types",
        "typing",
        "xxhash",
        "zlib",
    }
    for path in Path(routing.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module in harmless or str(node.module).startswith("routing."), path
            elif isinstance(node, ast.Import):
                assert {each.name for each in node.names} <= harmless, path
