"""How many replicas a pool should have: the most that any signal asks for, within what the rules allow.

    arrivals   rate / (target_use * what one replica serves)                Little's law: capacity / time in service
    trend      the same with the rate that is foreseen for now + lead time
    queue      what waits is served within a lead time, at full use         backlog / lead time more requests a second
    ttft       ready * time to first token / target, at most twice          where load makes it late, and no queue does
    kv         ready * KV use * growth / target_kv

Replicas that are starting count as there, or each decision would order them again. Then, as Kubernetes' autoscaler does
(https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#algorithm-details): within the
tolerance nothing changes; what it goes down to is the most that was wanted in the last `down_after_s`; steps are
limited. That going down is to be slow and going up is not is AutoScale's finding (Gandhi et al. 2012,
https://doi.org/10.1145/2382553.2382556), that arrivals are foreseen for as long as a model takes to load SageServe's
(https://arxiv.org/abs/2502.14617). While something is not known, nothing is taken away.

    A replica holds 144 requests for 58 s each: 2.5/s. 20/s come, 26/s are foreseen.
    With target_use 0.7: 26 / (0.7 * 2.5) = 14.9, so 15 replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import ceil

from routing.scaling.capacity import Capacity
from routing.scaling.forecast import Series
from routing.scaling.learned import (
    MOST_SAMPLES,
    MOST_STARTS,
    OLDEST_S,
    RECENT_S,
    VERSION,
    Learned,
    LearnedOrders,
    age_at,
    check,
    thinned,
)
from routing.scaling.reasons import Signals, reasons_of, starts_from_zero
from routing.scaling.types import UNKNOWN, Demand, Reason, Recommendation, Rules

STALE_S = 30.0
"""Older than this, what was told is not believed to be so still. Six of the periods in which it is told."""
UP_EVERY_S = 15.0
"""One `up_step` in so long: Kubernetes' period."""
UP_LEAST = 4
"""Replicas that may be added at once whatever `up_step` says: Kubernetes' other policy."""
DOWN_EVERY_S = 60.0
"""One `down_step` in so long: what is left takes over the load first, and it is seen whether it can."""
ORDER_S = 60.0
"""Beyond the time to drain, how long an order of fewer is believed to be carried out while nothing is seen of it."""
STARTS = MOST_STARTS
"""The last ones that the lead time is taken from."""
STARTS_LEAST = 3
MOST_OF_THEM = 0.8
MUCH_MORE = 1.25
"""Beside one that decides, others see the same a moment later, and always a little less: nothing is gained by that."""


class Scaler:
    """Decides for one pool. `about`: what capacity depends on, as one word; of another one nothing is taken over."""

    def __init__(self, rules: Rules, about: str = "") -> None:
        self.rules = rules
        self.about = about
        self._arrivals = Series()
        self._capacity = Capacity()
        self._starts: deque[float] = deque(maxlen=STARTS)
        self._wanted: deque[tuple[float, int]] = deque()
        """What was wanted in the last `down_after_s`, falling: only those that no later one exceeds."""
        self._counts: deque[tuple[float, int]] = deque()
        """What there was or was ordered in the last `UP_EVERY_S`."""
        self._ordered: tuple[float, int] | None = None
        self._up_at: float | None = None
        self._down_at: float | None = None
        self._ready = (0, 0.0)
        """Replicas that are ready, since when."""

    def change(self, rules: Rules, about: str | None = None) -> None:
        """Other rules from now on; what was learned stays, but for that of replicas of another kind."""
        self.rules = rules
        if about is not None and about != self.about:
            self.about, self._capacity = about, Capacity()

    # --- what is learned

    def learned(self, now: float) -> Learned:
        """What another scaler needs to go on as this one would; see `routing.scaling.learned`."""

        def aged(pairs: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
            return [(age_at(now, at), count) for at, count in pairs]

        def age_s(at: float | None) -> float | None:
            return None if at is None else age_at(now, at)

        ordered = self._ordered
        return Learned(
            version=VERSION,
            about=self.about,
            starts=tuple(self._starts),
            capacity=self._capacity.learned(now),
            course=self._arrivals.learned(now),
            orders=LearnedOrders(
                wanted=thinned(aged(self._wanted)),
                said=tuple(aged(self._counts)[-MOST_SAMPLES:]),
                ordered=None if ordered is None else aged([ordered])[0],
                up_age_s=age_s(self._up_at),
                down_age_s=age_s(self._down_at),
                ready=(age_at(now, self._ready[1]), self._ready[0]),
            ),
        )

    def restore(self, learned: Learned, age_s: float, now: float) -> None:
        """Go on from what was learned `age_s` seconds ago. The last minutes are only taken over when they are that, and
        by one that has decided nothing yet. Raises `Implausible`; then nothing is changed."""
        check(learned, self.about, age_s)
        age_s = max(0.0, age_s)
        then = now - age_s
        self._capacity = Capacity()
        self._capacity.restore(learned.capacity, age_s, now)
        if len(learned.starts) > len(self._starts):
            self._starts = deque(learned.starts, maxlen=STARTS)
        if self._ordered is not None or age_s > RECENT_S:
            return
        self._arrivals = Series()
        self._arrivals.restore(learned.course, then)
        orders = learned.orders
        self._wanted = deque((then - age, count) for age, count in orders.wanted)
        self._counts = deque((then - age, count) for age, count in orders.said)
        self._ordered = None if orders.ordered is None else (then - orders.ordered[0], orders.ordered[1])
        self._up_at = None if orders.up_age_s is None else then - orders.up_age_s
        self._down_at = None if orders.down_age_s is None else then - orders.down_age_s
        self._ready = orders.ready[1], then - orders.ready[0]

    def knows_less(self, learned: Learned, age_s: float, now: float) -> bool:
        """Whether that was learned from more than this scaler has seen. Raises `Implausible`."""
        check(learned, self.about, age_s)
        other = Capacity()
        other.restore(learned.capacity, max(0.0, age_s), now)
        return other.weight_s(now) > MUCH_MORE * self._capacity.weight_s(now)

    def learned_start(self, seconds: float) -> None:
        """A replica took so long from its order until it was ready. What cannot be is passed over."""
        if 0.0 <= seconds <= OLDEST_S:
            self._starts.append(seconds)

    @property
    def lead_time_s(self) -> float:
        """What four of five starts took; `lead_time_s` of the rules until three were seen."""
        if len(self._starts) < STARTS_LEAST:
            return self.rules.lead_time_s
        return sorted(self._starts)[ceil(MOST_OF_THEM * len(self._starts)) - 1]

    @property
    def capacity_requests(self) -> float | None:
        """What one replica is believed to carry at once; None: unknown."""
        return self._capacity.requests

    def decide(self, demand: Demand | None, now: float) -> Recommendation:
        """What there should be. `demand` None: nobody has told anything. `now` never goes back."""
        if demand is None:
            return self._unknown(now)
        current = demand.replicas_ready + demand.replicas_starting + demand.replicas_unhealthy
        base = self._base(current, now)
        if now - demand.at_s > STALE_S:
            return self._held(base, current, f"what is known is {now - demand.at_s:.0f} s old", now)
        if demand.replicas_ready != self._ready[0]:
            self._ready = demand.replicas_ready, demand.at_s
        self._arrivals.observe(demand.arrivals_per_s, demand.at_s)
        self._capacity.seen(demand, self.rules.ttft_target_ms, demand.at_s - self._ready[1], self._arrivals.steady)
        signals = self._signals(demand)
        if not demand.replicas_ready and demand.replicas_unhealthy:
            return self._held(base, current, "no replica is healthy, which more of them may not mend", now, signals)
        if not demand.replicas_ready:
            return self._from_none(demand, base, current, now, signals)
        reasons = reasons_of(demand, self.rules, signals, base)
        missing = "" if demand.complete else "not every gateway has told its part"
        return self._recommend(reasons, base, current, now, signals, missing)

    def _unknown(self, now: float) -> Recommendation:
        """Nobody has told anything. What was ordered stays; where nothing was, it is not known how many there are, and
        the least of the rules must not be taken for that later on."""
        why = "nothing is known of what is asked for"
        if self._ordered is not None:
            return self._held(self._ordered[1], self._ordered[1], why, now)
        count = self.rules.min
        return Recommendation(
            count=count,
            current=count,
            reasons=(Reason(UNKNOWN, count, why),),
            limited_by="unknown",
            lead_time_s=self.lead_time_s,
            usd_per_hour=count * self.rules.usd_per_hour,
        )

    # --- what is wanted

    def _signals(self, demand: Demand) -> Signals:
        lead_s = self.lead_time_s
        rate = max(self._arrivals.now(), 0.0)
        return Signals(
            rate=rate,
            forecast=rate + self._arrivals.growth(lead_s),
            lead_s=lead_s,
            service_s=self._capacity.service_s,
            capacity=self._capacity.requests,
            late_by_load=self._capacity.late_by_load,
        )

    def _from_none(self, demand: Demand, base: int, current: int, now: float, signals: Signals) -> Recommendation:
        """There is none that is ready: what is starting is waited for."""
        found = starts_from_zero(demand, self.rules, signals, base)
        missing = "" if demand.complete else "not every gateway has told its part"
        return self._recommend(found, base, current, now, signals, missing)

    # --- what is allowed

    def _base(self, current: int, now: float) -> int:
        """What is taken to be there: what was ordered, until more than that would have to be gone."""
        if self._ordered is None:
            return current
        at, count = self._ordered
        return count if count >= current or now - at < self.rules.drain_s + ORDER_S else current

    def _recommend(
        self, reasons: list[Reason], base: int, current: int, now: float, signals: Signals, missing: str
    ) -> Recommendation:
        rules = self.rules
        wanted = max((each.wanted for each in reasons), default=0)
        if missing:
            wanted = max(wanted, base)
            reasons = [Reason(UNKNOWN, base, f"{missing}: nothing is taken away"), *reasons]
        reasons = sorted(reasons, key=lambda each: -each.wanted)
        if not self._wanted:  # what there was before is wanted until it is known better
            self._wanted.append((now, max(base, rules.min)))
        before = self._most_wanted(wanted, now)
        limit = ""
        if wanted > base:
            count, limit = self._up(wanted, base, now)
        elif wanted < base:
            count, limit = self._down(wanted, before, base, now)
        else:
            count = base
        bounded = min(max(count, rules.min), rules.ceiling)
        if bounded > count:
            limit = "floor"
        elif bounded < count:
            limit = "budget" if rules.ceiling < rules.max else "ceiling"
        elif missing and wanted == base:
            limit = "unknown"
        return self._say(bounded, current, reasons, limit, now, signals)

    def _most_wanted(self, wanted: int, now: float) -> int:
        """The most that was wanted in the last `down_after_s`, this included."""
        kept = self._wanted
        while kept and kept[-1][1] <= wanted:
            kept.pop()
        kept.append((now, wanted))
        while len(kept) > 1 and kept[0][0] <= now - self.rules.down_after_s:
            kept.popleft()
        return kept[0][1]

    def _up(self, wanted: int, base: int, now: float) -> tuple[int, str]:
        if self._up_at is not None and now - self._up_at < self.rules.up_cool_down_s:
            return base, "up_cool_down"
        before = min((count for _, count in self._counts), default=base)
        before = min(before, base)
        most = max(before + UP_LEAST, int(before * (1.0 + self.rules.up_step)), base)
        if wanted > most:
            return most, "up_step"
        return wanted, ""

    def _down(self, wanted: int, most_wanted: int, base: int, now: float) -> tuple[int, str]:
        if base <= self.rules.min:
            return base, "floor"
        if most_wanted >= base:
            return base, "down_after"
        if self._down_at is not None and now - self._down_at < DOWN_EVERY_S:
            return base, "down_step"
        least = base - max(1, int(base * self.rules.down_step))
        if most_wanted < least:
            return least, "down_step"
        return most_wanted, "down_after" if most_wanted > wanted else ""

    def _held(self, count: int, current: int, why: str, now: float, signals: Signals | None = None) -> Recommendation:
        count = min(max(count, self.rules.min), self.rules.ceiling)
        self._wanted.clear()
        self._wanted.append((now, count))
        return self._say(
            count, current, [Reason(UNKNOWN, count, f"{why}: nothing is changed")], "unknown", now, signals
        )

    def _say(
        self, count: int, current: int, reasons: list[Reason], limit: str, now: float, signals: Signals | None
    ) -> Recommendation:
        before = self._ordered[1] if self._ordered is not None else current
        if self._ordered is None or count != before:
            if count > before:
                self._up_at = now
            elif count < before:
                self._down_at = now
            self._ordered = now, count
        self._counts.append((now, count))
        while self._counts and self._counts[0][0] <= now - UP_EVERY_S:
            self._counts.popleft()
        return Recommendation(
            count=count,
            current=current,
            reasons=tuple(reasons),
            limited_by=limit,
            forecast=signals.forecast if signals is not None else 0.0,
            lead_time_s=self.lead_time_s,
            usd_per_hour=count * self.rules.usd_per_hour,
        )
