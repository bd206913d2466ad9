"""OpenAI's tools and tool choice as Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.dialects.anthropic.content import Block, keep_cache_control
from backends.dialects.protocol import Untranslatable


def set_tools(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set `tools` and `tool_choice` from the caller's fields. Raises `Untranslatable`."""
    for name in ("functions", "function_call"):
        if fields.get(name) is not None:
            raise Untranslatable(f"{name} is not translated for Anthropic: use tools and tool_choice.", name)
    given = fields.get("tools")
    if given is not None and not isinstance(given, list):
        raise Untranslatable("tools must be a list.", "tools")
    tools = [_tool(each, f"tools[{index}]") for index, each in enumerate(given or ())]
    if tools:
        body["tools"] = tools
    choice = _choice(fields, bool(tools))
    if choice is not None:
        body["tool_choice"] = choice


def _tool(given: Any, where: str) -> Block:
    if not isinstance(given, dict):
        raise Untranslatable(f"{where} must be an object.", where)
    if given.get("type") != "function":
        raise Untranslatable(f"Anthropic has no tool of type {given.get('type')!r}.", f"{where}.type")
    function = given.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Untranslatable(f"{where}.function needs a name.", f"{where}.function")
    schema = function.get("parameters")
    if schema is None:
        schema = {"type": "object", "properties": {}}
    if not isinstance(schema, dict):
        raise Untranslatable(f"{where}.function.parameters must be a JSON schema.", f"{where}.function.parameters")
    # Anthropic insists on the type, which OpenAI's callers may leave out.
    tool: Block = {"type": "custom", "name": function["name"], "input_schema": {"type": "object", **schema}}
    if isinstance(function.get("description"), str) and function["description"]:
        tool["description"] = function["description"]
    if function.get("strict") is True:
        tool["strict"] = True
    keep_cache_control([tool], function, f"{where}.function")
    keep_cache_control([tool], given, where)
    return tool


def _choice(fields: Mapping[str, Any], has_tools: bool) -> Block | None:
    """Anthropic takes a choice only beside tools, and the limit to one call only inside a choice."""
    given = fields.get("tool_choice")
    choice: Block | None
    if given is None:
        choice = None
    elif given in ("auto", "none"):
        choice = {"type": given}
    elif given == "required":
        choice = {"type": "any"}
    elif isinstance(given, dict) and given.get("type") == "function":
        function = given.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise Untranslatable("tool_choice.function needs a name.", "tool_choice.function.name")
        choice = {"type": "tool", "name": name}
    else:
        raise Untranslatable("Anthropic has no such tool choice.", "tool_choice")
    if not has_tools:
        if choice is not None and choice["type"] in ("any", "tool"):
            raise Untranslatable("tool_choice asks for a tool, and there are no tools.", "tool_choice")
        return None
    if fields.get("parallel_tool_calls") is False:
        choice = choice or {"type": "auto"}
        if choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
    return choice
