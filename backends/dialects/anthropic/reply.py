"""What Anthropic's answers, whole or in events, have in common, and the whole answer as OpenAI's.

The shapes here name only what is read; members and types of blocks that are unknown are passed over, because Anthropic
adds to them without a new version of its API (https://platform.claude.com/docs/en/api/versioning). Values of the
wrong type are found where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from backends.dialects.protocol import TranslationError
from backends.usage import Usage, known_tokens, tokens_or_none

FINISH_REASONS: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    # Only tools that Anthropic runs itself, which this translation never asks for, pause a turn. The answer is not
    # finished then, and "length" is OpenAI's only word for that.
    "pause_turn": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_STATUSES: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""https://platform.claude.com/docs/en/api/errors, read on 2026-11-22."""
_MALFORMED = 502


class Counts(msgspec.Struct):
    """Token counts. In a stream they are cumulative, and a later report may leave out what did not change."""

    input_tokens: Any = None
    output_tokens: Any = None
    cache_read_input_tokens: Any = None
    cache_creation_input_tokens: Any = None
    output_tokens_details: Any = None

    def update(self, later: Counts) -> None:
        """Take over what a later report says."""
        for name in self.__struct_fields__:
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value)

    def usage(self) -> Usage | None:
        """All prompt tokens together: Anthropic counts fresh, read and written ones apart from each other.

        None when one of the counts cannot be one.
        """
        fresh, output = tokens_or_none(self.input_tokens), tokens_or_none(self.output_tokens)
        read = known_tokens(self.cache_read_input_tokens)
        written = known_tokens(self.cache_creation_input_tokens) or 0
        if fresh is None or output is None:
            return None
        return Usage(fresh + (read or 0) + written, output, read, written)

    def as_openai(self) -> dict[str, Any] | None:
        """OpenAI's usage object, with `cache_write_tokens` beside the cached ones; None as `usage`."""
        usage = self.usage()
        if usage is None:
            return None
        shown: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if usage.cached_tokens is not None:
            shown["prompt_tokens_details"] = {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.cache_write_tokens,
            }
        elif usage.cache_write_tokens:
            shown["prompt_tokens_details"] = {"cache_write_tokens": usage.cache_write_tokens}
        details = self.output_tokens_details
        thinking = known_tokens(details.get("thinking_tokens")) if isinstance(details, dict) else None
        if thinking is not None:
            shown["completion_tokens_details"] = {"reasoning_tokens": thinking}
        return shown


class Block(msgspec.Struct):
    """A content block. `type` says which members it has."""

    type: str
    text: Any = ""
    thinking: Any = ""
    signature: Any = ""
    data: Any = ""
    id: Any = None
    name: Any = None
    input: msgspec.Raw = msgspec.Raw(b"{}")
    """JSON text, so that a number of any size stays as the model wrote it."""


class Message(msgspec.Struct):
    """A whole answer, or what `message_start` knows of it."""

    type: str = ""
    id: Any = None
    model: Any = None
    content: list[Block] = []
    stop_reason: Any = None
    stop_details: Any = None
    usage: Counts | None = None
    error: Any = None


def string(value: Any, what: str) -> str:
    """The value. Raises `TranslationError` when it is no string."""
    if not isinstance(value, str):
        malformed(f"{what} is no string")
    return value


def malformed(what: str) -> NoReturn:
    """Raise the error for an answer that does not keep to the Messages API."""
    message = f"Anthropic's answer could not be translated: {what}."
    raise TranslationError({"message": message, "type": "api_error", "param": None, "code": _MALFORMED})


def error_of(error: Any) -> dict[str, Any]:
    """Anthropic's error object as OpenAI's; `code` is the HTTP status that belongs to its type."""
    kind = error.get("type") if isinstance(error, dict) else None
    kind = kind if isinstance(kind, str) else "api_error"
    message = error.get("message") if isinstance(error, dict) else None
    message = message if isinstance(message, str) and message else kind
    return {"message": message, "type": kind, "param": None, "code": _STATUSES.get(kind, 500)}


def refusal_of(stop_details: Any) -> str | None:
    """Why the model declined, in Anthropic's words; None when it does not say."""
    explanation = stop_details.get("explanation") if isinstance(stop_details, dict) else None
    return explanation if isinstance(explanation, str) and explanation else None


def thinking_block(block: Block, calls_before: int) -> dict[str, Any] | None:
    """A block of thinking as the caller may send it back; None for one that is not signed, which cannot be.

    `tool_calls_before` is said when it is not 0: models think between tool calls, and insist that signed thinking
    comes back in its place, which a list beside `tool_calls` would lose.
    """
    place = {"tool_calls_before": calls_before} if calls_before else {}
    if block.type == "redacted_thinking":
        return {"type": "redacted_thinking", "data": string(block.data, "redacted thinking"), **place}
    signature = string(block.signature, "a signature")
    if not signature:
        return None
    return {"type": "thinking", "thinking": string(block.thinking, "thinking"), "signature": signature, **place}


def whole_answer(body: bytes, created: int) -> bytes:
    """A Messages API answer as a chat completion. Raises `TranslationError`."""
    try:
        answer = msgspec.json.decode(body, type=Message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        try:
            malformed(str(error))
        except TranslationError as translation_error:
            raise translation_error from error
    if answer.type == "error":
        raise TranslationError(error_of(answer.error))
    if answer.type != "message":
        malformed(f"it is of type {answer.type!r}, not a message")
    reason = string(answer.stop_reason, "stop_reason")
    completion: dict[str, Any] = {
        "id": string(answer.id, "id"),
        "object": "chat.completion",
        "created": created,
        "model": string(answer.model, "model"),
        "choices": [
            {
                "index": 0,
                "message": _message(answer),
                "logprobs": None,
                "finish_reason": FINISH_REASONS.get(reason, "stop"),
            }
        ],
    }
    if answer.usage is not None and (usage := answer.usage.as_openai()) is not None:
        completion["usage"] = usage
    return msgspec.json.encode(completion)


def _message(answer: Message) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    thinking: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in answer.content:
        if block.type == "text":
            texts.append(string(block.text, "text"))
        elif block.type in ("thinking", "redacted_thinking"):
            thoughts.append(string(block.thinking, "thinking"))
            kept = thinking_block(block, len(calls))
            if kept is not None:
                thinking.append(kept)
        elif block.type == "tool_use":
            function = {"name": string(block.name, "a tool's name"), "arguments": bytes(block.input).decode()}
            calls.append({"id": string(block.id, "a tool call's id"), "type": "function", "function": function})
    # Blocks follow each other without a gap: a cited passage is a block of its own in the middle of a sentence.
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None, "refusal": None}
    if answer.stop_reason == "refusal":
        message["refusal"] = refusal_of(answer.stop_details)
    if not calls and message["content"] is None and message["refusal"] is None:
        message["content"] = ""
    reasoning = "".join(thoughts)
    if reasoning:
        message["reasoning_content"] = reasoning
    if thinking:
        message["thinking_blocks"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message
