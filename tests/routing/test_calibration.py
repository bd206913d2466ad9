"""What is learned of a replica, from a synthetic engine that follows the model of `routing.speed`, but for noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.calibration import Calibration
from routing.learned import RATIOS, Learned, Usual
from routing.load import Load
from routing.router import Flight, PoolState, Router
from routing.speed import Speed
from routing.types import Decision, InferenceRequest, Replica
from routing.work import Totals

GPU = Speed(prefill_ms=0.03, curve=3e-5, step_ms=7.0, request_ms=0.2, kv_ms=1e-4, rtt_ms=4.0)
CPU = Speed(prefill_ms=5.0, curve=1e-4, step_ms=120.0, request_ms=30.0, kv_ms=0.01, rtt_ms=5.0)
FAST = Speed(prefill_ms=0.005, curve=3e-5, step_ms=2.5, request_ms=0.02, kv_ms=1e-5, rtt_ms=1.0)
ENGINES = pytest.mark.parametrize("true", [GPU, CPU, FAST], ids=["gpu", "cpu", "fast"])


def new_replica(name: str = "a", speed: Speed | None = None) -> Replica:
    return Replica(name, "pool", f"http://{name}:1", "sglang", speed=speed or Speed())


def new_request(number: int = 0, limit: int | None = None, model: str = "m", tokens: int = 1000) -> InferenceRequest:
    return InferenceRequest(str(number), model, True, 4 * tokens, max_output_tokens=limit, prompt_tokens=tokens)


def ttft_ms(speed: Speed, flight: Flight, uncached: int) -> float:
    """What the default policy predicts."""
    ahead = flight.queued_tokens
    step = speed.step_ms + speed.request_ms * flight.running + speed.kv_ms * flight.running_tokens
    own = uncached * (1.0 + speed.curve * (flight.tokens - 0.5 * uncached))
    return speed.rtt_ms + speed.prefill_ms * (ahead + own) + step * (1.0 + (ahead + uncached) / speed.chunk)


@dataclass
class Engine:
    """One replica that is as `true` says. Times are those of the formula, times log-normal noise."""

    true: Speed
    replica: Replica
    calibration: Calibration = field(default_factory=Calibration)
    rng: Random = field(default_factory=lambda: Random(5))
    noise: float = 0.15
    now: float = 100.0

    def serve(
        self, *, queued: bool = True, stall_s: float = 0.0, whole: bool = False, reported: bool = False
    ) -> tuple[float, float]:
        """One request; what was predicted with the constants learned so far, and what was observed, in ms."""
        rng, replica, true = self.rng, self.replica, self.true
        tokens = int(math.exp(rng.uniform(math.log(50), math.log(8000))))
        cached = int(tokens * rng.random() * rng.choice([0, 1]))
        really = int(cached * rng.random()) if reported else cached
        running = rng.randrange(9)
        ahead = rng.choice([0, 0, 500, 3000]) if queued else 0
        output = rng.randrange(20, 300)
        flight = Flight(replica, tokens, cached, 300.0, self.now, (), ahead, running, running * 1500, None)
        predicted = ttft_ms(replica.speed, flight, tokens - really)
        observed = ttft_ms(true, flight, tokens - really) * rng.lognormvariate(0.0, self.noise) + 1000.0 * stall_s
        work = replica.work
        work.running, work.running_tokens = running + 1, running * 1500 + tokens
        step = true.step_ms + true.request_ms * work.running + true.kv_ms * work.running_tokens
        decode = (output - 1) * step * rng.lognormvariate(0.0, self.noise)
        self.now += observed / 1000.0
        if not whole:
            flight.first_token_at = self.now
            self.calibration.first_token(flight, self.now)
        self.now += decode / 1000.0
        work.running = work.running_tokens = 0
        self.calibration.finished(new_request(), flight, self.now, tokens, really, output)
        return predicted, observed - 1000.0 * stall_s

    def miss(self, requests: int = 60, **how: bool) -> float:
        """Median of the relative errors of the times to first token to come, noise included."""
        pairs = [self.serve(**how) for _ in range(requests)]
        misses = sorted(abs(predicted / observed - 1.0) for predicted, observed in pairs)
        return misses[len(misses) // 2]


def prefill_of(speed: Speed, tokens: int = 2000) -> float:
    """What computing such a prompt takes, ms. Slope and curve alone are told apart by very long prompts only."""
    return tokens * speed.prefill_ms * (1.0 + speed.curve * 0.5 * tokens)


def within(actual: float, expected: float, share: float) -> bool:
    return abs(actual - expected) <= share * expected


@ENGINES
def test_constants_are_found_whatever_they_were_taken_for(true: Speed) -> None:
    for seed in range(5):
        engine = Engine(true, new_replica(), rng=Random(seed))
        for _ in range(200):
            engine.serve()
        speed = engine.replica.speed
        assert within(prefill_of(speed), prefill_of(true), 0.15), (seed, speed)
        short, truth = (each.step_ms + each.rtt_ms + prefill_of(each, 100) for each in (speed, true))
        assert within(short, truth, 0.2), (seed, speed)
        full = speed.step_ms + 8 * speed.request_ms + 12_000 * speed.kv_ms
        assert within(full, true.step_ms + 8 * true.request_ms + 12_000 * true.kv_ms, 0.15), (seed, speed)


@ENGINES
def test_five_requests_bring_the_order_of_magnitude(true: Speed) -> None:
    for seed in range(20):
        engine = Engine(true, new_replica(), rng=Random(seed))
        for _ in range(5):
            engine.serve()
        assert engine.miss(30) < 1.0, seed


@pytest.mark.parametrize("factor", [0.01, 0.1, 10.0, 100.0])
@pytest.mark.parametrize("wrong", ["prefill_ms", "step_ms", "request_ms", "rtt_ms", "all"])
def test_a_wrong_start_is_overcome(factor: float, wrong: str) -> None:
    start = Speed(**{name: getattr(GPU, name) for name in ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms")})
    start.rtt_ms = GPU.rtt_ms
    for name in ("prefill_ms", "step_ms", "request_ms", "kv_ms", "rtt_ms") if wrong == "all" else (wrong,):
        setattr(start, name, getattr(start, name) * factor)
    engine = Engine(GPU, new_replica(speed=start))
    for _ in range(200):
        engine.serve()
    assert within(prefill_of(engine.replica.speed), prefill_of(GPU), 0.15)
    assert engine.miss(100) < 0.16


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_drift_is_followed_within_sixty_requests(factor: float) -> None:
    engine = Engine(GPU, new_replica())
    for _ in range(300):
        engine.serve()
    changed = {name: getattr(GPU, name) * factor for name in ("prefill_ms", "step_ms", "request_ms", "kv_ms", "rtt_ms")}
    engine.true = Speed(curve=GPU.curve, **changed)
    for _ in range(60):
        engine.serve()
    assert within(prefill_of(engine.replica.speed), factor * prefill_of(GPU), 0.25)
    assert engine.miss(40) < 0.2


def test_a_stall_moves_the_constants_by_a_few_percent() -> None:
    engine = Engine(GPU, new_replica())
    for _ in range(200):
        engine.serve()
    before = prefill_of(engine.replica.speed)
    engine.serve(stall_s=30.0)
    engine.serve()
    assert within(prefill_of(engine.replica.speed), before, 0.15)
    assert engine.miss(20) < 0.25


def test_a_stall_at_the_very_start_is_soon_forgotten() -> None:
    engine = Engine(GPU, new_replica())
    engine.serve(stall_s=30.0)
    for _ in range(10):
        engine.serve()
    assert engine.miss(30) < 0.7


def test_the_engines_own_count_of_cached_tokens_is_believed() -> None:
    engine = Engine(GPU, new_replica())
    for _ in range(300):
        engine.serve(reported=True)
    assert within(prefill_of(engine.replica.speed), prefill_of(GPU), 0.15)


@ENGINES
def test_whole_answers_teach_too(true: Speed) -> None:
    engine = Engine(true, new_replica())
    for _ in range(400):
        engine.serve(whole=True)
    assert engine.miss(100, whole=True) < 0.6
    speed = engine.replica.speed
    full, truth = (each.step_ms + 8 * each.request_ms + 12_000 * each.kv_ms for each in (speed, true))
    assert within(full, truth, 0.3)


def _show(calibration: Calibration, replica: Replica, tokens: int, seconds: float, now: float) -> None:
    """One prompt of so many tokens at an idle replica takes so long."""
    flight = Flight(replica, tokens, 0, 300.0, now, (), 0, 0, 0, None)
    flight.first_token_at = now + seconds
    calibration.first_token(flight, now + seconds)
    calibration.finished(new_request(), flight, now + seconds + 1.0, tokens, 0, 1)


def test_the_engines_own_counter_starts_the_prefill() -> None:
    replica, calibration = new_replica(), Calibration()
    replica.load = Load(1.0, prefill_us_per_token=5000.0)
    _show(calibration, replica, 40, 0.4, 2.0)
    assert within(replica.speed.prefill_ms, 5.0, 0.5)  # 1.4 in the proportions of the start


def test_the_engines_own_counter_bounds_the_prefill() -> None:
    replica, calibration = new_replica(), Calibration()
    for number in range(100):
        replica.load = Load(10.0 * number, prefill_us_per_token=5000.0)
        _show(calibration, replica, 1000 + 20 * number, (1000 + 20 * number) * 0.05, 10.0 * number)  # tenfold: a crowd
    assert replica.speed.prefill_ms <= 10.0


def test_the_prefill_of_others_is_not_taken_for_slow_decoding() -> None:
    replica, calibration = new_replica(), Calibration()
    now = 0.0
    for number in range(100):
        mine = Flight(replica, 100, 0, 300.0, now, (), 0, 0, 0, None)
        now += 0.020
        replica.work.running = 1
        mine.first_token_at = now
        calibration.first_token(mine, now)
        for _ in range(3):  # while it decodes for 1 s, three others have 8,000 tokens computed in 0.32 s each
            other = Flight(replica, 8000, 0, 300.0, now, (), 0, 1, 100, None)
            now += 0.010 + 0.04 * 8
            other.first_token_at = now
            calibration.first_token(other, now)
            calibration.finished(new_request(), other, now, 8000, 0, 1)
        now += 1.0
        calibration.finished(new_request(number), mine, now, 100, 0, 101)
    assert replica.speed.step_ms + replica.speed.request_ms < 13.0  # 19.9 by the clock alone


def test_the_prefill_of_peers_requests_is_not_taken_for_slow_decoding_either() -> None:
    replica, calibration = new_replica(), Calibration()
    now = 0.0
    for number in range(100):
        mine = Flight(replica, 100, 0, 300.0, now, (), 0, 0, 0, None)
        now += 0.020
        replica.work.peer("other gateway", None, now)
        replica.work.queue(100, now)
        replica.work.begin(100, 100, now)
        mine.first_token_at = now
        calibration.first_token(mine, now)
        # While it decodes for 1 s the replica takes in 24,000 tokens in 0.96 s, of which we send a third.
        other = Flight(replica, 8000, 0, 300.0, now, (), 0, 1, 100, None)
        now += 0.010 + 0.04 * 8
        replica.work.queue(8000, now)
        replica.work.begin(8000, 8000, now)
        replica.work.peer("other gateway", Totals(0, 0, 4, 16_000), now)
        other.first_token_at = now
        calibration.first_token(other, now)
        replica.work.end(8000)
        calibration.finished(new_request(), other, now, 8000, 0, 1)
        now += 1.0 + 0.64
        replica.work.end(100)
        calibration.finished(new_request(number), mine, now, 100, 0, 101)
    assert replica.speed.step_ms + 4 * replica.speed.request_ms < 13.0  # 19.7 by the clock alone


def test_short_prompts_leave_the_curve_about_what_is_usual() -> None:
    for seed in range(10):
        rng, replica, calibration = Random(seed), new_replica(), Calibration()
        for number in range(300):
            tokens = rng.randrange(50, 600)
            _show(calibration, replica, tokens, (0.012 + 4e-5 * tokens) * rng.lognormvariate(0, 0.2), 10.0 * number)
        assert replica.speed.curve < 5e-4, seed


def test_a_first_token_that_was_not_told_teaches_nothing() -> None:
    replica, calibration = new_replica(), Calibration()
    flight = Flight(replica, 100, 0, 300.0, 0.0, (), 0, 0, 0, None, first_token_at=5.0)
    calibration.finished(new_request(), flight, 9.0, 100, 0, 50)
    assert replica.speed == Speed()


def test_failures_raise_the_chance_and_successes_lower_it() -> None:
    engine = Engine(GPU, new_replica())
    speed = engine.replica.speed
    for _ in range(5):
        engine.calibration.failed(Flight(engine.replica, 10, 0, 1.0, 100.0, (), 0, 0, 0, None), 101.0)
    assert 0.15 < speed.failure < 0.3
    version = speed.version
    for _ in range(60):
        engine.serve()
    assert speed.failure < 0.02
    assert speed.version > version


def test_the_version_stays_while_nothing_changes() -> None:
    engine = Engine(GPU, new_replica(), noise=0.0)
    for _ in range(2000):
        engine.serve(queued=False)
    version = engine.replica.speed.version
    for _ in range(50):
        engine.serve(queued=False)
    assert engine.replica.speed.version == version


def test_a_replica_nobody_uses_since_a_stall_becomes_like_the_others() -> None:
    calibration = Calibration()
    good = Engine(GPU, new_replica("good"), calibration)
    stalled = Engine(GPU, new_replica("stalled"), calibration)
    stalled.serve(stall_s=30.0)
    good.now = stalled.now
    seen = stalled.replica.speed.prefill_ms, stalled.replica.speed.rtt_ms
    assert max(seen[0] / GPU.prefill_ms, seen[1] / GPU.rtt_ms) > 10
    end = good.now + 300.0
    while good.now < end:
        good.serve()
    speed = stalled.replica.speed
    assert speed.prefill_ms < 2 * GPU.prefill_ms
    assert speed.rtt_ms + speed.step_ms < 2.5 * (GPU.rtt_ms + GPU.step_ms)


def test_a_first_request_that_stalls_does_not_count_for_much_where_others_are_known() -> None:
    calibration = Calibration()
    good = Engine(GPU, new_replica("good"), calibration)
    for _ in range(40):
        good.serve()
    stalled = Engine(GPU, new_replica("stalled"), calibration, now=good.now)
    stalled.serve(stall_s=30.0)
    assert prefill_of(stalled.replica.speed) < 6 * prefill_of(GPU)
    assert stalled.replica.speed.step_ms < 3 * GPU.step_ms


def test_a_new_replica_is_taken_to_be_like_those_known() -> None:
    calibration = Calibration()
    old = Engine(CPU, new_replica("old"), calibration)
    for _ in range(100):
        old.serve()
    new = new_replica("new")
    _show(calibration, new, 40, 0.4, old.now)
    assert within(new.speed.prefill_ms, CPU.prefill_ms, 0.4)


def test_a_distant_replica_is_not_taken_to_be_as_near_as_the_others() -> None:
    calibration = Calibration()
    near = Engine(GPU, new_replica("near"), calibration)
    for _ in range(40):
        near.serve()
    away = Speed(**{name: getattr(GPU, name) for name in ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms")})
    away.rtt_ms = 80.0
    far = Engine(away, new_replica("far", Speed(rtt_ms=80.0)), calibration, now=near.now)
    far.serve()
    near.now = far.now
    for _ in range(100):
        near.serve()  # long enough for the far one to count as not used
    assert near.now > far.now + 60
    assert within(far.replica.speed.rtt_ms + far.replica.speed.step_ms, 87.0, 0.5)


def test_a_forgotten_replica_begins_anew() -> None:
    state = PoolState()
    router = Router(_First(), state)
    replica = new_replica()
    _pass(router, replica, new_request(1), 0.0)
    assert state.calibration.error(replica) is not None
    state.forget(replica)
    assert state.calibration.error(replica) is None


class _First:
    name = "first"
    wants_prefix = False

    def __call__(self, request: InferenceRequest, candidates: object, view: object) -> Replica:
        raise AssertionError("there is one replica only")


def _pass(router: Router, replica: Replica, request: InferenceRequest, now: float) -> None:
    router.dispatched(request, replica, now, Decision(replica, "", predicted_ttft_ms=50.0))
    router.first_token(request, replica, now + 0.1)
    router.finished(request, replica, now + 1.0, prompt_tokens=1000, cached_tokens=0, output_tokens=90)


def test_predictions_are_compared_with_what_came() -> None:
    router, replica = Router(_First()), new_replica()
    assert router.state.calibration.error(replica) is None
    for number in range(10):
        _pass(router, replica, new_request(number), 10.0 * number)
    error = router.state.calibration.error(replica)
    assert error is not None
    assert error.count == 10
    assert error.bias == pytest.approx(-0.5)
    assert error.mean_absolute == pytest.approx(0.5)
    assert error.predicted_ms == pytest.approx(500.0)
    assert error.observed_ms == pytest.approx(1000.0)
    assert len(error.ratios) == len(RATIOS) + 1
    assert sum(error.ratios) == 10


def _answered(calibration: Calibration, request: InferenceRequest, output: int, times: int = 40) -> None:
    replica = new_replica()
    for number in range(times):
        calibration.finished(request, Flight(replica, 9, 0, 1.0, number, (), 0, 0, 0, None), number + 0.5, 9, 0, output)


def test_the_length_of_answers_is_learned_by_model_and_limit() -> None:
    calibration = Calibration()
    assert calibration.output_tokens(new_request()) == 300.0
    assert calibration.output_tokens(new_request(limit=16)) == 16.0
    _answered(calibration, new_request(limit=16), 5)
    _answered(calibration, new_request(limit=4096), 900)
    _answered(calibration, new_request(model="short"), 20)
    assert calibration.output_tokens(new_request(limit=16)) == pytest.approx(5, rel=0.1)
    assert calibration.output_tokens(new_request(limit=4096)) == pytest.approx(900, rel=0.1)
    assert calibration.output_tokens(new_request(limit=4096, model="short")) == pytest.approx(20, rel=0.1)
    assert calibration.output_tokens(new_request(limit=3, model="short")) == 3.0


_number = st.one_of(st.none(), st.integers(-5, 10**9))
_seconds = st.one_of(st.just(0.0), st.floats(-10.0, 1e6), st.floats(0.0, 1e-3), st.sampled_from([1e-9, 30.0]))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["first", "finish", "both", "fail", "report"]),
            st.integers(0, 1),
            st.tuples(*[st.integers(-3, 10**7)] * 5),
            st.tuples(_seconds, _seconds),
            st.tuples(_number, _number, _number),
        ),
        max_size=60,
    ),
    st.floats(1e-6, 1e6),
)
def test_no_sequence_of_events_leaves_a_senseless_speed(
    events: list[tuple[str, int, tuple[int, ...], tuple[float, float], tuple[int | None, int | None, int | None]]],
    start: float,
) -> None:
    calibration = Calibration()
    replicas = [new_replica("a", Speed(prefill_ms=start, step_ms=start)), new_replica("b")]
    now = 0.0
    for kind, which, (tokens, cached, queued, running, held), (first, second), (prompt, hit, output) in events:
        replica = replicas[which]
        flight = Flight(replica, tokens, cached, 300.0, now, (), queued, running, held, 50.0)
        if kind == "report":
            replica.load = Load(now, prefill_us_per_token=float(held))
            continue
        replica.work.running, replica.work.running_tokens = running, held
        now += first
        if kind == "fail":
            calibration.failed(flight, now)
            continue
        if kind in ("first", "both"):
            flight.first_token_at = now
            calibration.first_token(flight, now)
        now += second
        if kind in ("finish", "both"):
            calibration.finished(new_request(limit=output), flight, now, prompt, hit, output)
        for each in replicas:
            speed = each.speed
            assert 0.0 < speed.prefill_ms <= 1e7
            assert 0.0 < speed.step_ms <= 1e7
            assert 0.0 <= speed.curve <= 0.011
            assert 0.0 <= speed.request_ms <= 1e7
            assert 0.0 <= speed.kv_ms <= 1e7
            assert 0.0 <= speed.rtt_ms <= 1e7
            assert 0.0 <= speed.failure < 1.0
            assert 0.0 <= calibration.output_tokens(new_request()) <= 1e6


def test_replicas_that_are_nearly_as_fast_as_each_other_are_taken_to_be_equal_and_others_are_not() -> None:
    usual = Usual(near=20.0, prefill=0.05, curve=1e-5, step=10.0, request=0.1, kv=1e-5)
    speeds = []
    for factor in (1.1, 1.3, 2.0):
        learned = Learned(Replica("r", "pool", "http://r", "sglang"), 0.0)
        learned.uncached = 1000.0
        learned.ttft.base, learned.ttft.slope, learned.ttft.count = 20.0 * factor, 0.05 * factor, 1000
        learned.step.base, learned.step.slope, learned.step.count = 10.0 * factor, 0.1 * factor, 1000
        learned.publish(usual)
        speeds.append((learned.replica.speed.prefill_ms, learned.replica.speed.step_ms))
    assert speeds[0] == (0.05, 10.0)
    assert speeds[1] == pytest.approx((0.065, 13.0), rel=0.01)
    assert speeds[2] == pytest.approx((0.1, 20.0), rel=0.01)


def test_equal_candidates_are_not_told_apart_by_the_noise_of_their_fits() -> None:
    """The parts of a fit stand for each other: less per token and more at the beginning is the same thing."""
    usual = Usual(near=20.0, prefill=0.05, curve=1e-5, step=10.0, request=0.1, kv=1e-5)
    learned = Learned(Replica("r", "pool", "http://r", "sglang"), 0.0)
    learned.uncached = 400.0
    learned.ttft.base, learned.ttft.slope, learned.ttft.count = 32.0, 0.02, 1000
    learned.step.base, learned.step.slope, learned.step.count = 10.0, 0.1, 1000
    learned.publish(usual)
    assert learned.replica.speed.prefill_ms == 0.05
