"""What one replica carries and serves: learned from what is seen.

*Time in service* by Little's law, L = lambda W (https://doi.org/10.1287/opre.9.3.383): 42 requests under way while 3
arrive a second are there for 14 s each. While replicas are full, requests come faster than they go; then it is what
they hold over what they serve. The law is about averages, so in the seconds after a step nothing is learned. The unit
is the token where tokens are known, so that a change to longer requests is seen when they come and not when they end.

Engines batch, so each request takes longer the more there are beside it, by a line to a good approximation:

    W(b) = w0 + w1 b        12 s alone, 35 s among 72, 58 s among 144

Who takes the W of half-empty replicas for that of fewer ones, removes too many, finds them full, adds them again, and
so on for ever. So the line is fitted, over hours, and what a replica serves is taken where it is full: 144 / 58 s = 2.5
requests a second. Until replicas were seen at different loads, W is taken to be twice as long in a full one as in an
empty one.

*Capacity* is what the engine says that it can run at once, unless it is seen to be less. Engines often say far more
than their KV cache holds: where 40 requests take half of it, it holds 80. Or more than the target of the first token
allows: when first tokens come late at full replicas, capacity moves towards what they had then, without those whose
wait was above the target:

    60 requests in a replica that serves 4 a second, first tokens after 5 s, target 2 s: 60 - 4 * (5 - 2) = 48

and when first tokens are on time with more than that in a replica, capacity is what it had. That first tokens are late
at replicas that are half empty is no sign of load: prompts may be long, or a network slow, and more replicas would not
help.
"""

from __future__ import annotations

from math import exp, log, sqrt

from routing.scaling.forecast import Smooth
from routing.scaling.learned import LearnedCapacity, LearnedLine, age_at
from routing.scaling.types import Demand

OVER_S = 90.0
FULL = 0.95
"""Part of the capacity from which on replicas are full."""
DOUBT = 0.07
"""Part of the capacity by which loads have to differ until the line is rather what was seen than what is usual."""
STEEPEST = 0.8
"""The part of W at the mean that is taken to depend on the load, at most."""
KV_LEAST = 0.03
"""Part of the KV cache in use from which on it tells how much of it a request takes."""
SLOWEST = 1e-6
"""Units a second below which nothing can be learned from them."""
STEADY_FOR_S = 60.0
"""While a spike ends, the last seconds are for a moment like the last minutes: that is not steady."""
NO_CHANCE = 6.0
"""Standard deviations of a count (of a Poisson process: its root) beyond which another number comes than before."""
FULL_FOR_S = 30.0
"""Until what is served by full replicas is what they can serve: requests that filled them have to end first."""
BUSY = 0.5
"""Part of the capacity above which late first tokens are a sign of load."""
SETTLED_S = 60.0
"""Until a new replica has its share of the load."""
LEAST = 0.25
"""Part of what the engine says below which capacity is not believed to be."""
STEP = 0.2
"""How far one late period moves it."""
FORGET_S = 6 * 3600.0
"""Time for capacity to double where it is never tried: what made it low, such as a cold cache, may have passed."""
UNTRIED = 2.0
"""What it becomes in that way at most, times what was tried: a weekend without load says nothing of Monday."""
UNTOLD_S = 900.0
"""For so long requests are taken to be as long as before when nobody tells: a gateway that was started again knows
only after the first answers. And for so long an engine is taken to carry what it said when it says nothing any more."""


class Line:
    """A line through (requests in a replica, seconds each), older points forgotten over hours."""

    __slots__ = ("_at", "_b", "_bb", "_bw", "_w", "_weight")

    def __init__(self) -> None:
        self._at: float | None = None
        self._weight = self._b = self._w = self._bb = self._bw = 0.0

    def observe(self, requests: float, seconds: float, now: float) -> None:
        span = 1.0 if self._at is None else min(max(now - self._at, 0.0), 60.0)
        keep = 1.0 if self._at is None else exp(-max(now - self._at, 0.0) / FORGET_S)
        self._at = now
        self._weight = keep * self._weight + span
        self._b = keep * self._b + span * requests
        self._w = keep * self._w + span * seconds
        self._bb = keep * self._bb + span * requests * requests
        self._bw = keep * self._bw + span * requests * seconds

    def weight_s(self, now: float) -> float:
        """Seconds of what was seen, as far as they are not forgotten."""
        return 0.0 if self._at is None else self._weight * exp(-max(now - self._at, 0.0) / FORGET_S)

    def learned(self, now: float) -> LearnedLine | None:
        """What it knows; None: nothing."""
        if self._at is None or not self._weight:
            return None
        age_s = age_at(now, self._at)
        return LearnedLine(weight=self._weight, b=self._b, w=self._w, bb=self._bb, bw=self._bw, age_s=age_s)

    def restore(self, learned: LearnedLine, then: float) -> None:
        """Go on from there. Its age is forgotten as any other: after a day, six minutes weigh as much."""
        self._weight, self._b, self._w = learned.weight, learned.b, learned.w
        self._bb, self._bw, self._at = learned.bb, learned.bw, then - learned.age_s

    def at(self, requests: float) -> float | None:
        """Seconds among so many. None: nothing was seen. `requests` is what a replica is full with."""
        if not self._weight:
            return None
        b, w = self._b / self._weight, self._w / self._weight
        usual = w / (requests + b)
        """The slope where W doubles from an empty to a full replica."""
        doubt = (DOUBT * requests) ** 2
        # Rounding can make the variance of loads that were all the same less than nothing.
        slope = (self._bw / self._weight - b * w + doubt * usual) / (max(self._bb / self._weight - b * b, 0.0) + doubt)
        slope = min(max(slope, 0.0), STEEPEST * w / b if b else usual)
        return w + slope * (requests - b)


class Capacity:
    """Of one pool. `seen` is told every period; the rest may be asked at any time."""

    __slots__ = (
        "_arrivals",
        "_at",
        "_by_tokens",
        "_full_since",
        "_held",
        "_kv",
        "_kv_held",
        "_learned",
        "_line",
        "_rate",
        "_steady_since",
        "_tokens",
        "_tokens_at",
        "_told",
        "_told_at",
        "_tried",
        "late_by_load",
    )  # fmt: skip

    def __init__(self) -> None:
        self._arrivals, self._tokens = Smooth(OVER_S), Smooth(OVER_S)
        self._held, self._rate = Smooth(OVER_S), Smooth(OVER_S)
        self._by_tokens = False
        self._tokens_at: float | None = None
        self._line = Line()
        self._kv, self._kv_held = Smooth(OVER_S), Smooth(OVER_S)
        self._told: float | None = None
        self._told_at = 0.0
        self._learned: float | None = None
        self._tried = 0.0
        self._at: float | None = None
        self._full_since: float | None = None
        self._steady_since: float | None = None
        self.late_by_load = False
        """Whether first tokens were late because of load, when it was told last."""

    def seen(self, demand: Demand, target_ms: float, ready_for_s: float, steady: bool) -> None:
        """What the last period was like. `ready_for_s`: for how long the number of replicas has been the same;
        `steady`: arrivals are."""
        now, ready = demand.at_s, demand.replicas_ready
        steady = steady and not self._jumped(demand)
        if not self._untold(demand):
            self._arrivals.observe(demand.arrivals_per_s, now)
            self._tokens.observe(demand.arrival_tokens_per_s, now)
        by_tokens = bool(self._tokens.value)
        if by_tokens != self._by_tokens:  # what was learned is in another unit
            self._by_tokens, self._line = by_tokens, Line()
            self._held, self._rate = Smooth(OVER_S), Smooth(OVER_S)
        if demand.capacity_requests:
            self._told, self._told_at = demand.capacity_requests, now
        elif ready and now - self._told_at >= UNTOLD_S:
            self._told = None
        if ready:
            self._learn(demand, target_ms, ready_for_s, now - self._at if self._at is not None else 0.0)
            self._serve(demand, steady, ready_for_s >= SETTLED_S)
            if demand.kv_use is not None and demand.kv_use >= KV_LEAST:
                self._kv.observe(demand.kv_use * ready, now)
                self._kv_held.observe(demand.in_flight, now)
        self._at = now

    def learned(self, now: float) -> LearnedCapacity:
        """What it knows, as of `now`."""

        def age_s(at: float | None) -> float | None:
            return None if at is None else age_at(now, at)

        return LearnedCapacity(
            by_tokens=self._by_tokens,
            line=self._line.learned(now),
            told=self._told,
            told_age_s=None if self._told is None else age_at(now, self._told_at),
            lowered=self._learned,
            tried=None if self._learned is None else self._tried,
            arrivals=self._arrivals.learned(now),
            tokens=self._tokens.learned(now),
            tokens_age_s=age_s(self._tokens_at),
            held=self._held.learned(now),
            rate=self._rate.learned(now),
            kv=self._kv.learned(now),
            kv_held=self._kv_held.learned(now),
            age_s=age_s(self._at),
            full_for_s=age_s(self._full_since),
            steady_for_s=age_s(self._steady_since),
        )

    def restore(self, learned: LearnedCapacity, age_s: float, now: float) -> None:
        """Go on from what was known `age_s` seconds before `now`; that it was plausible was checked."""
        then = now - age_s

        def at(age_s: float | None) -> float | None:
            return None if age_s is None else then - age_s

        self._by_tokens = learned.by_tokens
        self._line = Line()
        if learned.line is not None:
            self._line.restore(learned.line, then)
        self._told, self._learned, self._tried = learned.told, learned.lowered, learned.tried or 0.0
        self._told_at = now - (learned.told_age_s or 0.0)
        self._untried(age_s)
        for smooth, aged in (
            (self._arrivals, learned.arrivals),
            (self._tokens, learned.tokens),
            (self._held, learned.held),
            (self._rate, learned.rate),
            (self._kv, learned.kv),
            (self._kv_held, learned.kv_held),
        ):
            smooth.restore(aged, then)
        self._at = None if learned.age_s is None else now - learned.age_s
        self._tokens_at = None if learned.tokens_age_s is None else now - learned.tokens_age_s
        # What a gateway that ended had under way is gone: what is under way grows for a while, and is no sign of speed.
        self._full_since = at(learned.full_for_s) if not age_s else None
        self._steady_since = at(learned.steady_for_s) if not age_s else None

    def weight_s(self, now: float) -> float:
        """Seconds of full and half full replicas that were seen, as far as they are not forgotten."""
        return self._line.weight_s(now)

    @property
    def requests(self) -> float | None:
        """What one replica carries at once. None: nobody has said, and it was never seen full."""
        known = [each for each in (self._told, self._learned, self._room) if each is not None]
        return max(min(known), 1.0) if known else None  # one that is ready carries one, whatever is computed

    @property
    def _room(self) -> float | None:
        """Requests that the KV cache holds. None: too little of it was ever in use to tell."""
        if not self._kv.value or not self._kv_held.value:
            return None
        return self._kv_held.value / self._kv.value

    @property
    def service_s(self) -> float | None:
        """How long a request stays in a full replica. None: none was seen, or what is full is unknown."""
        here = self.requests
        found = self._line.at(here) if here else None
        return None if found is None else found * self._unit

    def full(self, demand: Demand) -> bool:
        """Whether requests come faster than they go, or cannot be told not to."""
        if demand.waiting > 0 or demand.spilled_per_s > 0.0:
            return True
        here = self.requests
        return here is not None and demand.in_flight >= FULL * here * demand.replicas_ready

    @property
    def _unit(self) -> float:
        """Tokens of a request; 1 where tokens are unknown."""
        if not self._tokens.value or self._arrivals.value is None or self._arrivals.value <= SLOWEST:
            return 1.0
        return self._tokens.value / self._arrivals.value

    def _jumped(self, demand: Demand) -> bool:
        """Whether so many more or fewer requests came in this period than lately that it is no chance: the first moment
        after a spike has all of its requests, and none that come."""
        usual = self._arrivals.value
        if usual is None or self._at is None:
            return False
        passed_s = demand.at_s - self._at
        expected = passed_s * usual
        return abs(passed_s * demand.arrivals_per_s - expected) > NO_CHANCE * sqrt(max(expected, 1.0))

    def _untold(self, demand: Demand) -> bool:
        """Whether requests come of which nobody says how long they are, and somebody did a while ago."""
        if demand.arrival_tokens_per_s > 0.0:
            self._tokens_at = demand.at_s
        if demand.arrival_tokens_per_s > 0.0 or demand.arrivals_per_s <= 0.0 or self._tokens_at is None:
            return False
        if demand.at_s - self._tokens_at < UNTOLD_S:
            return True
        self._tokens_at, self._arrivals, self._tokens = None, Smooth(OVER_S), Smooth(OVER_S)
        return False

    def _serve(self, demand: Demand, steady: bool, settled: bool) -> None:
        """Requests in service in a replica, and the units that come to it or go a second."""
        tokens, now, ready = self._tokens.value, demand.at_s, demand.replicas_ready
        served = demand.tokens_per_s if tokens else demand.served_per_s
        came = demand.arrival_tokens_per_s if tokens else demand.arrivals_per_s
        if tokens and not came:
            came = demand.arrivals_per_s * self._unit
        held = demand.in_flight / ready
        full = self.full(demand)
        if not steady:
            self._steady_since = None
        elif self._steady_since is None:
            self._steady_since = now
        if not full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        if full:
            here = self.requests
            rate, held = served, held if here is None else min(held, here)
            known = self._full_since is not None and now - self._full_since >= FULL_FOR_S
        else:
            rate = came
            known = self._steady_since is not None and now - self._steady_since >= STEADY_FOR_S and settled
        if rate > SLOWEST and (known or self._rate.value is None):
            requests, per_s = self._held.observe(held, now), self._rate.observe(rate / ready, now)
            self._line.observe(requests, requests / per_s, now)

    def _learn(self, demand: Demand, target_ms: float, ready_for_s: float, elapsed_s: float) -> None:
        ready = demand.replicas_ready
        each = demand.in_flight / ready
        late_ms = max(demand.ttft_p90_ms or 0.0, demand.predicted_ttft_ms or 0.0)
        here = self.requests
        busy = demand.waiting > 0 or each > (BUSY * here if here is not None else 1.0)
        late = busy and late_ms > target_ms
        self.late_by_load = late and ready_for_s >= SETTLED_S  # what has just started has not taken over its share yet
        if late:
            # What waits in gateways is late at any capacity.
            if not self.late_by_load or 1000.0 * (demand.queue_wait_p90_s or 0.0) > 0.5 * late_ms:
                return
            served = demand.served_per_s or (demand.tokens_per_s / self._unit if self._tokens.value else 0.0)
            on_time = max(1.0, each - served / ready * (late_ms - target_ms) / 1000.0)
            least = LEAST * self._told if self._told is not None else 1.0
            if here is None:
                self._learned = self._tried = max(least, on_time)
            elif on_time < here:
                self._learned = self._tried = max(least, here + STEP * (on_time - here))
        elif self._learned is not None:
            self._untried(elapsed_s)
            if each > self._learned:
                self._learned = self._tried = each

    def _untried(self, for_s: float) -> None:
        """For so long, capacity was not tried."""
        if self._learned is not None:
            grown = self._learned * exp(log(2.0) * max(0.0, for_s) / FORGET_S)
            self._learned = max(self._learned, min(grown, UNTRIED * self._tried))
