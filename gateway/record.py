"""The one mutable record of an exchange, and the enum of how it ended.

The exchange function fills it while the request runs; metrics, the usage log and the admin API read it afterwards.
Times are `time.monotonic()` seconds; `started_at` is also kept as wall-clock time for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from backends.usage import Usage
from gateway.config import Price
from gateway.telemetry.context import TraceContext


class Outcome(StrEnum):
    """How an exchange ended: exactly one per request, few values, used as a metric label."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    """Tidegate refused it: bad body, unknown model, too large. The client's fault."""
    UPSTREAM_REJECTED = "upstream_rejected"
    """The model server refused it with a 4xx."""
    UPSTREAM_ERROR = "upstream_error"
    """The model server failed before any content reached the client."""
    UPSTREAM_INTERRUPTED = "upstream_interrupted"
    """The model server's stream broke or stopped short after content had been sent."""
    UNAVAILABLE = "unavailable"
    """No replica could take it."""
    TIMEOUT = "timeout"
    CLIENT_LEFT = "client_left"
    """The client disconnected first. Not an error, and no mark against the replica."""
    DRAINED = "drained"
    """Ended by this gateway's own shutdown."""
    ENDED_BY_OPERATOR = "ended_by_operator"
    """An operator ended it: nobody's fault."""
    INTERNAL = "internal"
    """A defect of Tidegate."""


OUTRUN = "outrun"
"""Code of the attempt that lost the race of a hedged request."""
LEFT = "client_left"
"""Code of the attempt that was under way when the client went."""


class Attempt(msgspec.Struct, gc=False):
    """One replica asked for one request; times are `time.monotonic()` seconds."""

    pool: str
    replica: str
    reason: str
    """Why it was chosen: that of the decision."""
    begun_at: float
    """The time for which was decided."""
    span_id: int = 0
    """64 random bits where the request is traced; 0: it is not."""
    connected_at: float | None = None
    """When it had a connection."""
    sent_at: float | None = None
    """When its bytes were written; of those that had to be sent again, the last time."""
    first_content_at: float | None = None
    """When its first content event came. None too of an answer that came whole."""
    ended_at: float | None = None
    """None: it is under way."""
    code: str = ""
    """Of the error that ended it, as the client would have got it; or `OUTRUN`, or `LEFT`. Empty: it answered, or is
    under way."""


class Exchange(msgspec.Struct, gc=False):
    """Everything that is known about one request, from its first byte to its settlement."""

    request_id: str
    route: str
    started_at: float
    started_unix_s: float
    read_at: float = 0.0
    """When its last byte had come."""
    model: str = ""
    stream: bool = False
    request_bytes: int = 0
    response_bytes: int = 0
    pool: str = ""
    replica: str = ""
    region: str | None = None
    route_reason: str = ""
    spill: str = ""
    """Why it went to rented replicas instead of the model's own; empty: it did not (`gateway.spill`)."""
    fallback_from: str = ""
    """The model that was asked for, where a fallback of it was tried last (`gateway.fallback`); empty: none was."""
    predicted_cached_tokens: int = 0
    """Prompt tokens that the chosen replica was believed to hold."""
    predicted_ttft_ms: float | None = None
    """From dispatch to first token, as the policy predicted it; None where it predicts nothing."""
    attempts: int = 0
    tries: tuple[Attempt, ...] = ()
    """The attempts, in the order of their beginning."""
    continuations: int = 0
    """How often the answer broke off and another replica went on with it."""
    hedged: bool = False
    """A second replica was asked because the first was slow."""
    possible_duplicate: bool = False
    """A rented replica may have billed an answer that never came; another was asked all the same."""
    status: int = 0
    """HTTP status sent to the client; 0 when it left before one was sent."""
    outcome: Outcome | None = None
    error_code: str | None = None
    dispatched_at: float | None = None
    """When the last attempt's bytes were written to its replica."""
    first_content_at: float | None = None
    finished_at: float | None = None
    usage: Usage | None = None
    content_events: int = 0
    """Content events relayed; stands in for output tokens when the stream ended before its usage came."""
    content_bytes: int = 0
    """About the bytes of text in them."""
    price: Price | None = None
    tenant: str = ""
    key_id: str = ""
    """Empty where there are no keys."""
    priority_class: str = ""
    queued_at: float | None = None
    """When it began to stand in line, the last time; None: it never did."""
    queue_s: float = 0.0
    """Seconds in line for a place."""
    queue_position: int = 0
    predicted_wait_s: float = 0.0
    admission_headers: Sequence[tuple[bytes, bytes]] = ()
    """What the reply says of limits and the queue."""
    max_tokens_set: int | None = None
    """What the gateway has the engine bound the output to, where a hard limit needs that and the caller gave none."""
    usage_estimated: bool = False
    """No usage was reported; `usage` is what was relayed and estimated."""
    cost_usd: float | None = None
    """None where the configuration gives no price, or no usage was reported."""
    traced: TraceContext | None = None
    """None where no traces are sent."""

    @property
    def failures(self) -> list[Attempt]:
        """The attempts that brought no answer, or not all of one, in the order of their failing.

        One that was cut because the client had left is none of them.
        """
        failed = [each for each in self.tries if each.code and each.code != LEFT]
        if len(failed) > 1:
            failed.sort(key=lambda each: each.ended_at or each.begun_at)
        return failed

    @property
    def duration_s(self) -> float:
        return (self.finished_at or self.started_at) - self.started_at

    @property
    def ttft_s(self) -> float | None:
        """Time to first content event, measured at the gateway; None when none came."""
        return None if self.first_content_at is None else self.first_content_at - self.started_at

    @property
    def replica_ttft_s(self) -> float | None:
        """The part of it since the last attempt was sent: what `predicted_ttft_ms` predicts."""
        sent, came = self.dispatched_at, self.first_content_at
        return None if sent is None or came is None else came - sent


def ms(seconds: float) -> float:
    """Milliseconds for people, to the microsecond. Not negative: a third of the time that `round` takes."""
    return int(seconds * 1e6 + 0.5) / 1000
