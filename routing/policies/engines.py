"""What other projects' routers compute, restated over this one's view, to be compared with on equal terms.

Each formula is a function that gives every candidate a score, lower for better; `Formula` makes a policy of it. All of
them see the same work, matches and reports, which is mostly more than they have at home. One thing is changed
throughout: equals are drawn at random, where some originals take the first, which would judge their tie-break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from random import Random
from typing import TypeAlias

from routing.load import Load
from routing.policies.balanced import draw_least, outstanding, warm
from routing.types import InferenceRequest, Replica, View

Score: TypeAlias = Callable[[InferenceRequest, Sequence[Replica], View], Sequence[float]]
"""One number for each candidate, the lowest wins."""


class Formula:
    """The replica with the lowest score, equals at random; one in slow start is looked at by its share."""

    wants_prefix = True

    def __init__(self, name: str, score: Score, rng: Random) -> None:
        self.name = name
        self._score = score
        self._rng = rng

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        able = warm(candidates, view.now, self._rng)
        return draw_least(able, self._score(request, able, view), self._rng)


def uncached(request: InferenceRequest, replica: Replica, view: View) -> int:
    """Tokens of the prompt that the replica would have to compute."""
    return max(0, request.prompt_tokens - view.matches.get(replica, 0))


def least_prefill(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """Prefill that is left to do, this prompt's included: LMetric without the batch, for traffic whose prompts are far
    longer than its answers (coding agents)."""
    return [replica.work.queued_tokens + uncached(request, replica, view) for replica in candidates]


def lmetric(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """(queued uncached + own uncached tokens) x (batch + 1): LMetric, arXiv 2603.15202; also `lmetric` of Dynamo and of
    SGLang's gateway. The batch is all that is in flight there.

    An engine computes one token at least; so when all is cached everywhere, the batch decides instead of nothing.
    """
    return [
        max(1, replica.work.queued_tokens + uncached(request, replica, view)) * (outstanding(replica) + 1)
        for replica in candidates
    ]


DYNAMO_BLOCK_TOKENS = 16


def dynamo(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """Blocks to prefill plus blocks held: ai-dynamo/dynamo `lib/kv-router/src/scheduling/selector/default.rs`, with its
    defaults (overlap credit 1, prefill scale 1, no decay, temperature 0, no weight for the number of requests).

        max((active prefill tokens + prompt tokens) / 16 - cached blocks, 0) + active blocks

    Active blocks are those of all live requests, queued ones included, shared ones once. The blocks that the request
    itself would add are left out: the same everywhere, but for what it shares with live requests.
    """
    block = DYNAMO_BLOCK_TOKENS
    scores = []
    for replica in candidates:
        work = replica.work
        prefill = (work.queued_tokens + request.prompt_tokens) / block - view.matches.get(replica, 0) // block
        scores.append(max(prefill, 0.0) + (work.queued_tokens + work.running_tokens) // block)
    return scores


LLMD_PREFIX, LLMD_QUEUE, LLMD_KV = 3.0, 2.0, 2.0
KV_TOKENS = 500_000
"""Taken for the capacity of a cache whose size nobody has said."""


def kv_use(replica: Replica) -> float:
    """Share of the KV cache in use, 0 to 1: as reported, otherwise estimated from what runs there."""
    if replica.load is not None and replica.load.kv_use is not None:
        return replica.load.kv_use
    return min(1.0, replica.work.running_tokens / (replica.meter.capacity.tokens or KV_TOKENS))


def llmd(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """3 x prefix + 2 x queue + 2 x cache, each 0 to 1, the highest wins: llm-d/llm-d-inference-scheduler,
    `prefix-cache-scorer`, `queue-scorer`, `kv-cache-utilization-scorer` and `max-score-picker` (the last three are the
    Gateway API Inference Extension's, `pkg/epp/scheduling/framework/plugins/scorer/`).

        prefix   matched / prompt
        queue    (longest - own) / (longest - shortest) over the candidates; 1 for all when they are equal
        cache    1 - KV use

    Negated here. What queues is what was dispatched and has no first token; llm-d asks the engines.
    """
    queues = [replica.work.queued for replica in candidates]
    longest, spread = max(queues), max(queues) - min(queues)
    prompt = request.prompt_tokens or 1
    return [
        -(
            LLMD_PREFIX * min(1.0, view.matches.get(replica, 0) / prompt)
            + LLMD_QUEUE * ((longest - queue) / spread if spread else 1.0)
            + LLMD_KV * (1.0 - kv_use(replica))
        )
        for replica, queue in zip(candidates, queues, strict=True)
    ]


def aibrix(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """The longest match among those that are not overloaded: vllm-project/aibrix `prefix-cache`
    (`pkg/plugins/gateway/algorithms/prefix_cache.go`, constants of the code, not of its documentation).

    Matches count in whole percent; equal ones by fewest requests; passed over are those with more requests than mean +
    one (sample) standard deviation. When the busiest has more than twice (mean + 1) and at least 8 more than the least,
    only those with the least are asked. Where nobody matches, or all that match are overloaded: fewest requests.
    """
    loads = [outstanding(replica) for replica in candidates]
    count, least, most = len(loads), min(loads), max(loads)
    mean = sum(loads) / count
    deviation = sqrt(sum((load - mean) ** 2 for load in loads) / (count - 1)) if count > 1 else 0.0
    gate = least if most > 2.0 * (mean + 1.0) and most - least >= 8 else mean + deviation
    prompt = request.prompt_tokens or 1
    scores = []
    for replica, load in zip(candidates, loads, strict=True):
        percent = min(100, 100 * view.matches.get(replica, 0) // prompt) if load <= gate else 0
        # Any percent outweighs any number of requests.
        scores.append(load - percent * (most + 1.0))
    return scores


def vllm_load_aware(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """matched / prompt - (load - mean) / max(1, mean), the highest wins: `loadaware` of vllm-project/production-stack
    (pull request 1035, beta = 1). Negated here."""
    loads = [outstanding(replica) for replica in candidates]
    mean = sum(loads) / len(loads)
    prompt = request.prompt_tokens or 1
    return [
        (load - mean) / max(1.0, mean) - min(1.0, view.matches.get(replica, 0) / prompt)
        for replica, load in zip(candidates, loads, strict=True)
    ]


def ttft(request: InferenceRequest, candidates: Sequence[Replica], view: View) -> list[float]:
    """Predicted milliseconds to the first token: round trip, queued prefill and own prefill at the replica's speed.

    Mooncake's Conductor (FAST'25, Algorithm 1, without transfers) and GORGO (arXiv 2602.11688); neither counts decode.
    """
    scores = []
    for replica in candidates:
        speed = replica.speed
        own = uncached(request, replica, view)
        position = request.prompt_tokens - own / 2
        effective_tokens = replica.work.queued_tokens + own * (1.0 + speed.curve * position)
        scores.append(speed.rtt_ms + speed.prefill_ms * effective_tokens)
    view.predicted_ttft_ms = min(scores)
    return scores


class SmgLeastLoad:
    """Time to drain what was queued at the last report and what was sent since, plus a barrier before a full cache:
    lightseekorg/smg `model_gateway/src/policies/least_load.rs`. In seconds:

        (uncached tokens waiting at the last report + tokens dispatched since) / 2,000 + 0.15 x k / (1 - k)

    k is the KV use reported, at most 0.999. A report counts for three polls of 10 s. One without a report, among others
    that have one: requests outstanding x 1,024 / 2,000. Nobody with a report: fewest requests outstanding. The original
    prefers the rate of generation that an engine reports, where it does, to 2,000 tokens/s.
    """

    name = "smg_least_load"
    wants_prefix = False
    TOKENS_PER_S, PREFILL_TOKENS, KV_WEIGHT_S, STALE_S = 2000.0, 1024, 0.15, 30.0

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._since: dict[Replica, tuple[float, int]] = {}
        """When the last report was made, and tokens dispatched since."""

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        able = warm(candidates, view.now, self._rng)
        fresh = [self._fresh(replica, view.now) for replica in able]
        scores: list[float]
        if any(fresh):
            scores = [self._seconds(replica, load) for replica, load in zip(able, fresh, strict=True)]
        else:
            scores = [outstanding(replica) for replica in able]
        chosen = draw_least(able, scores, self._rng)
        load = chosen.load
        if load is not None:
            if len(self._since) > 4 * len(candidates) + 256:
                self._since = {replica: self._since[replica] for replica in candidates if replica in self._since}
            tokens = request.prompt_tokens or self.PREFILL_TOKENS
            self._since[chosen] = (load.observed_at, self._dispatched(chosen, load) + tokens)
        return chosen

    def _fresh(self, replica: Replica, now: float) -> Load | None:
        load = replica.load
        return load if load is not None and now - load.observed_at <= self.STALE_S else None

    def _dispatched(self, replica: Replica, load: Load) -> int:
        at, tokens = self._since.get(replica, (load.observed_at, 0))
        return tokens if at == load.observed_at else 0

    def _seconds(self, replica: Replica, load: Load | None) -> float:
        if load is None:
            return outstanding(replica) * self.PREFILL_TOKENS / self.TOKENS_PER_S
        tokens = (load.waiting_uncached_tokens or 0) + self._dispatched(replica, load)
        use = min(0.999, max(0.0, load.kv_use or 0.0))
        return tokens / self.TOKENS_PER_S + self.KV_WEIGHT_S * use / (1.0 - use)
