"""What the failed end of an attempt means: for the client, for the replica, and for another attempt.

One rule runs through it: a request may go elsewhere as long as the client has seen nothing of an answer. What may have
been worked on goes elsewhere once only, since a request that kills engines must not be carried through the whole
fleet, and a rented one may bill each time: then the verdict says so.
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
from gateway.errors import Draining, EndedByOperator, GatewayError, UpstreamFailed, UpstreamTimeout
from gateway.leg import UpstreamReply
from gateway.upstream_errors import (
    UpstreamSaid,
    UpstreamStalled,
    error_of,
    from_connection,
    from_status,
    parse_retry_after,
)
from routing.health import Evidence

_ESSENTIAL = frozenset({"model", "stream", "lora", "lora_request", "routed_dp_rank", "cache_salt"}) | BOUNDING_FIELDS
"""Without these another answer would come: from another model or rank, with the adapters of the command line, longer
than what was reserved for it, which hard limits rely on, or from a cache that tenants share. An engine that refuses one
is right to."""


FIRST_TOKEN_TIMEOUT = "first_token_timeout"
_KEY_LIMITS = frozenset({402, 429})
"""Statuses that speak of what one account may do; 402 where an API says it of a budget that is only used up for now."""


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
    may_be_billed: bool = False
    """A rented server had the request and gave no answer: if it is sent once more, it may be paid for twice."""
    pause_s: float | None = None
    """How long the server has asked to be left alone (`Retry-After`, 0 to 300 s); None where it names no time."""
    limits_key: bool = False
    """It is a rate limit, which is the key's rather than the server's."""


def of_connection(error: UpstreamError, hosted: bool) -> Verdict:
    """For a connection that failed before anything was shown to the client."""
    shown = from_connection(error)
    if isinstance(error, ConsumerFailed):  # a defect of ours, met while the answer came
        return Verdict(shown, None, Again.ONCE, error, may_be_billed=hosted and error.sent)
    if error.fault == "gateway":  # our own ceiling on connections
        return Verdict(shown, None, Again.SAFELY, error)
    if isinstance(error, Disconnected) and error.retry_safe:
        return Verdict(shown, None, Again.ANYWHERE, error)
    if isinstance(error, ConnectTimeout):
        return Verdict(shown, Evidence.UNREACHABLE, Again.SAFELY, error)
    if isinstance(error, ConnectFailed):
        return Verdict(shown, Evidence.UNREACHABLE, Again.UNCOUNTED, error)
    evidence = Evidence.STALLED if isinstance(error, HeadTimeout | IdleTimeout) else Evidence.FAILED
    return Verdict(shown, evidence, Again.ONCE, error, may_be_billed=hosted and error.sent)


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
    fields = upstream.hidden(error_of(reply.body))
    fault = upstream.dialect.judge_error(reply.status, fields)
    now_unix_s = time.time()
    error = from_status(reply.status, reply.headers, fields, fault, now_unix_s)
    pause_s = None
    if fault is Fault.OVERLOAD or (fault is Fault.FAILURE and reply.status == 503):
        pause_s = parse_retry_after(reply.headers, now_unix_s)
    return _of_fault(error, fault, reply.status, pause_s)


def of_relay(error: GatewayError, upstream: Upstream) -> Verdict:
    """For what the relay found in the answer itself: an error sent as an event, an end too early, silence."""
    if isinstance(error, UpstreamSaid):
        fault = upstream.dialect.judge_error(error.upstream_status, error.fields)
        shown = from_status(error.upstream_status, [], upstream.hidden(error.fields), fault, 0.0)
        return _of_fault(shown, fault, error.upstream_status)
    if isinstance(error, UpstreamStalled):
        # A long prefill looks like this too, and the client has waited; so another one gets it once, if there is time.
        if error.code == FIRST_TOKEN_TIMEOUT:
            return Verdict(error, Evidence.STALLED, Again.ONCE, may_be_billed=upstream.hosted)
        return Verdict(error, Evidence.STALLED, Again.NEVER)
    if isinstance(error, UpstreamTimeout | Draining | EndedByOperator):  # the request's own time, our own end of it
        return Verdict(error, None, Again.NEVER)
    return Verdict(error, Evidence.FAILED, Again.ONCE, may_be_billed=upstream.hosted)


def _of_fault(error: GatewayError, fault: Fault, status: int, pause_s: float | None = None) -> Verdict:
    match fault:
        case Fault.REQUEST:
            return Verdict(error, Evidence.REJECTED, Again.NEVER)
        case Fault.OVERLOAD:
            limits_key = status in _KEY_LIMITS
            return Verdict(error, Evidence.OVERLOADED, Again.SAFELY, pause_s=pause_s, limits_key=limits_key)
        case Fault.CREDENTIAL:
            return Verdict(error, Evidence.REJECTED, Again.SAFELY, credential_refused=status)
    # It answered with a failure, so that nothing was billed; but it may be this very request that makes it fail.
    return Verdict(error, Evidence.FAILED, Again.ONCE, answered=True, pause_s=pause_s)


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
