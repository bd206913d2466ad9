"""How fast decoding can be at most: for each token the weights it passes through and its KV cache are read once.

Nothing is faster than memory is read, so bandwidth / bytes bounds the tokens a second from above. Real engines reach
perhaps half of it: kernels start, GPUs talk to each other, and the largest batches are bound by arithmetic instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.plan.cache import request_bytes
from backends.plan.fit import Placement, Question
from backends.plan.weights import read_per_step


@dataclass(frozen=True, slots=True)
class Bound:
    """Upper bounds of decoding, at the full context of each request."""

    alone_tokens_s: float  # one request that has the replica to itself
    requests: int  # as many as were asked for and fit
    together_tokens_s: float  # all of those together
    read_bytes: float  # of weights by the fullest GPU for one token of one request


def bound(question: Question, placement: Placement) -> Bound:
    """The bounds of one replica. Experts are taken to be chosen evenly, which reads most of them."""
    requests = max(1, min(question.concurrency, placement.concurrent))
    split, bandwidth = placement.split, placement.gpu.bandwidth
    alone, together = (
        question.correction * read_per_step(question.model, question.parts, question.precision, split, requests=count)
        for count in (1, requests)
    )
    each = request_bytes(question.model, question.kv, question.context_tokens, split)
    groups = split.tp if split.dp_attention else 1
    # One request passes all stages one after the other; many keep all of them busy.
    return Bound(
        alone_tokens_s=bandwidth / ((alone + each) * split.pp),
        requests=requests,
        together_tokens_s=requests * bandwidth / (together + each * requests / groups),
        read_bytes=alone,
    )
