"""What every OpenAI-compatible engine is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.dialects.openai import usage_option

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
        ({"include_usage": True}, None),
        ({"include_usage": "yes"}, None),
        ({"include_usage": None}, None),
        ("all", None),
    ],
)
def test_a_stream_is_asked_for_its_usage_and_nonsense_is_left_to_the_engine(options: Any, sent: Any) -> None:
    option = usage_option(CHAT, {"stream": True, "stream_options": options})
    assert (None if option is None else json.loads(option)) == sent


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, {}), (CHAT, {"stream": False}), ("/v1/embeddings", {"stream": True})]
)
def test_what_is_no_stream_is_not_touched(path: str, fields: dict[str, Any]) -> None:
    assert usage_option(path, fields) is None
