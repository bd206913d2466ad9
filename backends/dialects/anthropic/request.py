"""A chat completion request of OpenAI's API as a request to Anthropic's Messages API.

Written after the parameter types of the anthropic SDK 2.12.0 and https://platform.claude.com/docs/en/api/messages.
The package's docstring has the table of what becomes of each field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from backends.dialects.anthropic.conversation import read_conversation
from backends.dialects.anthropic.tools import set_tools
from backends.dialects.protocol import Untranslatable

DEFAULT_MAX_TOKENS = 32_000
"""Sent when the caller names no limit, which Anthropic's API insists on.

It is a ceiling: only tokens that are generated are paid for. Small defaults (1,024 and 4,096 are common) cut long
answers and tool calls off without anybody having asked for it (https://github.com/pydantic/pydantic-ai/issues/7468,
https://github.com/TanStack/ai/issues/849). 32,000 is what Claude Opus 4 and 4.1 give at most; later models give 64,000
or 128,000 (https://platform.claude.com/docs/en/models/overview), so that none refuses it."""
_EFFORTS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
"""Anthropic's least is `low`: models since Claude Opus 5.5 always think, and refuse to be told not to."""
_MAX_USER_ID = 256
_PERSONAL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+|^\+?[\d\s().-]{7,}$")
"""An e-mail address, or a telephone number."""


def translated(fields: Mapping[str, Any], model: Any, *, stream: bool, default_max_tokens: int) -> bytes:
    """The body to POST to `/v1/messages`. Raises `Untranslatable`."""
    if not isinstance(model, str):
        raise Untranslatable("model must be a string.", "model")
    _refuse_what_it_cannot(fields)
    conversation = read_conversation(fields.get("messages"))
    body: dict[str, Any] = {"model": model, "max_tokens": _max_tokens(fields, default_max_tokens)}
    if conversation.system:
        body["system"] = conversation.system
    body["messages"] = conversation.turns
    set_tools(body, fields)
    _set_sampling(body, fields)
    _set_output(body, fields)
    _set_rest(body, fields)
    if stream:
        body["stream"] = True
    try:
        return msgspec.json.encode(body)
    except (UnicodeEncodeError, RecursionError, TypeError, ValueError, OverflowError) as error:
        raise Untranslatable("The request holds a value that cannot be written as JSON.") from error


def _refuse_what_it_cannot(fields: Mapping[str, Any]) -> None:
    """Fields whose promise would silently be broken."""
    if fields.get("n") not in (None, 1):
        raise Untranslatable("Anthropic gives one choice for each request.", "n")
    for name in ("logprobs", "top_logprobs", "logit_bias", "audio", "web_search_options"):
        if fields.get(name):
            raise Untranslatable(f"Anthropic has nothing for {name}.", name)
    modalities = fields.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise Untranslatable("Anthropic's models answer in text.", "modalities")


def _max_tokens(fields: Mapping[str, Any], default: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 0:
            raise Untranslatable(f"{name} must be a whole number of tokens.", name)
        return value
    return default


def _set_sampling(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Temperature, top_p, top_k and stop sequences.

    Models since Claude Opus 4.7 refuse any temperature and top_p but the default, which is 1 for both; so 1 is left
    out, and what is above 1 becomes 1, as in Anthropic's own OpenAI-compatible endpoint.
    """
    temperature = _number(fields, "temperature", 2.0)
    if temperature is not None and temperature < 1:
        body["temperature"] = temperature
    top_p = _number(fields, "top_p", 1.0)
    if top_p is not None and top_p < 1:
        body["top_p"] = top_p
    top_k = fields.get("top_k")
    if top_k is not None and top_k != -1:  # -1 is how vLLM and SGLang say "all"
        if type(top_k) is not int or top_k < 0:
            raise Untranslatable("top_k must be a whole number.", "top_k")
        body["top_k"] = top_k
    stop = fields.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise Untranslatable("stop must be a string or a list of strings.", "stop")
    visible = [each for each in stops if each.strip()]
    if visible:
        body["stop_sequences"] = visible


def _number(fields: Mapping[str, Any], name: str, most: float) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Untranslatable(f"{name} must be a number.", name)
    if not 0 <= value <= most:
        raise Untranslatable(f"{name} must be between 0 and {most:g}.", name)
    return value


def _set_output(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Thinking, effort and structured output."""
    thinking = fields.get("thinking")
    if thinking is not None and not isinstance(thinking, dict):
        raise Untranslatable("thinking must be an object.", "thinking")
    config: dict[str, Any] = {}
    effort = fields.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in _EFFORTS:
            raise Untranslatable(f"Anthropic has no reasoning effort {effort!r}.", "reasoning_effort")
        config["effort"] = _EFFORTS[effort]
    if thinking:
        body["thinking"] = thinking
    schema = _output_schema(fields.get("response_format"))
    if schema is not None:
        config["format"] = {"type": "json_schema", "schema": schema}
    if config:
        body["output_config"] = config


def _output_schema(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        raise Untranslatable("Anthropic has no JSON mode without a schema: use json_schema.", "response_format.type")
    if kind != "json_schema":
        raise Untranslatable("Anthropic has no such response format.", "response_format.type")
    spec = given.get("json_schema")
    schema = spec.get("schema") if isinstance(spec, dict) else None
    if not isinstance(schema, dict):
        where = "response_format.json_schema.schema"
        raise Untranslatable("response_format needs a JSON schema.", where)
    return schema


def _set_rest(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Who asks, which capacity, and where to put a cache mark by itself."""
    user = fields.get("safety_identifier") or fields.get("user")
    # It only helps Anthropic to find abuse, and the API answers 400 to what looks personal.
    if isinstance(user, str) and user and len(user) <= _MAX_USER_ID and not _PERSONAL.search(user):
        body["metadata"] = {"user_id": user}
    if fields.get("service_tier") in ("default", "standard_only"):
        body["service_tier"] = "standard_only"
    mark = fields.get("cache_control")
    if mark is not None:
        if not isinstance(mark, dict):
            raise Untranslatable("cache_control must be an object.", "cache_control")
        body["cache_control"] = mark
