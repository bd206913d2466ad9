"""What a client is told whose key opens nothing, or not what it asked for.

GatewayError
├── Unauthenticated      401  no key, or none that is valid now; never which of these
├── TooManyFailedKeys    429  the same, from an address that has shown too many of these
├── KeysUnavailable      503  the keys on record cannot be read, so that nobody can say
└── Forbidden            403  a valid key that may not do this
    ├── ModelNotAllowed
    ├── AdapterNotAllowed
    └── RegionNotAllowed
"""

from __future__ import annotations

from gateway.errors import GatewayError, InvalidRequest
from gateway.record import Outcome


class Unauthenticated(InvalidRequest):
    """Unknown, malformed, expired, disabled and revoked keys all get this one, word for word."""

    status = 401
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class TooManyFailedKeys(InvalidRequest):
    status = 429
    code = "too_many_failed_keys"
    should_retry = False


class KeysUnavailable(GatewayError):
    status = 503
    code = "keys_unavailable"
    outcome = Outcome.UNAVAILABLE


class Forbidden(GatewayError):
    status = 403
    type = "request_forbidden"
    outcome = Outcome.REJECTED


class ModelNotAllowed(Forbidden):
    code = "model_not_allowed"


class AdapterNotAllowed(Forbidden):
    code = "adapter_not_allowed"


class RegionNotAllowed(Forbidden):
    code = "data_residency_mismatch"
