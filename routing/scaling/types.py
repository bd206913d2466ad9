"""What the autoscaler is told, what it is to keep to, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

ARRIVALS = "arrivals"
"""What is asked for now."""
TREND = "trend"
"""What will be asked for when a replica that is ordered now is ready."""
QUEUE = "queue"
"""What waits already."""
TTFT = "ttft"
"""The first token comes late."""
KV = "kv"
"""The KV cache fills up."""
FROM_ZERO = "from_zero"
"""Somebody asks, and nobody is there."""
REPLACE = "replace"
"""Some replicas are there and do not answer."""
UNKNOWN = "unknown"
"""Too little is known to take anything away."""
SPILL = "spill"
"""What is rented, beside what a replica costs. Never wants anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one pool is asked for and does, all workers of all gateways together, over the last period.

    Replicas that are draining are in none of the counts.
    """

    at_s: float
    """When it was so, on the clock of `now`."""
    arrivals_per_s: float
    """Requests that came, also those that waited, were refused for want of room, or were sent to rented replicas."""
    arrival_tokens_per_s: float = 0.0
    """Prompt and expected output tokens of these. 0: unknown; then requests are the unit."""
    in_flight: int = 0
    """Requests that replicas of the pool have, also those that wait inside an engine."""
    waiting: int = 0
    """Requests that wait in gateways."""
    queue_wait_p90_s: float | None = None
    """Of requests that left gateways' queues, and of those that wait. None: none seen."""
    ttft_p90_ms: float | None = None
    """Of requests that had their first token, waiting included. None: none seen."""
    predicted_ttft_ms: float | None = None
    """What the next request may expect, waiting included. None: unknown."""
    kv_use: float | None = None
    """Part of the KV cache in use by running requests, 0 to 1, mean over the replicas. None: unknown."""
    replicas_ready: int = 0
    """That take requests."""
    replicas_starting: int = 0
    """That were ordered and are on their way."""
    replicas_unhealthy: int = 0
    """That are there and take no requests."""
    capacity_requests: float | None = None
    """What one replica that is ready can run at once, by its engine. None: unknown."""
    tokens_per_s: float = 0.0
    """Prompt and output tokens served by the pool's own replicas, as `arrival_tokens_per_s`. 0: none, or unknown."""
    served_per_s: float = 0.0
    """Requests answered by the pool's own replicas."""
    spilled_per_s: float = 0.0
    """Requests of `arrivals_per_s` that went to rented replicas."""
    spill_usd_per_hour: float = 0.0
    """What these cost at this pace."""
    complete: bool = True
    """False: not everybody who should have told something did, so there may be more. Then nothing is taken away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings of `scaling`, by the same names; see docs/configuration.md. Raises `ValueError` where they
    contradict each other."""

    max: int
    min: int = 1
    ttft_target_ms: float = 2000.0
    target_use: float = 0.7
    target_kv: float = 0.85
    tolerance: float = 0.1
    lead_time_s: float = 300.0
    up_cool_down_s: float = 0.0
    down_after_s: float = 600.0
    up_step: float = 1.0
    down_step: float = 0.25
    drain_s: float = 600.0
    usd_per_hour: float = 0.0
    max_usd_per_hour: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError(f"min {self.min} and max {self.max} must be 0 <= min <= max, and max at least 1")
        if self.ceiling < self.min:
            raise ValueError(
                f"max_usd_per_hour {self.max_usd_per_hour} does not pay for the {self.min} replicas of min"
                f" at {self.usd_per_hour} USD an hour"
            )

    @property
    def ceiling(self) -> int:
        """The most replicas that `max` and the money allow."""
        if self.max_usd_per_hour is None or not self.usd_per_hour:
            return self.max
        return min(self.max, int(self.max_usd_per_hour / self.usd_per_hour + 1e-9))


@dataclass(frozen=True, slots=True)
class Reason:
    """One signal, the replicas it asks for by itself, and why in a sentence with its numbers."""

    kind: str
    """Low cardinality: one of the constants of this module."""
    wanted: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """How many replicas there should be, those that are starting or unhealthy included."""

    count: int
    current: int
    """Ready, starting and unhealthy ones."""
    reasons: tuple[Reason, ...]
    """The one that asks for most comes first."""
    limited_by: str = ""
    """What kept `count` from what the reasons ask for: "floor", "ceiling", "budget", "up_step", "up_cool_down",
    "tolerance", "down_after", "down_step", "unknown"; empty: nothing."""
    forecast: float = 0.0
    """Requests a second that are foreseen for when a replica ordered now is ready; never fewer than there are."""
    lead_time_s: float = 0.0
    """From an order to a replica that is ready, as far as is known."""
    usd_per_hour: float = 0.0
    """What `count` replicas cost."""
