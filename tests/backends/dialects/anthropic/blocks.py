"""Blocks of Anthropic's answers that several tests use."""

from __future__ import annotations

from typing import Any

TOOL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Köln", "n": 1}}
THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
REDACTED = {"type": "redacted_thinking", "data": "zzz"}
SEARCH = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "x"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []}


def text(said: str, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **members}
