"""Translates what model servers say when they refuse or fail into what the client is told.

One place for three dialects of error body: OpenAI's nested object, SGLang's flat one, and anything else. Messages are
cleaned of file paths, which engines' validation errors leak. A refusal of *our* credential is never shown as the
client's: an upstream 401 or 403 becomes a 502.
"""

from __future__ import annotations

import email.utils
import re
from typing import Any

import orjson

from backends.errors import ConnectFailed, HeadTimeout, IdleTimeout, PoolTimeout, UpstreamError
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamTimeout,
)
from gateway.record import Outcome

MAX_RETRY_AFTER_S = 300.0
_LINK_OR_PATH = re.compile(r"(https?://\S+)|(?:/[\w.@+-]+){3,}(?::\d+)?")
_MAX_MESSAGE = 2000


class UpstreamRejected(InvalidRequest):
    """The model server found fault with the request; its status is passed on."""

    outcome = Outcome.UPSTREAM_REJECTED

    def __init__(self, status: int, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status


def from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes, now_unix_s: float) -> GatewayError:
    """The error for a reply of any status but 200 (redirects are not followed: they count as failures)."""
    return _from_fields(status, headers, _error_fields(body), now_unix_s)


def _from_fields(
    status: int, headers: list[tuple[bytes, bytes]], fields: dict[str, Any], now_unix_s: float
) -> GatewayError:
    said = fields.get("message")
    message = (clean(said) if isinstance(said, str) else "") or f"The model server answered {status}."
    retry_after_s = parse_retry_after(headers, now_unix_s)
    code = fields.get("code")
    code = code if isinstance(code, str) else None
    if status in (401, 403, 407):
        return UpstreamFailed("The model server refused the gateway's own credential.", code="upstream_auth_failed")
    if status == 429:
        limited = UpstreamOverloaded(message, code=code or "rate_limit_exceeded", retry_after_s=retry_after_s or 1.0)
        limited.status = 429
        limited.type = "requests"
        return limited
    if status in (503, 529):
        return UpstreamOverloaded(message, retry_after_s=retry_after_s or 1.0)
    if status in (408, 504):
        return UpstreamTimeout(message)
    if 400 <= status < 500:
        param = fields.get("param")
        return UpstreamRejected(status, message, code=code, param=param if isinstance(param, str) else None)
    return UpstreamFailed(message, code="upstream_error")


def from_stream_event(error: dict[str, Any]) -> GatewayError:
    """The error for one sent as an event of a stream; a numeric `code` is read as a status (SGLang's 503)."""
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return _from_fields(status, [], error, 0.0)


def from_connection(error: UpstreamError) -> GatewayError:
    """The error for a connection that failed before anything was shown to the client, and may not be tried again."""
    if isinstance(error, PoolTimeout):
        return Overloaded("Every connection to the model server is busy.", retry_after_s=1.0)
    if isinstance(error, HeadTimeout | IdleTimeout):
        return UpstreamTimeout("The model server did not answer in time.")
    if isinstance(error, ConnectFailed):
        return UpstreamFailed("The model server could not be reached.", code="upstream_unreachable")
    return UpstreamFailed("The connection to the model server broke.", code="upstream_disconnected")


def clean(message: str) -> str:
    """The message without file paths, and not longer than a client can use. Links to documentation are kept."""
    # Cut first as well: an engine may quote the whole prompt, and megabytes of it would hold the loop for seconds.
    return _LINK_OR_PATH.sub(lambda found: found[1] or "<path>", message[: 4 * _MAX_MESSAGE])[:_MAX_MESSAGE]


def parse_retry_after(headers: list[tuple[bytes, bytes]], now_unix_s: float) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date); None when absent or unusable."""
    found = dict(headers)
    for name, scale in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        value = found.get(name, b"").decode("latin-1").strip()
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - now_unix_s
            except (ValueError, TypeError):
                continue
        if 0 < seconds < float("inf"):
            return min(seconds, MAX_RETRY_AFTER_S)
    return None


def _error_fields(body: bytes) -> dict[str, Any]:
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(tree, dict):
        return {}
    nested = tree.get("error")
    if isinstance(nested, dict):
        return nested
    if isinstance(nested, str):
        return {"message": nested}
    if isinstance(tree.get("detail"), str):
        return {"message": tree["detail"]}
    return tree
