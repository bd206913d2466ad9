"""What a worker tells the process that answers operators, once in a while: its counters and its state at a glance.

Made from what is counted for `/metrics` anyway, and small: counts are cumulative, so that an answer that gets lost
costs nothing, and who reads them takes differences. With 200 replicas it takes less than a millisecond to make.
"""

from __future__ import annotations

import msgspec

MAX_MODELS = 64
"""Told of by name, those that were asked for first; the others are added up."""
OTHER_MODELS = "other"


class ModelPulse(msgspec.Struct, array_like=True, gc=False):
    """One model since the start of its worker."""

    requests: int = 0
    failed: int = 0
    """Of these, the ones that count against the objective (`FAILED`)."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    own_usd: float = 0.0
    rented_usd: float = 0.0
    ttft_s: float = 0.0
    """Seconds, added up."""
    ttft: list[int] = []
    """Requests by their time to first content: up to each of `gateway.metrics.TTFT_FINE_S`, and above the last."""
    duration: list[int] = []
    """The same from end to end, with `DURATION_FINE_S`; without those that were refused before a replica was asked."""
    told_prompt_tokens: int = 0
    """Prompt tokens of the requests whose engine said how many were cached."""


class ReplicaPulse(msgspec.Struct, array_like=True, gc=False):
    """One replica as this worker sees it."""

    name: str
    region: str | None
    state: str
    """Of its health (`routing.evidence.HealthState`)."""
    reason: str
    """Why it gets no new work; empty: it does. One that refuses connections is tried again from time to time, and is
    `cooling_down` in between as well: until it answers."""
    in_flight: int
    unanswered: int
    """Attempts that it did not answer, since the start of the worker."""
    streams: int = 0
    streams_log_s: float = 0.0
    """ln(seconds to first content), added up."""
    wholes: int = 0
    wholes_log_s: float = 0.0
    waiting: int = 0
    """Streams that wait for their first content now; one of several hundred requests at most."""
    oldest_s: float = 0.0
    """How long the oldest of these has waited since it was sent."""


class PoolPulse(msgspec.Struct, array_like=True, gc=False):
    """One pool as this worker sees it."""

    name: str
    replicas: list[ReplicaPulse]
    waiting: int
    """Requests in line for it."""
    retries_refused: int
    """Since the start: failed attempts that were not followed by another, because the budget of retries was spent."""
    retries: int


class SpentBudget(msgspec.Struct, array_like=True, gc=False):
    """A budget that has refused requests in the last minutes."""

    scope: str
    """The store's name of it: `{t:<tenant>}:t`, `{t:<tenant>}:k:<key>`."""
    label: str
    """What clients are told it is."""
    limit: str
    last_unix_s: float
    refused: int


class RentedCeiling(msgspec.Struct, array_like=True, gc=False):
    """What may be spent on rented replicas for one model, and what is, in dollars; this gateway's part of both."""

    model: str
    window: str
    """`hour` or `day`."""
    used_usd: float
    ceiling_usd: float


class Pulse(msgspec.Struct, gc=False, omit_defaults=True):
    """One worker, at one moment. Counts are since its start."""

    worker: int
    pid: int
    started_unix_s: float
    requests: dict[str, int] = {}
    """Settled ones by outcome."""
    refused: dict[str, int] = {}
    """Those of nobody known, by HTTP status."""
    models: dict[str, ModelPulse] = {}
    pools: list[PoolPulse] = []
    in_flight: int = 0
    draining: bool = False
    queue: dict[str, int] = {}
    """Requests in line now, by class."""
    sheds: dict[str, int] = {}
    """By what was short."""
    overload_level: int = 0
    overload_cause: str = ""
    loop_lag_s: float = 0.0
    limits: dict[str, int] = {}
    """Requests refused by a limit that is enforced: `tenant tokens_per_minute`."""
    turned_away: dict[str, int] = {}
    """By the queue, by reason."""
    spilled: int = 0
    spent: list[SpentBudget] = []
    ceilings: list[RentedCeiling] = []
    store_mode: str = "memory"
    store_mode_s: float = 0.0
    """How long it has been that."""
    keys_age_s: float | None = None
    """Since the keys were read from the database; None where they never were, or there are none."""
    keys_wanted: bool = False
    """Keys of a database are used here."""
    spend_failing: bool = False
    """What requests cost cannot be put on record at the moment."""
    lost: dict[str, float] = {}
    """What will never be known: usage records, settlements, dollars of spend, spans."""
    reload_refused: bool = False
    """The last configuration read could not be used."""
