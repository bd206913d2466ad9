"""SGLang: the request id is ours (`rid`), so that a request can be aborted by id even where its socket is not seen.

The endpoint is `POST /abort_request {"rid": …}`; it answers 200 for ids it does not know, and ignores them. With
several prompts SGLang numbers our id (`rid_0`, …), and with `n > 1` it makes up ids of its own (read in 0.5.23): there
the closed connection alone stops it, at once on a stream and within four seconds on a whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from backends.dialects.openai import usage_option


class SGLang:
    """OpenAI's API with a request id in the body."""

    name = "sglang"

    def body_values(self, path: str, fields: Mapping[str, Any], request_id: str) -> dict[str, bytes]:
        values = {"rid": b'"%b"' % request_id.encode()}
        option = usage_option(path, fields)
        if option is not None:
            values["stream_options"] = option
        return values

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        return "/abort_request", msgspec.json.encode({"rid": request_id})
