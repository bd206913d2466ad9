"""What the failed end of an attempt means: for the client, for the replica, and for another attempt.

One rule runs through it: a request may go elsewhere as long as the client has seen nothing of an answer and nobody
can have been billed for one. What may have been worked on goes elsewhere once only, since a request that kills
engines must not be carried through the whole fleet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from backends.dialects.protocol import Fault
from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    ConsumerFailed,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    UpstreamError,
)
from backends.side import SideChannelError, Trouble
from backends.upstream import Upstream
from gateway.bounds import BOUNDING_FIELDS
from gateway.errors import Draining, GatewayError, UpstreamFailed, UpstreamTimeout
from gateway.relay import UpstreamReply
from gateway.upstream_errors import UpstreamSaid, UpstreamStalled, error_of, from_connection, from_status
from routing.health import Evidence

_ESSENTIAL = frozenset({"model", "stream", "lora", "lora_request", "routed_dp_rank"}) | BOUNDING_FIELDS
"""Without these another answer would come: from another model or rank, with the adapters of the command line, or longer
than what was reserved for it, which hard limits rely on. An engine that refuses one is right to."""


class Again(StrEnum):
    """Whether a request may be sent once more."""

    NEVER = "never"
    ANYWHERE = "anywhere"
    """To any replica, the same one too: the kept-alive connection was stale."""
    UNCOUNTED = "uncounted"
    """Elsewhere, and it does not count as an attempt: the replica was not even there."""
    SAFELY = "safely"
    """Elsewhere: the replica said that it does not do it."""
    ONCE = "once"
    """Elsewhere, but only one time in a request's life: it may have been worked on."""


class Verdict(msgspec.Struct, frozen=True):
    """How a failed attempt is taken."""

    error: GatewayError
    """What the client gets if this was the last attempt."""
    evidence: Evidence | None
    """What it says about the replica; None: nothing."""
    again: Again
    cause: UpstreamError | SideChannelError | None = None
    """What happened on the connection, for the log: it names the address."""
    answered: bool = False
    """The failure was the server's answer. Then it may be the request's doing."""
    credential_refused: int = 0
    """The status by which our key was refused; 0 when it was not."""


def of_connection(error: UpstreamError, hosted: bool) -> Verdict:
    """For a connection that failed before anything was shown to the client."""
    shown = from_connection(error)
    if isinstance(error, ConsumerFailed):  # a defect of ours, met while the answer came
        return Verdict(shown, None, Again.NEVER if hosted else Again.ONCE, error)
    if error.fault == "gateway":  # our own ceiling on connections
        return Verdict(shown, None, Again.SAFELY, error)
    if isinstance(error, Disconnected) and error.retry_safe:
        return Verdict(shown, None, Again.ANYWHERE, error)
    if isinstance(error, ConnectTimeout):
        return Verdict(shown, Evidence.UNREACHABLE, Again.SAFELY, error)
    if isinstance(error, ConnectFailed):
        return Verdict(shown, Evidence.UNREACHABLE, Again.UNCOUNTED, error)
    if isinstance(error, HeadTimeout | IdleTimeout):
        # Slowness may be a long prefill; and the client has waited for long enough.
        return Verdict(shown, Evidence.STALLED, Again.NEVER, error)
    return Verdict(shown, Evidence.FAILED, Again.NEVER if hosted else Again.ONCE, error)


def of_question(error: SideChannelError) -> Verdict:
    """For an engine that did not answer what had to be known before the request could be put to it."""
    shown = UpstreamFailed("The model server could not be asked what it holds.", code="upstream_unreachable")
    if error.trouble is Trouble.REFUSED:
        return Verdict(shown, Evidence.UNREACHABLE, Again.UNCOUNTED, error)
    return Verdict(
        shown, Evidence.STALLED if error.trouble is Trouble.TIMEOUT else Evidence.FAILED, Again.SAFELY, error
    )


def of_reply(reply: UpstreamReply, upstream: Upstream) -> Verdict:
    """For an answer with any status but 200."""
    fields = error_of(reply.body)
    fault = upstream.dialect.judge_error(reply.status, fields)
    error = from_status(reply.status, reply.headers, fields, fault, time.time())
    return _of_fault(error, fault, reply.status)


def of_relay(error: GatewayError, upstream: Upstream) -> Verdict:
    """For what the relay found in the answer itself: an error sent as an event, an end too early, silence."""
    if isinstance(error, UpstreamSaid):
        fault = upstream.dialect.judge_error(error.upstream_status, error.fields)
        shown = from_status(error.upstream_status, [], error.fields, fault, 0.0)
        return _of_fault(shown, fault, error.upstream_status)
    if isinstance(error, UpstreamStalled):
        return Verdict(error, Evidence.STALLED, Again.NEVER)
    if isinstance(error, UpstreamTimeout | Draining):  # the request's own time, the gateway's own end
        return Verdict(error, None, Again.NEVER)
    return Verdict(error, Evidence.FAILED, Again.NEVER if upstream.hosted else Again.ONCE)


def _of_fault(error: GatewayError, fault: Fault, status: int) -> Verdict:
    match fault:
        case Fault.REQUEST:
            return Verdict(error, Evidence.REJECTED, Again.NEVER)
        case Fault.OVERLOAD:
            return Verdict(error, Evidence.OVERLOADED, Again.SAFELY)
        case Fault.CREDENTIAL:
            return Verdict(error, Evidence.REJECTED, Again.SAFELY, credential_refused=status)
    # It answered with a failure, so that nothing was billed; but it may be this very request that makes it fail.
    return Verdict(error, Evidence.FAILED, Again.ONCE, answered=True)


def refused_field(reply: UpstreamReply | None, values: Mapping[str, bytes], asked: Mapping[str, Any]) -> str | None:
    """The field that the gateway added and this server does not know, if that is why it refused.

    Strict servers answer 400 or 422 and name the field. What the caller sent itself is the caller's to correct.
    """
    if reply is None or reply.status not in (400, 422):
        return None
    said = reply.body[:4096]
    for name in values:
        if name not in asked and name not in _ESSENTIAL and name.encode() in said:
            return name
    return None
