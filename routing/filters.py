"""Hard rules: why a replica must not be considered for a request, whatever its score would be."""

from __future__ import annotations

from collections.abc import Sequence

from routing.types import InferenceRequest, Replica

SOFT = frozenset({"cooling_down", "ejected", "half_open", "not_ready", "unresponsive", "stalled"})
"""Reasons that are suspicions: when no candidate is left without one, they are ignored (Envoy's panic mode).

An attempt costs less than a refusal that may no longer be true. All other reasons are facts.
"""


def exclusion_reason(request: InferenceRequest, replica: Replica, now: float, tried: Sequence[Replica]) -> str | None:
    """The first rule that excludes the replica, as a low-cardinality word; None when none does."""
    if request.regions and replica.region not in request.regions:
        return "region"
    if request.adapter is not None and (replica.adapters is None or request.adapter not in replica.adapters):
        return "adapter"  # unknown is no: SGLang answers for adapters it does not have, from its base model
    if replica in tried:
        return "already_tried"
    return replica.unavailable_reason(now)
