"""Hard rules: why a replica must not be considered for a request, whatever its score would be."""

from __future__ import annotations

from collections.abc import Sequence

from routing.types import InferenceRequest, Replica


def exclusion_reason(request: InferenceRequest, replica: Replica, now: float, tried: Sequence[Replica]) -> str | None:
    """The first rule that excludes the replica, as a low-cardinality word; None when none does."""
    if request.regions and replica.region not in request.regions:
        return "region"
    if replica in tried:
        return "already_tried"
    return replica.unavailable_reason(now)
