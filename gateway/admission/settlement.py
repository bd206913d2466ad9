"""What a request really used, as far as anybody can tell, for the limits and the bill."""

from __future__ import annotations

import msgspec

from backends.usage import Usage
from gateway import usage as pricing
from gateway.admission.visit import Visit
from gateway.limits.estimate import Estimator
from gateway.record import Exchange, Outcome
from gateway.store.limits import Cost
from gateway.store.places import work_of

_NOTHING_USED = frozenset({Outcome.REJECTED, Outcome.UPSTREAM_REJECTED, Outcome.UNAVAILABLE, Outcome.UPSTREAM_ERROR})
"""No model has worked for the caller, or not to any use that can be charged for."""


class Settlement(msgspec.Struct, frozen=True, gc=False):
    used: Cost
    work: int
    """In VTC's units, for the tenant's turn in the queue."""


def settlement(visit: Visit, exchange: Exchange, estimator: Estimator) -> Settlement | None:
    """None: as if the request had never been, since it was turned away before anything was sent.

    Without a usage report (the client left, the stream broke) the prompt is charged as estimated, and the output by
    what was relayed: the bytes of its text, at what this model's tokens have lately been worth. Of an answer that was
    to come whole nothing is relayed before its end, however long the model has worked on it: it is charged what was
    expected of it. The record says that it is an estimate. A request that failed without content is counted, and
    charged no tokens.
    """
    if exchange.attempts == 0:
        return None
    usage = exchange.usage
    if usage is None and exchange.outcome not in _NOTHING_USED and (exchange.dispatched_at is not None):
        output = visit.estimate.output
        if exchange.stream:
            output = estimator.relayed(visit.order.route.model, exchange.content_events, exchange.content_bytes)
        usage = Usage(visit.estimate.input, output, None)
        exchange.usage = usage
        exchange.usage_estimated = True
    if usage is None:
        return Settlement(Cost(), 0)
    if exchange.price is not None and exchange.cost_usd is None:
        exchange.cost_usd = pricing.cost_usd(usage, exchange.price)
    micros = 0 if exchange.cost_usd is None else round(exchange.cost_usd * 1_000_000)
    prompt, output = usage.prompt_tokens, usage.completion_tokens
    return Settlement(Cost(1, prompt, output, prompt + output, micros), work_of(prompt, output))
