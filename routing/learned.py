"""What is learned of one replica: two fits, and the speeds that follow from them and from what is usual in its pool.

`routing.calibration` says what is fitted, and feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from routing.fit import Fit
from routing.load import Load
from routing.types import Replica

if TYPE_CHECKING:
    from routing.router import Flight

BOOTSTRAP = 8
"""Observations before which a first token counts at once."""
KNOWN = 32
"""Observations from which on a replica is judged by its own alone."""
SETTLED = 64
"""Observations from which on every request teaches one of two things, in turn: it costs half."""
WHOLE_WEIGHT = 0.25
CURVE_LIMIT = 0.01
"""Per token of position. An 8B model has 3e-5; the tiny one of the tests on a CPU 1e-3."""
USUAL_CURVE = 3.3e-5
"""Of an 8B model: 32 layers x 4 x 4,096 operations per token of position, over 16e9 per token."""
CURVE_SPREAD = 5 * USUAL_CURVE
RATIOS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Upper bounds of the histogram of predicted over observed time; the last bucket has none."""
ALIKE = 1.2
"""Replicas whose speeds differ by less are taken to be equal. Fits of equal engines differ by a tenth; generations of
hardware by half and more."""
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


class ErrorSum:
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


class Learned:
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
        "skipped",
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
        self.error = ErrorSum()
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
        self.skipped = 0
        """Requests since one was learned from."""
        """Of a prompt, on average."""

    def advance(self, now: float) -> None:
        """Sum up the batch that ran until now. Peers' changes are seen at the next event here, which is soon enough."""
        passed_ms = (now - self._at) * 1000.0
        if passed_ms > 0.0:
            self.running_ms += self._running * passed_ms
            self.tokens_ms += self._tokens * passed_ms
            self._at = self.touched_at = now
        work = self.replica.work
        running, tokens = work.running, work.running_tokens
        self._running = running if running > 0 else 0
        self._tokens = tokens if tokens > 0 else 0

    def learn_ttft(self, flight: Flight, observed_ms: float, uncached: float, weight: float) -> None:
        tokens = max(0, flight.queued_tokens) + uncached
        rest = self._rest_ms(flight, tokens)
        self._learn_ttft(observed_ms, rest, tokens, uncached * (flight.tokens - 0.5 * uncached), uncached, weight)

    def _learn_ttft(
        self, observed_ms: float, rest_ms: float, tokens: float, second: float, uncached: float, weight: float
    ) -> None:
        """`rest_ms`: see there. `tokens` and `second`: the features of the fit."""
        load = self.replica.load
        if load is not None and load.observed_at != self._report_at:
            self._read_report(load)
        # At least a third is left for what this fit is about: the batch's part is an estimate itself.
        most = 0.67 * observed_ms
        fit = self.ttft
        fit.learn(observed_ms - (rest_ms if rest_ms < most else most), tokens, second, weight)
        self.uncached += (uncached - self.uncached) / (fit.count if fit.count < 20 else 20)

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
        tokens, second = max(0, flight.queued_tokens) + uncached, uncached * (flight.tokens - 0.5 * uncached)
        rest = self._rest_ms(flight, tokens)
        ttft = self.ttft.expected(tokens, second) + rest
        ratio = total_ms / (ttft + (output_tokens - 1) * step)
        self._learn_ttft(ttft * ratio, rest, tokens, second, uncached, WHOLE_WEIGHT)
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

    def _rest_ms(self, flight: Flight, tokens: float) -> float:
        """Of a time to first token, what the batch that runs meanwhile adds while so many tokens are computed."""
        step, batch = self.step, 0.0
        if flight.running > 0:
            batch = step.slope * flight.running + step.second * max(0, flight.running_tokens)
        return batch + (self._step_ms() + batch) * tokens / self.replica.speed.chunk

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
