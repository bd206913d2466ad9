"""Any server that speaks OpenAI's API and nothing more; what the other dialects build on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_ASK_FOR_USAGE = b'{"include_usage":true}'
_STREAMING_PATHS = ("/v1/chat/completions", "/v1/completions")


def usage_option(path: str, fields: Mapping[str, Any]) -> bytes | None:
    """The `stream_options` that make a stream end with its usage; None when nothing must change.

    Other members of the caller's `stream_options` are kept. A value of the wrong type, its own or of `include_usage`,
    is left for the engine to refuse.
    """
    if fields.get("stream") is not True or path not in _STREAMING_PATHS:
        return None
    options = fields.get("stream_options")
    if options is None:
        return _ASK_FOR_USAGE
    if not isinstance(options, dict) or options.get("include_usage", False) is not False:
        return None
    return msgspec.json.encode({**options, "include_usage": True})


class OpenAI:
    """Closing the connection is the only way to stop a request."""

    name = "openai"

    def body_values(self, path: str, fields: Mapping[str, Any], request_id: str) -> dict[str, bytes]:
        option = usage_option(path, fields)
        return {} if option is None else {"stream_options": option}

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        return None
