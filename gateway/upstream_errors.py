"""Translates what model servers say when they refuse or fail into what the client is told.

Whose fault it is, the engine's dialect has judged. One place for three shapes of error body: OpenAI's nested
object, SGLang's flat one, and anything else. Messages are cleaned of file paths, which engines' validation errors
leak. A refusal of *our* credential is never shown as the client's: it becomes a 502.
"""

from __future__ import annotations

import email.utils
import re
from datetime import UTC
from typing import Any

import orjson

from backends.dialects.protocol import Fault
from backends.errors import ConnectFailed, HeadTimeout, IdleTimeout, OutOfSockets, PoolTimeout, UpstreamError
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamTimeout,
)
from gateway.overload.errors import ShortOfDescriptors
from gateway.record import Outcome
from gateway.sse import ABORTED, CUT_SHORT

MAX_RETRY_AFTER_S = 300.0
_LINK_OR_PATH = re.compile(r"(https?://\S+)|(?:/[\w.@+-]+){3,}(?::\d+)?")
_MAX_MESSAGE = 2000
_CODE = re.compile(r"[\w.:/-]{1,100}", re.ASCII)
"""It is logged as it is, and what follows a failure goes by it."""
_MAX_TIME = 64
"""Characters of a `retry-after`; the longest form of a date has 33."""


class UpstreamRejected(InvalidRequest):
    """The model server found fault with the request; its status is passed on."""

    outcome = Outcome.UPSTREAM_REJECTED

    def __init__(self, status: int, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status


class UpstreamSaid(GatewayError):
    """An error that the model server sent inside a stream, as it said it. `gateway.verdict` finds its meaning."""

    status = 502
    code = "upstream_error"
    outcome = Outcome.UPSTREAM_ERROR

    def __init__(self, status: int, fields: dict[str, Any]) -> None:
        super().__init__(_message(status, fields))
        self.upstream_status = status
        self.fields = fields


class UpstreamStalled(UpstreamTimeout):
    """The model server went silent."""


def from_status(
    status: int, headers: list[tuple[bytes, bytes]], fields: dict[str, Any], fault: Fault, now_unix_s: float
) -> GatewayError:
    """The error for a reply of any status but 200 (redirects are not followed: they count as failures).

    `fields` is its error object, see `error_of`.
    """
    message = _message(status, fields)
    retry_after_s = parse_retry_after(headers, now_unix_s)
    code = fields.get("code")
    code = code if isinstance(code, str) and _CODE.fullmatch(code) else None
    if fault is Fault.CREDENTIAL:
        # Never shown as the client's: its own key is fine.
        if status in (402, 429):
            return UpstreamFailed(
                "The gateway's account at the model server is out of funds.", code="upstream_no_funds"
            )
        return UpstreamFailed("The model server refused the gateway's own credential.", code="upstream_auth_failed")
    if fault is Fault.OVERLOAD:
        if status != 429:
            return UpstreamOverloaded(message, retry_after_s=retry_after_s or 1.0)
        limited = UpstreamOverloaded(message, code=code or "rate_limit_exceeded", retry_after_s=retry_after_s or 1.0)
        limited.status = 429
        limited.type = "requests"
        return limited
    if fault is Fault.REQUEST:
        param = fields.get("param")
        # In a stream the status may be any; what is the request's fault is a 400 then.
        status = status if 400 <= status < 500 else 400
        return UpstreamRejected(status, message, code=code, param=param if isinstance(param, str) else None)
    if status == 503:
        return UpstreamOverloaded(message, retry_after_s=retry_after_s or 1.0)
    if status in (408, 504):
        return UpstreamTimeout(message)
    return UpstreamFailed(message, code="upstream_error")


def _message(status: int, fields: dict[str, Any]) -> str:
    said = fields.get("message")
    return (clean(said) if isinstance(said, str) else "") or f"The model server answered {status}."


def from_stream_event(error: dict[str, Any]) -> UpstreamSaid:
    """The error for one sent as an event of a stream; a numeric `code` or `status` is read as one (SGLang's 503)."""
    for said in (error.get("code"), error.get("status")):
        if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) == 3:
            said = int(said)
        if type(said) is int and 400 <= said < 600:
            return UpstreamSaid(said, error)
    return UpstreamSaid(500, error)


def error_in_answer(tree: Any, body: bytes) -> UpstreamSaid | None:
    """The error in a whole answer with status 200: there is one instead of choices, or the server gave a choice up.

    OpenRouter documents the first; DeepSeek sends its status before it knows how the answer ends. `tree` is the parsed
    body, None for one that is too large to be parsed for nothing.
    """
    if tree is None:
        if b'"abort"' not in body and b"insufficient_system_resource" not in body:
            return None
        tree = _parsed(body)
    if not isinstance(tree, dict):
        return None
    choices = tree.get("choices")
    if isinstance(choices, list) and choices:
        for choice in choices:
            if isinstance(choice, dict) and str(choice.get("finish_reason")) in CUT_SHORT:
                return from_stream_event(dict(ABORTED))
        return None
    if "error" not in tree:
        return None
    fields = _error_fields(tree)
    return from_stream_event(fields) if fields.get("message") or fields.get("code") else None


def from_connection(error: UpstreamError) -> GatewayError:
    """The error for a connection that failed before anything was shown to the client, and may not be tried again."""
    if isinstance(error, PoolTimeout):
        return Overloaded("Every connection to the model server is busy.", retry_after_s=1.0)
    if isinstance(error, OutOfSockets):
        return ShortOfDescriptors("This gateway has no socket left for the model server.", retry_after_s=1.0)
    if isinstance(error, HeadTimeout | IdleTimeout):
        return UpstreamStalled("The model server did not answer in time.")
    if isinstance(error, ConnectFailed):
        return UpstreamFailed("The model server could not be reached.", code="upstream_unreachable", retry_after_s=1.0)
    return UpstreamFailed("The connection to the model server broke.", code="upstream_disconnected")


def clean(message: str) -> str:
    """The message without file paths, and not longer than a client can use. Links to documentation are kept."""
    # Cut first as well: an engine may quote the whole prompt, and megabytes of it would hold the loop for seconds.
    return _LINK_OR_PATH.sub(lambda found: found[1] or "<path>", message[: 4 * _MAX_MESSAGE])[:_MAX_MESSAGE]


def parse_retry_after(headers: list[tuple[bytes, bytes]], now_unix_s: float) -> float | None:
    """Seconds to wait, above 0 and up to 300, from `retry-after-ms` or else `retry-after` (seconds, or a date).

    None when there is none, or none that makes sense: negative, in the past, text. Of several the longest counts.
    """
    for name, scale in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        found = [_seconds(value, scale, now_unix_s) for header, value in headers if header.lower() == name]
        longest_s = max((each for each in found if each is not None), default=None)
        if longest_s is not None:
            return min(longest_s, MAX_RETRY_AFTER_S)
    return None


def _seconds(value: bytes, scale: float, now_unix_s: float) -> float | None:
    """What one header says, if that is a time to come."""
    text = value.decode("latin-1").strip()
    if not text or len(text) > _MAX_TIME or "_" in text:  # float() would take 1_000 for a number
        return None
    try:
        seconds = float(text) * scale
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
            # RFC 9110 knows no other zone than GMT; without one, Python would take this machine's.
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now_unix_s
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return seconds if 0 < seconds < float("inf") else None


def error_of(body: bytes) -> dict[str, Any]:
    """The error object in a reply's body, whichever way it is nested; empty when there is none."""
    tree = _parsed(body)
    return _error_fields(tree) if isinstance(tree, dict) else {}


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def _error_fields(tree: dict[str, Any]) -> dict[str, Any]:
    nested = tree.get("error")
    if isinstance(nested, dict):
        return nested
    if isinstance(nested, str):
        return {"message": nested}
    if isinstance(tree.get("detail"), str):
        return {"message": tree["detail"]}
    return tree
