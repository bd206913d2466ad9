"""What a client is told whom the gate turns away, but for limits (`gateway.limits.errors`)."""

from __future__ import annotations

import random

from gateway.errors import GatewayError, NoReplicaAvailable
from gateway.record import Outcome
from gateway.starting.prospects import Prospect
from gateway.store.places import Entry

_REASONS = {
    "tenant_full": "Too many requests of this tenant are waiting already.",
    "pool_full": "Too many requests are waiting already.",
    "too_late": "The request could not be served in time.",
    "left": "The request was withdrawn.",
}


class QueueFull(GatewayError):
    """Turned away at once: with 429 where the tenant's own waiting requests are the reason, else with 503."""

    status = 503
    code = "overloaded"
    outcome = Outcome.UNAVAILABLE

    def __init__(self, entry: Entry) -> None:
        wait_s = entry.wait_us / 1e6
        predicted = f" The predicted wait is {wait_s:.1f} s." if entry.wait_us else ""
        super().__init__(_REASONS.get(entry.reason, "There is no room.") + predicted, retry_after_s=max(1.0, wait_s))
        if entry.reason == "tenant_full":
            self.status = 429
            self.code = "queue_full"
            self.type = "requests"


class Starting(NoReplicaAvailable):
    """Its pool has no replica yet, and it may not, or need not, wait for the first one."""

    code = "model_starting"

    def __init__(self, prospect: Prospect, waited_s: float | None = None, *, others_first: bool = False) -> None:
        """`waited_s`: how long it has waited; None: not at all. When to come back is up to a fifth later than the
        replica is expected, so that not all come at once. `others_first`: it may wait when nobody else can answer."""
        self.others_first = others_first
        waited = "" if waited_s is None else f", and none was ready within {waited_s:.1f} s"
        super().__init__(
            f"The model has no replica yet{waited}: {prospect.said}.",
            retry_after_s=prospect.left_s * random.uniform(1.0, 1.2),
        )


class PriceUnknown(GatewayError):
    """Somebody has a budget, and the model has no price: letting it through would not be counting."""

    status = 403
    type = "request_forbidden"
    code = "model_without_price"
    outcome = Outcome.REJECTED


class QueueTimeout(GatewayError):
    """Waited as long as its deadline allows."""

    status = 503
    code = "queue_timeout"
    outcome = Outcome.UNAVAILABLE

    def __init__(self, waited_s: float) -> None:
        super().__init__(f"No place became free within {waited_s:.1f} s.", retry_after_s=1.0)
