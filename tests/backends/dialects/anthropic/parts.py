"""Pieces of requests, as OpenAI and as Anthropic writes them."""

from __future__ import annotations

from typing import Any

from tests.backends.dialects.anthropic.blocks import text

__all__ = ["text"]

MARK = {"type": "ephemeral", "ttl": "1h"}
PNG = "iVBORw0KGgo="
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
F = {"type": "custom", "name": "f", "input_schema": {"type": "object", "properties": {}}}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def call(id_: str = "c1", arguments: Any = '{"a":1}') -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "f", "arguments": arguments}}


def used(id_: str = "c1", given: Any = None) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": "f", "input": {"a": 1} if given is None else given}


def result(id_: str, *blocks: Any, **members: Any) -> dict[str, Any]:
    made = {"type": "tool_result", "tool_use_id": id_, **members}
    return {**made, "content": list(blocks)} if blocks else made


def answered(id_: str, content: Any, **members: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content, **members}


def image(url: str, **members: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **members}}


def file(data: str, **members: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data, **members}}


def source(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind, "source": members}
