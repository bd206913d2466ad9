"""What a client is told when something goes wrong.

    GatewayError              status, type, code, param, retry hints: all a reply needs
    ├── InvalidRequest        400  the body or a parameter cannot be used
    │   └── BodyTooLarge      413
    ├── ModelNotFound         404
    ├── RouteNotFound         404, MethodNotAllowed 405
    ├── NoReplicaAvailable    503  every replica is excluded; each reason is in the message
    ├── UpstreamFailed        502  the model server could not be reached or broke the protocol
    ├── UpstreamOverloaded    503  the model server said so itself
    ├── UpstreamTimeout       504
    ├── StreamInterrupted     in-band: after content went out
    ├── Overloaded            503  this gateway's own ceilings
    ├── Draining              503  this gateway is shutting down
    ├── EndedByOperator       503
    └── InternalError         500

The JSON shape is OpenAI's, with all four keys (`message`, `type`, `param`, `code`) always present. A client that
leaves is not an error and has no class here.
"""

from __future__ import annotations

import math
import random

import msgspec

from gateway.record import Outcome


class GatewayError(Exception):
    """An answer other than success, whole: enough to write the reply and to settle the record."""

    status = 500
    type = "server_error"
    code: str | None = None
    outcome = Outcome.INTERNAL
    should_retry: bool | None = None
    """Sent as `x-should-retry`, which the OpenAI SDK obeys; None leaves the SDK to its own rule."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The reply body, as JSON."""
        return error_body(self.message, self.type, self.param, self.code)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Retry hints, in both spellings that OpenAI's SDK reads (`retry-after-ms` first)."""
        found: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            wait_s = self.retry_after_s
            if wait_s == 1.0 and self.status >= 500:
                wait_s += random.random()  # what is said when nobody knows better; not all should come back together
            # Rounded up: whoever comes back at that time is not early.
            found.append((b"retry-after", b"%d" % max(1, math.ceil(wait_s))))
            found.append((b"retry-after-ms", b"%d" % max(1, math.ceil(wait_s * 1000))))
        if self.should_retry is not None:
            found.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return found


def let_go(error: BaseException) -> None:
    """Have a handled error forget where it was raised, and so whatever the frames there hold: the request, for one.

    What keeps the error (an attempt's story, a verdict) is in one of those frames, so that only the garbage collector
    would free any of it; that counts objects and not their size.
    """
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            waiting += (each.__cause__, each.__context__)


def error_body(message: str, type_: str, param: str | None, code: str | None) -> bytes:
    """OpenAI's error object."""
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code}})


def error_event(error: GatewayError, request_id: str) -> bytes:
    """The same error as one SSE event. The stock SDK raises on any `data` with a truthy top-level `error`."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }
    return b"data: " + msgspec.json.encode({"error": fields}) + b"\n\n"


class InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    outcome = Outcome.REJECTED


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    status = 404
    code = "unknown_url"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(InvalidRequest):
    """The client took too long to send its request."""

    status = 408
    type = "timeout"
    code = "request_timeout"


class NoReplicaAvailable(GatewayError):
    status = 503
    code = "no_replica_available"
    outcome = Outcome.UNAVAILABLE


class UpstreamFailed(GatewayError):
    status = 502
    code = "upstream_failed"
    outcome = Outcome.UPSTREAM_ERROR


class UpstreamOverloaded(GatewayError):
    status = 503
    code = "upstream_overloaded"
    outcome = Outcome.UPSTREAM_ERROR


class UpstreamTimeout(GatewayError):
    status = 504
    type = "timeout"
    code = "upstream_timeout"
    outcome = Outcome.TIMEOUT


class StreamInterrupted(GatewayError):
    """A stream that ended before every choice had finished; only ever sent as an event."""

    status = 502
    code = "upstream_disconnected"
    outcome = Outcome.UPSTREAM_INTERRUPTED


class Overloaded(GatewayError):
    status = 503
    code = "overloaded"
    outcome = Outcome.UNAVAILABLE


class Draining(GatewayError):
    status = 503
    code = "gateway_draining"
    outcome = Outcome.DRAINED


class EndedByOperator(GatewayError):
    """An operator has ended this very request; it is not to be sent again by itself."""

    status = 503
    code = "ended_by_operator"
    outcome = Outcome.ENDED_BY_OPERATOR
    should_retry = False


class InternalError(GatewayError):
    outcome = Outcome.INTERNAL
    code = "internal_error"
