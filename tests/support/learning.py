"""A scaler that has learned what a replica serves, and how it tells so."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from gateway.scaling.memory import Taken
from routing.scaling import Demand, Learned, Rules, Scaler

SERVES = "a replica serves 2.2"
"""What `taught` has learned: 100 at once for 45 s each."""


def taught(kind: str, *, seconds: int = 3600) -> Learned:
    """Of replicas in which a request takes 5 s and 0.4 more for each beside it."""
    scaler = Scaler(Rules(max=4), kind)
    for at in range(0, seconds, 5):
        each = 40.0 if at < seconds / 2 else 80.0
        per_s = each / (5.0 + 0.4 * each)
        seen = Demand(
            at_s=float(at),
            arrivals_per_s=per_s,
            served_per_s=per_s,
            in_flight=round(each),
            replicas_ready=1,
            capacity_requests=100.0,
        )
        scaler.decide(seen, float(at))
    return scaler.learned(float(seconds))


def taken(learned: Learned, *, by: str = "", ago_s: float = 5.0, **more: Any) -> bytes:
    return msgspec.json.encode(Taken(by, time.time() - ago_s, learned, **more))
