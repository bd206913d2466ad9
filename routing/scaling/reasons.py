"""What each signal asks for by itself, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from routing.scaling.types import ARRIVALS, FROM_ZERO, KV, QUEUE, REPLACE, SPILL, TREND, TTFT, Demand, Reason, Rules

_ROUNDING = 1e-6
MOST = 1e6
"""Replicas; more than any rule allows, and a whole number."""
MOST_BY_TTFT = 2.0
"""Times to first token grow without bounds as queues do; they say that more is needed and not how much."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What was made of what was seen."""

    rate: float
    """Requests a second, now."""
    forecast: float
    """Requests a second after the lead time."""
    lead_s: float
    service_s: float | None
    """How long a request stays in a full replica. None: unknown."""
    capacity: float | None
    """What one replica carries at once. None: unknown."""
    late_by_load: bool

    @property
    def each_per_s(self) -> float:
        """Requests a second that one replica serves when it is full. 0: unknown."""
        return self.capacity / self.service_s if self.capacity and self.service_s else 0.0


def reasons_of(demand: Demand, rules: Rules, signals: Signals, base: int) -> list[Reason]:
    """All that there are, for a pool with replicas that are ready. `base`: what is there or ordered."""
    replaced = min(demand.replicas_unhealthy, demand.replicas_ready)
    here = max(base - replaced, 0)

    least = 1 if signals.rate > 0.0 or demand.in_flight or demand.waiting else 0

    def asks(kind: str, replicas: float, text: str) -> Reason:
        return Reason(kind, max(least, _whole(replicas, here, rules.tolerance)) + replaced, text)

    found = [
        each
        for each in (
            _arrivals(demand, rules, signals),
            _trend(rules, signals),
            _queue(demand, rules, signals),
            _ttft(demand, rules, signals),
            _kv(demand, rules, signals),
        )
        if each is not None
    ]
    reasons = [asks(*each) for each in found]
    if not found:  # neither what is asked for nor what one replica carries is known
        reasons.append(Reason(ARRIVALS, base, "what a replica carries is not known yet"))
    elif replaced:
        most = max(each.wanted for each in reasons)
        reasons.append(
            Reason(REPLACE, most, f"{demand.replicas_unhealthy} replicas take no requests; {replaced} count as missing")
        )
    if demand.spilled_per_s > 0.0:
        reasons.append(_spill(demand, rules))
    return reasons


def starts_from_zero(demand: Demand, rules: Rules, signals: Signals, base: int) -> list[Reason]:
    """For a pool with none that is ready: by what was learned before, else one as soon as anybody asks."""
    asked = demand.waiting + demand.in_flight > 0 or signals.rate > 0.0
    if not asked:
        return [Reason(ARRIVALS, 0, "nobody asks for anything")]
    if not signals.each_per_s:
        text = f"{demand.waiting} wait, {signals.rate:.2g} come a second, and no replica is ready"
        return [Reason(FROM_ZERO, max(1, base), text)]
    found = [_arrivals(demand, rules, signals), _trend(rules, signals), _queue(demand, rules, signals)]
    reasons = [
        Reason(kind, max(1, _whole(want, base, rules.tolerance)), text) for kind, want, text in filter(None, found)
    ]
    return reasons or [Reason(FROM_ZERO, max(1, base), "somebody asks, and no replica is ready")]


def _whole(replicas: float, here: int, tolerance: float) -> int:
    """Whole replicas for a part of one; as many as there are where that is near enough."""
    if abs(replicas - here) <= tolerance * here:
        return here
    return ceil(min(replicas, MOST) - _ROUNDING)


def _arrivals(demand: Demand, rules: Rules, signals: Signals) -> tuple[str, float, str] | None:
    if signals.capacity is None:
        return None
    # What is under way has to be somewhere, even if nothing comes any more.
    held = min(demand.in_flight, signals.capacity * demand.replicas_ready) / signals.capacity
    if not signals.service_s:
        return ARRIVALS, held, f"{demand.in_flight} under way at {signals.capacity:.0f} a replica"
    wanted = max(held, signals.rate / (rules.target_use * signals.each_per_s))
    return ARRIVALS, wanted, f"{signals.rate:.2f} requests/s come; {_serves(rules, signals)}"


def _trend(rules: Rules, signals: Signals) -> tuple[str, float, str] | None:
    if not signals.each_per_s or signals.forecast <= signals.rate:
        return None
    text = (
        f"{signals.forecast:.2f} requests/s are foreseen in {signals.lead_s:.0f} s, {signals.rate:.2f} come now;"
        f" {_serves(rules, signals)}"
    )
    return TREND, signals.forecast / (rules.target_use * signals.each_per_s), text


def _serves(rules: Rules, signals: Signals) -> str:
    return (
        f"a replica serves {signals.each_per_s:.2f} ({signals.capacity:.0f} at once for {signals.service_s:.1f} s each)"
        f" and is to be used to {rules.target_use:.0%}"
    )


def _queue(demand: Demand, rules: Rules, signals: Signals) -> tuple[str, float, str] | None:
    """For what waits in gateways, and inside of engines."""
    ready = demand.replicas_ready
    if signals.capacity is None or not signals.each_per_s:
        if not demand.waiting:
            return None
        share = min(1.0, demand.waiting / max(demand.in_flight, 1))
        return QUEUE, ready * (1.0 + share), f"{demand.waiting} wait beside {demand.in_flight} under way"
    backlog = demand.waiting + max(0.0, demand.in_flight - signals.capacity * ready)
    if backlog <= 0.0:
        return None
    spare = signals.each_per_s * ready - signals.rate
    if spare > 0.0 and backlog / spare <= rules.ttft_target_ms / 1000.0:
        return None
    drain_s = max(signals.lead_s, rules.ttft_target_ms / 1000.0)
    # No more than have a place all at once.
    more = min(backlog / (drain_s * signals.each_per_s), backlog / signals.capacity)
    text = f"{backlog:.0f} wait; to serve them within {drain_s:.0f} s takes {more:.1f} replicas more than what comes"
    return QUEUE, signals.rate / signals.each_per_s + more, text


def _ttft(demand: Demand, rules: Rules, signals: Signals) -> tuple[str, float, str] | None:
    late_ms = max(demand.ttft_p90_ms or 0.0, demand.predicted_ttft_ms or 0.0)
    if not signals.late_by_load or 1000.0 * (demand.queue_wait_p90_s or 0.0) > 0.5 * late_ms:
        return None  # what waits in gateways is what `queue` is about
    ratio = min(MOST_BY_TTFT, late_ms / rules.ttft_target_ms)
    text = f"first tokens take {late_ms:.0f} ms, the target is {rules.ttft_target_ms:.0f} ms"
    return TTFT, demand.replicas_ready * ratio, text


def _kv(demand: Demand, rules: Rules, signals: Signals) -> tuple[str, float, str] | None:
    if demand.kv_use is None or not demand.in_flight:
        return None
    growth = signals.forecast / signals.rate if signals.rate > 0.0 else 1.0
    text = f"the KV cache is in use to {demand.kv_use:.0%}, the target is {rules.target_kv:.0%}"
    if growth > 1.0:
        text += f", and {growth:.2f} times as much is foreseen"
    return KV, demand.replicas_ready * demand.kv_use * growth / rules.target_kv, text


def _spill(demand: Demand, rules: Rules) -> Reason:
    text = (
        f"{demand.spilled_per_s:.2f} requests/s go to rented replicas for {demand.spill_usd_per_hour:.2f} USD an hour"
    )
    if rules.usd_per_hour:
        cheaper = "cheaper than" if demand.spill_usd_per_hour < rules.usd_per_hour else "dearer than or as dear as"
        text += f", which is {cheaper} one more replica for {rules.usd_per_hour:.2f}"
    return Reason(SPILL, 0, text)
