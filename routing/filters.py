"""Hard rules: why a replica must not be considered for a request, whatever its score would be."""

from __future__ import annotations

from collections.abc import Sequence

from routing.adapters import NO_SLOT, obstacle
from routing.health import CORDONED
from routing.types import InferenceRequest, Replica

HELD_BACK = frozenset({"warming", CORDONED})
"""Reasons that say nothing bad of a replica: it is used before any that is under suspicion, and only where nobody else
is left. One that is `joining` has not been seen to work yet."""
SOFT = frozenset({"cooling_down", "ejected", "half_open", "not_ready", "unresponsive", "stalled", "joining"})
"""Reasons that are suspicions: when no candidate is left without one, they are ignored (Envoy's panic mode).

An attempt costs less than a refusal that may no longer be true. All other reasons are facts.
"""

RATE_LIMITED = "rate_limited"
"""The server, or the provider behind the key, has said when it may be asked for this model again. A fact, and before
then it is not asked."""
_GRAVER = frozenset({"draining", "credential_refused"})
"""Reasons that are given rather than a rate limit: the end of that would not help."""

TOO_LONG = "context_length"
"""The prompt and the output that is asked for do not fit. The length may be an estimate: where they fit nowhere, the
engine is left to say so."""


def exclusion_reason(request: InferenceRequest, replica: Replica, now: float, tried: Sequence[Replica]) -> str | None:
    """The first rule that excludes the replica, as a low-cardinality word; None when none does."""
    if request.regions and replica.region not in request.regions:
        return "region"
    adapter = request.adapter
    if adapter is not None and (replica.adapters is None or adapter not in replica.adapters):
        reason = obstacle(adapter, replica, now)
        if reason is not None:
            return reason if reason != NO_SLOT else _behind_adapters(replica, now, tried)
    if replica in tried:
        return "already_tried"
    reason = replica.unavailable_reason(now)
    if now < replica.paused_until and reason not in _GRAVER and replica.limited_until(request.model, now):
        return RATE_LIMITED
    if reason is None and replica.context_tokens is not None and not fits(request, replica):
        return TOO_LONG
    return reason


def fits(request: InferenceRequest, replica: Replica) -> bool:
    """Whether prompt and output fit into the replica's context, as far as both are known."""
    most = replica.context_tokens
    return most is None or request.prompt_tokens + (request.max_output_tokens or 0) <= most


def _behind_adapters(replica: Replica, now: float, tried: Sequence[Replica]) -> str:
    """Why a replica that has no slot for the adapter is excluded: what keeps it out even with one comes first."""
    if replica in tried:
        return "already_tried"
    reason = replica.unavailable_reason(now)
    return NO_SLOT if reason is None or (reason == "full" and not replica.at_limit) else reason
