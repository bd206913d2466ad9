"""Learns what a replica is like from what it did: the constants in `routing.speed`, how long answers are, and how well
the time to first token was predicted.

Two fits per replica (`routing.fit`), fed by each request:

    time to first token  =  (rtt + step)  +  prefill * tokens  +  prefill * curve * (uncached * position)
    time between tokens  =  step  +  request * running  +  kv * tokens held

`tokens` are the uncached ones of the request and of those ahead of it. What the running batch adds to a first token is
known from the second fit and taken off before, and so is the prefill of others from the time between tokens. The
engine's own count of its prefill time (SGLang, `/v1/loads`) starts the slope and then bounds it.

A request counts when it has ended, because only then the engine says how much really was cached; the first few count
at their first token, so that a start that is wrong a thousandfold is put right at once. An answer that came whole shows
only the sum of both times: it is divided as was expected, and counts a quarter.

A replica of which little is known is taken to be much like the others of its pool. And one that is not used any more,
because it once looked slow, slowly is so again; otherwise one stall could keep it idle for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from routing.fit import Fit
from routing.load import Load
from routing.types import InferenceRequest, Replica

if TYPE_CHECKING:
    from routing.router import Flight

BOOTSTRAP = 8
"""Observations before which a first token counts at once."""
KNOWN = 32
"""Observations from which on a replica is judged by its own alone."""
SETTLED = 64
"""Observations from which on every request teaches one of two things, in turn: it costs half."""
WHOLE_WEIGHT = 0.25
FAILURE_RATE = 1 / 20
MAX_FAILURE = 0.9
CURVE_LIMIT = 0.01
"""Per token of position. An 8B model has 3e-5; the tiny one of the tests on a CPU 1e-3."""
USUAL_CURVE = 3.3e-5
"""Of an 8B model: 32 layers x 4 x 4,096 operations per token of position, over 16e9 per token."""
CURVE_SPREAD = 5 * USUAL_CURVE
RELAX_AFTER_S = 30.0
RELAX_EVERY_S = 1.0
RELAX_TO = 1.5
"""Times the pool's median, from where a replica nobody uses has to show that it is better."""
OUTPUT_TOKENS = 300.0
"""Of an answer, before any was seen."""
OUTPUT_RATE = 1 / 32
MAX_OUTPUT_TOKENS = 1_000_000.0
MAX_CLASSES = 4096
RATIOS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Upper bounds of the histogram of predicted over observed time; the last bucket has none."""
ALIKE = 1.2
"""Replicas whose speeds differ by less are taken to be equal. Fits of equal engines differ by a tenth; generations of
hardware by half and more."""
PUBLISHED_AT_ONCE = 64
"""Replicas that are brought up to date each second, at 3 us each."""
RELATED = 1.5
"""Those that differ by less are taken to differ in all parts alike."""
_TINY = 1e-6
_HUGE = 1e7


@dataclass(frozen=True, slots=True)
class TtftError:
    """How predicted times to first token compared with observed ones at one replica."""

    count: int
    bias: float
    """(predicted - observed) / observed, moving average over about fifty requests, each within ±10; above 0 when too
    pessimistic."""
    mean_absolute: float
    """The same without the sign."""
    predicted_ms: float
    """Sum over all."""
    observed_ms: float
    ratios: tuple[int, ...]
    """How many had a predicted / observed up to each of `RATIOS`, and above the last; not cumulative."""


class Usual(NamedTuple):
    """Medians over those replicas of the pool that are known."""

    near: float
    """Of a first token's fixed part, what is not the way there."""
    prefill: float
    curve: float
    step: float
    request: float
    kv: float


class _Error:
    __slots__ = ("absolute", "bias", "count", "observed_ms", "predicted_ms", "ratios")

    def __init__(self) -> None:
        self.count = 0
        self.bias = self.absolute = self.predicted_ms = self.observed_ms = 0.0
        self.ratios = [0] * (len(RATIOS) + 1)

    def add(self, predicted_ms: float, observed_ms: float) -> None:
        ratio = predicted_ms / max(observed_ms, _TINY)
        miss = min(10.0, ratio - 1.0)
        self.count += 1
        rate = 1.0 / min(self.count, 50)
        self.bias += (miss - self.bias) * rate
        self.absolute += (abs(miss) - self.absolute) * rate
        self.predicted_ms += predicted_ms
        self.observed_ms += observed_ms
        place = 0
        for bound in RATIOS:
            if ratio <= bound:
                break
            place += 1
        self.ratios[place] += 1


class _Learned:
    """What is known of one replica."""

    __slots__ = (
        "_at",
        "_report_at",
        "_running",
        "_tokens",
        "_way_ms",
        "error",
        "prefill_ms",
        "replica",
        "running_ms",
        "step",
        "tokens_ms",
        "touched_at",
        "ttft",
        "turn",
        "uncached",
    )

    def __init__(self, replica: Replica, now: float) -> None:
        speed = replica.speed
        base = max(_TINY, speed.rtt_ms + speed.step_ms)
        prefill = max(1e-9, speed.prefill_ms)
        self.replica = replica
        self.ttft = Fit(
            base,
            prefill,
            prefill * min(speed.curve, CURVE_LIMIT),
            second_limit=CURVE_LIMIT,
            usual_second=USUAL_CURVE,
            spread=CURVE_SPREAD,
        )
        self.step = Fit(max(_TINY, speed.step_ms), max(1e-9, speed.request_ms), speed.kv_ms)
        self.error = _Error()
        self.prefill_ms = 0.0
        """Time that went into prompts there so far, as this gateway knows."""
        self.running_ms = self.tokens_ms = 0.0
        """Running requests, and tokens that they hold, summed over time."""
        self.touched_at = self._at = now
        self._running = replica.work.running
        self._tokens = replica.work.running_tokens
        self._report_at = -1.0
        self._way_ms = speed.rtt_ms
        self.turn = False
        self.uncached = 0.0
        """Of a prompt, on average."""

    def advance(self, now: float) -> None:
        """Sum up the batch that ran until now. Peers' changes are seen at the next event here, which is soon enough."""
        passed_ms = (now - self._at) * 1000.0
        if passed_ms > 0.0:
            self.running_ms += self._running * passed_ms
            self.tokens_ms += self._tokens * passed_ms
            self._at = self.touched_at = now
        work = self.replica.work
        self._running, self._tokens = max(0, work.running), max(0, work.running_tokens)

    def learn_ttft(self, flight: Flight, observed_ms: float, uncached: float, weight: float) -> None:
        replica = self.replica
        if replica.load is not None and replica.load.observed_at != self._report_at:
            self._read_report(replica.load)
        tokens = max(0, flight.queued_tokens) + uncached
        batch = self._batch(flight)
        # At least a third is left for what this fit is about: the batch's part is an estimate itself.
        rest = batch + (self._step_ms() + batch) * tokens / replica.speed.chunk
        most = 0.67 * observed_ms
        fit = self.ttft
        fit.learn(
            observed_ms - (rest if rest < most else most),
            tokens,
            uncached * (flight.tokens - 0.5 * uncached),
            weight,
        )
        self.uncached += (uncached - self.uncached) / (fit.count if fit.count < 20 else 20)

    def expected_ttft(self, flight: Flight, uncached: float) -> float:
        tokens = max(0, flight.queued_tokens) + uncached
        batch = self._batch(flight)
        own = self.ttft.expected(tokens, uncached * (flight.tokens - 0.5 * uncached))
        return own + batch + (self._step_ms() + batch) * tokens / self.replica.speed.chunk

    def prefill_of(self, flight: Flight, uncached: float) -> float:
        fit = self.ttft
        return uncached * (fit.slope + fit.second * (flight.tokens - 0.5 * uncached))

    def learn_step(self, flight: Flight, now: float, output_tokens: int) -> None:
        first_at, marks = flight.first_token_at, flight.marks
        if first_at is None or marks is None or output_tokens < 2:
            return
        passed_ms = (now - first_at) * 1000.0
        if passed_ms <= 0.0:
            return
        running, tokens = (self.running_ms - marks[0]) / passed_ms, (self.tokens_ms - marks[1]) / passed_ms
        others = min(self.prefill_ms - marks[2], 0.7 * passed_ms)
        self.step.learn((passed_ms - others) / (output_tokens - 1), max(1.0, running), max(0.0, tokens))

    def learn_whole(self, flight: Flight, total_ms: float, uncached: float, output_tokens: float) -> None:
        if output_tokens <= 1:
            self.learn_ttft(flight, total_ms, uncached, 1.0)
            return
        running = max(1, flight.running)
        step = self.step.expected(running, flight.running_tokens)
        ttft = self.expected_ttft(flight, uncached)
        ratio = total_ms / (ttft + (output_tokens - 1) * step)
        self.learn_ttft(flight, ttft * ratio, uncached, WHOLE_WEIGHT)
        self.step.learn(step * ratio, running, flight.running_tokens, WHOLE_WEIGHT)

    def publish(self, usual: Usual | None) -> None:
        """Tell the cost model, when anything has changed by more than a hundredth. While little is known, what is usual
        in the pool counts too: who sends a replica few requests should not judge it by a few odd ones. And what is
        nearly as usual is taken to be so: the policy multiplies small differences, and most are noise."""
        ttft, step, speed = self.ttft, self.step, self.replica.speed
        step_ms, request_ms, kv_ms = self._step_ms(), step.slope, step.second
        base, prefill = ttft.base, ttft.slope
        curve = ttft.second / prefill
        if usual is not None and (ttft.count < KNOWN or step.count < KNOWN):
            own = min(1.0, sqrt(ttft.count / KNOWN))
            near = self.near_ms()
            base += near**own * usual.near ** (1.0 - own) - near
            prefill = prefill**own * usual.prefill ** (1.0 - own)
            own = min(1.0, sqrt(step.count / KNOWN))
            step_ms = step_ms**own * usual.step ** (1.0 - own)
            request_ms = own * request_ms + (1.0 - own) * usual.request
            kv_ms = own * kv_ms + (1.0 - own) * usual.kv
        if usual is not None:
            # The parts of a fit stand for each other; their sum for a usual request is what was really seen.
            near = self.near_ms()
            usual_ms = usual.near + usual.prefill * self.uncached
            scale = _scale((near + prefill * self.uncached) / usual_ms)
            if scale is not None:
                base += usual.near * scale - near
                prefill, curve = usual.prefill * scale, usual.curve
            work = self.replica.work
            usual_ms = usual.step + usual.request * work.running + usual.kv * work.running_tokens
            scale = _scale((step_ms + request_ms * work.running + kv_ms * work.running_tokens) / usual_ms)
            if scale is not None:
                step_ms, request_ms, kv_ms = usual.step * scale, usual.request * scale, usual.kv * scale
        # Where the way was measured, what else there is at the beginning is somebody's wait, mostly, that the fit could
        # not tell from it; of a rented replica it is all that is known.
        rtt = max(speed.network_ms, base - step_ms)
        if speed.network_ms > 0.0 and not self.replica.hosted:
            rtt = speed.network_ms
        if (
            _differs(prefill, speed.prefill_ms)
            or _differs(step_ms, speed.step_ms)
            or _differs(request_ms, speed.request_ms)
            or _differs(kv_ms, speed.kv_ms)
            or _differs(curve, speed.curve)
            or abs(rtt - speed.rtt_ms) > 0.01 * base
        ):
            speed.prefill_ms, speed.curve, speed.step_ms = min(prefill, _HUGE), curve, min(step_ms, _HUGE)
            speed.request_ms, speed.kv_ms = min(request_ms, _HUGE), min(kv_ms, _HUGE)
            speed.rtt_ms = min(rtt, _HUGE)
            speed.version += 1

    def near_ms(self) -> float:
        base = self.ttft.base
        way_ms = max(self._way_ms, self.replica.speed.network_ms)
        return max(0.1 * base, base - way_ms)

    def _step_ms(self) -> float:
        # Until a time between tokens was seen, all that is known is that the first one takes a step too.
        base = self.step.base
        return base if self.step.count or not self.ttft.count or base < self.ttft.base else self.ttft.base

    def _batch(self, flight: Flight) -> float:
        step = self.step
        if flight.running <= 0:
            return 0.0
        return step.slope * flight.running + step.second * max(0, flight.running_tokens)

    def _read_report(self, load: Load) -> None:
        self._report_at = load.observed_at
        if load.prefill_us_per_token is None:
            return
        told = load.prefill_us_per_token / 1000.0
        if not 1e-6 < told < 1e6:
            return
        fit = self.ttft
        # The engine's count includes the fixed part of its steps, one per prompt at worst.
        fixed = fit.base / self.uncached if self.uncached > 1.0 and fit.count else 0.0
        slack = 1.0 if fit.count < BOOTSTRAP // 2 else 2.0
        fit.highest_slope = slack * told
        fit.lowest_slope = max(1e-9, min(told, max(0.5 * told, told - fixed)) / slack)
        if fit.count < BOOTSTRAP // 2:
            fit.slope = fit.lowest_slope


def _scale(share: float) -> float | None:
    """How many times the usual something takes: 1 where that is within the noise, None where it is another kind of
    machine, which has proportions of its own."""
    if 1.0 / ALIKE < share < ALIKE:
        return 1.0
    return share if 1.0 / RELATED < share < RELATED else None


def _differs(new: float, old: float) -> bool:
    return abs(new - old) > 0.01 * old


class Calibration:
    """Of all replicas of a pool."""

    def __init__(self) -> None:
        self.pool: Sequence[Replica] = ()
        """Between whom was decided last. Those that were never used are taken to be like the others: one that nobody
        has tried would never be, were the start values a thousandfold too slow."""
        self._learned: dict[Replica, _Learned] = {}
        self._relax_at = 0.0
        self._turn = 0
        self._usual: Usual | None = None
        self._outputs: dict[str | tuple[str, int], tuple[float, int]] = {}

    def output_tokens(self, request: InferenceRequest) -> float:
        """Expected length of the answer: what the model's answers with about this limit had, never above the limit.
        A kind that was rarely seen is taken to be like all of the model's."""
        limit = request.max_output_tokens
        outputs = self._outputs
        mean, count = outputs.get((request.model, 0 if limit is None else limit.bit_length()), (0.0, 0))
        if count < 16:
            general = outputs.get(request.model)
            mean = (mean * count + 4.0 * (OUTPUT_TOKENS if general is None else general[0])) / (count + 4)
        return mean if limit is None or mean < limit else float(limit)

    def first_token(self, flight: Flight, now: float) -> None:
        if flight.replica.retired:
            return
        learned = self._of(flight.replica, now)
        learned.advance(now)
        uncached = max(0, flight.tokens - flight.cached)
        work = flight.replica.work
        mine = work.own.running
        # Peers' first tokens are not told: they are as many as theirs are of those that run.
        share = work.running / mine if 0 < mine < work.running else 1.0
        learned.prefill_ms += learned.prefill_of(flight, uncached) * share
        flight.marks = (learned.running_ms, learned.tokens_ms, learned.prefill_ms)
        observed_ms = (now - flight.dispatched_at) * 1000.0
        if flight.predicted_ttft_ms is not None:
            learned.error.add(flight.predicted_ttft_ms, observed_ms)
        if learned.ttft.count < BOOTSTRAP:
            flight.counted = True
            learned.learn_ttft(flight, observed_ms, uncached, 1.0)
            learned.publish(self._usual)

    def finished(
        self,
        request: InferenceRequest,
        flight: Flight,
        now: float,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        if flight.replica.retired:
            return
        learned = self._of(flight.replica, now)
        learned.advance(now)
        uncached = float(flight.tokens - flight.cached)
        if cached_tokens is not None and prompt_tokens:
            # In this request's own measure, which is an estimate where no tokeniser counted it.
            share = cached_tokens / prompt_tokens
            uncached = flight.tokens * (1.0 - (1.0 if share > 1.0 else share if share > 0.0 else 0.0))
        uncached = uncached if uncached > 0.0 else 0.0
        learned.turn = turn = not learned.turn
        early = learned.step.count < SETTLED
        first_at = flight.first_token_at
        if first_at is not None and flight.marks is None:
            pass  # nobody told us of its first token
        elif first_at is None or _came_whole(flight, first_at, now, output_tokens):
            total_ms = (now - flight.dispatched_at) * 1000.0
            length = flight.output_tokens if output_tokens is None else output_tokens
            learned.learn_whole(flight, total_ms, uncached, length)
        elif (turn or early) and not flight.counted:
            learned.learn_ttft(flight, (first_at - flight.dispatched_at) * 1000.0, uncached, 1.0)
        if output_tokens is not None and (not turn or early):
            learned.learn_step(flight, now, output_tokens)
            self._learn_output(request, output_tokens)
        speed = flight.replica.speed
        if speed.failure:
            speed.failure *= 1.0 - FAILURE_RATE
        if turn or early:
            learned.publish(self._usual)
        if now >= self._relax_at:
            self._relax(now)

    def failed(self, flight: Flight, now: float) -> None:
        if flight.replica.retired:
            return
        self._of(flight.replica, now).advance(now)
        speed = flight.replica.speed
        speed.failure = min(MAX_FAILURE, speed.failure + (1.0 - speed.failure) * FAILURE_RATE)
        speed.version += 1

    def error(self, replica: Replica) -> TtftError | None:
        """None before the first prediction was compared."""
        learned = self._learned.get(replica)
        if learned is None or not learned.error.count:
            return None
        error = learned.error
        return TtftError(
            error.count, error.bias, error.absolute, error.predicted_ms, error.observed_ms, tuple(error.ratios)
        )

    def forget(self, replica: Replica) -> None:
        """It is no longer in the pool."""
        self._learned.pop(replica, None)

    @property
    def known(self) -> int:
        """Replicas of which something is remembered."""
        return len(self._learned)

    def _of(self, replica: Replica, now: float) -> _Learned:
        learned = self._learned.get(replica)
        if learned is None:
            if replica.speed.version == 0:
                self._start_like_others((replica,))
            learned = self._learned[replica] = _Learned(replica, now)
        return learned

    def _start_like_others(self, replicas: Sequence[Replica]) -> None:
        known = [each.replica.speed for each in self._learned.values() if each.ttft.count >= BOOTSTRAP]
        if known and replicas:
            for name in ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms"):
                usual = median(getattr(each, name) for each in known)
                for replica in replicas:
                    setattr(replica.speed, name, usual)

    def _learn_output(self, request: InferenceRequest, output_tokens: int) -> None:
        observed = min(max(0.0, float(output_tokens)), MAX_OUTPUT_TOKENS)
        limit = request.max_output_tokens
        outputs = self._outputs
        for key in (request.model, (request.model, 0 if limit is None else limit.bit_length())):
            mean, count = outputs.get(key, (0.0, 0))
            if not count and len(outputs) >= MAX_CLASSES:
                return
            count += 1
            outputs[key] = (mean + (observed - mean) * max(OUTPUT_RATE, 1.0 / count), count)

    def _relax(self, now: float) -> None:
        """See the module."""
        self._relax_at = now + RELAX_EVERY_S
        learned = self._learned
        self._start_like_others([each for each in self.pool if not each.speed.version and each not in learned])
        known = [each for each in self._learned.values() if min(each.ttft.count, each.step.count) >= KNOWN // 2]
        if known:
            self._usual = Usual(
                median(each.near_ms() for each in known),
                median(each.ttft.slope for each in known),
                median(each.ttft.second / each.ttft.slope for each in known),
                median(each.step.base for each in known),
                median(each.step.slope for each in known),
                median(each.step.second for each in known),
            )
            # What is usual has changed for those as well that are not used just now.
            some = list(self._learned.values())
            self._turn = (self._turn + PUBLISHED_AT_ONCE) % len(some)
            for one in islice(chain(some[self._turn :], some), min(PUBLISHED_AT_ONCE, len(some))):
                one.publish(self._usual)
        idle = [each for each in self._learned.values() if now - each.touched_at > RELAX_AFTER_S]
        used = [each for each in self._learned.values() if each.ttft.count and now - each.touched_at <= RELAX_AFTER_S]
        if not idle or not used:
            return
        near = RELAX_TO * median(each.near_ms() for each in used)
        slope = RELAX_TO * median(each.ttft.slope for each in used)
        step = RELAX_TO * median(each.step.base for each in used)
        for each in idle:
            each.replica.speed.failure *= 0.97
            slow = max(each.near_ms() / near, each.ttft.slope / slope)
            if slow > 1.0:
                each.ttft.scale(max(0.9, 1.0 / slow))
                each.ttft.forget(1.25)
            if each.step.base > step:
                each.step.scale(max(0.9, step / each.step.base))
                each.step.forget(1.25)
            each.publish(self._usual)


def _came_whole(flight: Flight, first_at: float, now: float, output_tokens: int | None) -> bool:
    """What was called its first token was the answer: nothing to speak of passed between it and the end."""
    if output_tokens is None or output_tokens < 16:
        return False
    return (now - first_at) < 0.02 * (first_at - flight.dispatched_at) and (now - first_at) < 1e-4 * output_tokens
