"""The default policy: the replica where the request costs the least, in predicted milliseconds.

    cost = round trip
         + wait        prefill that is queued there already, at the pace of the running batch
         + prefill     of the prompt tokens that are not cached there
         + adapter     loading a LoRA adapter, and that another one may have to go for it
         + others      these three for every other request there: they wait as well, or decode more slowly meanwhile
         + copies      prefill of what is cached elsewhere: time of the fleet that need not be spent
         + decode      of the answer, at the batch that it would join
         + pressure    when the KV cache would be nearly full: somebody may have to be computed twice
         + price       dollars, at the exchange rate of the request's class
         + failure     chance of failing there times what trying elsewhere would cost

Everything is in one unit, so a cached prefix counts as what it saves, in milliseconds, and for nothing when all have
it; how long to wait for a warm replica, or how far to go to an idle one, needs no thresholds. The constants come from
`routing.speed`. Near-ties are broken at random: gateways that see the same state do not all choose the same replica.

`wait + prefill` times all the requests there is LMetric (arXiv 2603.15202) in milliseconds; to count one's own time
alone is Mooncake's rule (FAST'25, Algorithm 1). The former balances requests and prefill at once, and no constant that
is learned wrongly can undo that. What is added is what LMetric lacks: speeds, decoding, adapters, regions, prices, and
a reason not to fill every cache with the same. What was tried, and what is lost without each part: docs/routing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from routing.types import InferenceRequest, Replica, View

SESSION_TOKENS = 128
"""What a caller's word that requests belong together is worth in cached tokens: one block. A hint, never a lock."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each part counts against the request's own time to first token. From simulation, docs/routing.md."""

    others: float = 1.0
    """Of what the request's wait, prefill and adapter take, for each other request there. 0 is Mooncake's rule; the
    larger, the nearer to LMetric's."""
    copies: float = 1.0
    """Of the prefill of what another replica holds, at the candidates' average speed, for each request of an average
    one. The same for all replicas, so that long prompts do not gather where few requests are."""
    copies_ease: float = 2.0
    """But for no more than so many times the requests that the replica has: an idle one may well take a copy."""
    distance: float = 0.15
    """Of the round trip, likewise for each request of an average one; otherwise a wait of one step, times a hundred who
    are there, would send anybody around the world."""
    decode: float = 1.0
    """Of the time that its own decoding takes."""
    pressure_from: float = 0.85
    """Share of the KV cache beyond which it is short."""
    tie: float = 0.02
    """Costs closer than this share of the best one's time to first token are equal."""

    def __deepcopy__(self, memo: object) -> Weights:
        """Itself, since nobody changes one; and compiled, a frozen one cannot be filled after it was made."""
        return self


class Averages(NamedTuple):
    """An average one of the candidates."""

    batch: float
    """Requests, running and queued."""
    held_tokens: float
    """KV tokens of one of these."""
    prefill_ms: float
    """Per token."""


class Cost:
    """See the module. `weights` are for experiments."""

    name = "cost"
    wants_prefix = True
    weighs_adapters = True

    def __init__(self, rng: Random, weights: Weights | None = None) -> None:
        self._rng = rng
        self.weights = weights or Weights()

    def __getnewargs__(self) -> tuple[Random, Weights]:
        """For copies: where this class is compiled, making one calls `__init__`."""
        return self._rng, self.weights

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        weights = self.weights
        by_batch, ease, short_from = weights.others, weights.copies_ease, weights.pressure_from
        tokens, output, now = request.prompt_tokens or 1, view.output_tokens, view.now
        average, held_each, typical_ms = _averages(candidates)
        copy_ms, decoded = weights.copies * typical_ms, weights.decode * output
        far = weights.distance * average
        held_own = tokens + 0.5 * output
        adapter, priced = request.adapter, request.ms_per_usd
        cached_at, longest = None, 0
        if view.matches:
            cached_at, longest = view.matches.get, max(view.matches.values())
        session = view.session
        costs: list[float] = []
        best_cost = best_ttft = float("inf")
        best = candidates[0]
        for replica in candidates:
            speed, work = replica.speed, replica.work
            cached = 0 if cached_at is None else cached_at(replica, 0)
            uncached = tokens - cached
            if uncached < 1:
                uncached = 1
            batch, held, queued = work.running, work.running_tokens, work.queued
            per_token, curve = speed.prefill_ms, speed.curve
            step_ms, request_ms, kv_ms = speed.step_ms, speed.request_ms, speed.kv_ms
            prefill = uncached * per_token * (1.0 + curve * (tokens - 0.5 * uncached))
            step = step_ms + request_ms * batch + kv_ms * held
            pace = step / speed.chunk
            delay = step + pace * uncached + prefill
            if queued:
                ahead = work.queued_tokens
                held += ahead
                batch += queued
                each = ahead / queued
                mean = each * per_token * (1.0 + 0.5 * curve * each)
                done = (now - work.since) * 1000.0 * per_token / (per_token + pace)
                most = 0.9 * mean
                delay += pace * ahead + queued * mean - (done if done < most else most)
            ttft = speed.rtt_ms + delay
            lost = 0.0
            if adapter is not None:
                load, lost = _adapter(adapter, replica)
                delay += load
                ttft += load
            eased = ease * batch
            joined = step_ms + request_ms * (batch + 1) + kv_ms * (batch * held_each + held_own)
            cost = (
                ttft
                + far * speed.rtt_ms
                + by_batch * batch * delay
                + (eased if eased < average else average) * copy_ms * (longest - cached)
                + decoded * joined
            )
            if lost:
                cost += lost * (1.0 + by_batch * average)
            capacity = replica.meter.capacity.tokens
            if capacity is not None and batch:
                share = (held + tokens + output) / capacity
                if share > short_from:
                    cost += _pressure(share, short_from, prefill, joined)
            if speed.failure:
                cost += speed.failure * 2.0 * (ttft + by_batch * batch * delay)
            if priced:
                cost += _price(request, replica, uncached, output)
            if replica.health.warm_from is not None:
                cost *= 1.0 + 2.0 * (1.0 - replica.health.share(now))
            if replica.weight != 1.0:
                cost /= replica.weight
            if replica is session:
                cost -= SESSION_TOKENS * per_token
            costs.append(cost)
            if cost < best_cost:
                best_cost, best_ttft, best = cost, ttft, replica
        limit = best_cost + weights.tie * best_ttft
        near: list[Replica] = []
        for place, cost in enumerate(costs):
            if cost <= limit:
                near.append(candidates[place])
        if len(near) > 1:
            if cached_at is not None:
                # Work that is saved at no cost, for whoever comes next.
                most_cached = max([cached_at(replica, 0) for replica in near]) - SESSION_TOKENS
                near = [replica for replica in near if cached_at(replica, 0) >= most_cached]
            best = near[int(self._rng.random() * len(near))]
        view.predicted_ttft_ms = best_ttft
        view.reason = "cold" if cached_at is None else _reason(cached_at(best, 0), longest)
        return best

    def terms(self, request: InferenceRequest, replica: Replica, view: View, usual: Averages) -> dict[str, float]:
        """Every part of the cost, in milliseconds; `cost` is what decides, `ttft` the predicted time to first token.

        `usual`: of all candidates (`averages`).
        """
        weights, speed, work = self.weights, replica.speed, replica.work
        tokens, output = request.prompt_tokens or 1, view.output_tokens
        uncached = max(1, tokens - view.matches.get(replica, 0))
        prefill = uncached * speed.prefill_ms * (1.0 + speed.curve * (tokens - 0.5 * uncached))
        batch = work.running + work.queued
        step = speed.step_ms + speed.request_ms * work.running + speed.kv_ms * work.running_tokens
        wait = step * (1.0 + uncached / speed.chunk)
        if work.queued:
            wait += step * work.queued_tokens / speed.chunk
            each = work.queued_tokens / work.queued
            mean = each * speed.prefill_ms * (1.0 + 0.5 * speed.curve * each)
            slowed = speed.prefill_ms / (speed.prefill_ms + step / speed.chunk)
            wait += work.queued * mean - min((view.now - work.since) * 1000.0 * slowed, 0.9 * mean)
        load, lost = (0.0, 0.0) if request.adapter is None else _adapter(request.adapter, replica)
        joined = (
            speed.step_ms
            + speed.request_ms * (batch + 1)
            + speed.kv_ms * (batch * usual.held_tokens + tokens + 0.5 * output)
        )
        delay = wait + prefill + load
        others = weights.others * batch * delay
        missing = max(view.matches.values(), default=0) - view.matches.get(replica, 0)
        served = min(weights.copies_ease * batch, usual.batch)
        ttft = speed.rtt_ms + delay
        terms = {
            "round_trip": speed.rtt_ms * (1.0 + weights.distance * usual.batch),
            "wait": wait,
            "prefill": prefill,
            "adapter": load + lost * (1.0 + weights.others * usual.batch),
            "others": others,
            "copies": weights.copies * served * missing * usual.prefill_ms,
            "decode": weights.decode * output * joined,
            "pressure": 0.0,
            "price": _price(request, replica, uncached, output),
            "failure": speed.failure * 2.0 * (ttft + others),
        }
        capacity = replica.meter.capacity.tokens
        if capacity is not None and batch:
            share = (work.running_tokens + work.queued_tokens + tokens + output) / capacity
            terms["pressure"] = _pressure(share, weights.pressure_from, prefill, joined)
        plain = sum(terms.values())
        share = 1.0 if replica.health.warm_from is None else replica.health.share(view.now)
        total = plain * (1.0 + 2.0 * (1.0 - share)) / replica.weight
        terms["warming_and_weight"] = total - plain
        terms["session"] = -SESSION_TOKENS * speed.prefill_ms if replica is view.session else 0.0
        return {"cost": total + terms["session"], "ttft": ttft, **terms}


def averages(candidates: Sequence[Replica]) -> Averages:
    return Averages(*_averages(candidates))


def _averages(candidates: Sequence[Replica]) -> tuple[float, float, float]:
    """The fields of `Averages`: a plain tuple is made in a fifth of the time."""
    requests = tokens = 0
    prefill_ms = 0.0
    for replica in candidates:
        work = replica.work
        requests += work.running + work.queued
        tokens += work.running_tokens + work.queued_tokens
        prefill_ms += replica.speed.prefill_ms
    count = len(candidates) or 1
    return requests / count, tokens / requests if requests else 0.0, prefill_ms / count


def _reason(held: int, longest: int) -> str:
    """Why the chosen one, of whose prompt tokens so many are cached there, and `longest` at some replica."""
    if held >= longest:
        return "warm"
    return "warm_in_part" if held else "idle"


def _pressure(share: float, start: float, prefill_ms: float, step_ms: float) -> float:
    """Nothing up to `start`, then growing with the square: at a full cache about one prompt computed twice."""
    if share <= start:
        return 0.0
    excess = (share - start) / (1.0 - start)
    return excess * excess * (prefill_ms + 10.0 * step_ms)


def _adapter(adapter: str, replica: Replica) -> tuple[float, float]:
    """Milliseconds until the adapter is there, during which the engine stands still; and what loading another one again
    will take that has to go for it."""
    if replica.adapters is None or adapter in replica.adapters:
        return 0.0, 0.0
    load_ms = replica.speed.adapter_ms
    if adapter in replica.loading:
        return 0.5 * load_ms, 0.0
    full = replica.adapter_slots is not None and len(replica.adapters) + len(replica.loading) >= replica.adapter_slots
    return load_ms, load_ms if full else 0.0


def _price(request: InferenceRequest, replica: Replica, uncached: int, output_tokens: float) -> float:
    if not request.ms_per_usd:
        return 0.0
    cached = max(0, request.prompt_tokens - uncached)
    usd = (
        uncached * replica.input_usd_per_million
        + cached * replica.cached_usd_per_million
        + output_tokens * replica.output_usd_per_million
    ) / 1e6
    return usd * request.ms_per_usd
