"""OpenAI's list of messages as Anthropic's `system` and `messages`.

Anthropic's turns alternate between user and assistant, and the results of tools are part of the user's turn. So
messages of one side that follow each other become one, and tool results stand first in it, which is where Anthropic
looks for them (https://platform.claude.com/docs/en/agents-and-tools/tool-use/handle-tool-calls).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from backends.dialects.anthropic.content import Block, blocks_of, keep_cache_control, only_text
from backends.dialects.protocol import Untranslatable

_LONG_ID = 64
"""Characters up to which an id is worth spelling out. A megabyte of them would take a third of a second."""
_FOREIGN = re.compile(r"[^a-zA-Z0-9_-]")


class Conversation:
    """What has been read of a conversation so far."""

    def __init__(self) -> None:
        self.system: list[Block] = []
        self.turns: list[dict[str, Any]] = []
        self._results: list[Block] = []
        """Of the last turn, which is the user's; `_put_results` puts them at its head, all at once: with a hundred
        thousand of them, finding the place of each one would take minutes."""

    def add(self, message: Mapping[str, Any], where: str) -> None:
        """Take in the next message. Raises `Untranslatable`."""
        role = message.get("role")
        if role in ("system", "developer"):
            blocks = only_text(blocks_of(message.get("content"), f"{where}.content"), where, "system messages")
            keep_cache_control(blocks, message, where)
            self.system += blocks
        elif role == "user":
            blocks = blocks_of(message.get("content"), f"{where}.content")
            keep_cache_control(blocks, message, where)
            self._append("user", blocks)
        elif role == "assistant":
            self._append("assistant", _assistant(message, where))
        elif role == "tool":
            self._add_result(_tool_result(message, where))
        elif role == "function":
            raise Untranslatable("Anthropic needs the ids of tool calls: use role 'tool'.", f"{where}.role")
        else:
            raise Untranslatable(f"Anthropic has no role {role!r}.", f"{where}.role")

    def end(self) -> None:
        """All messages were added."""
        self._put_results()
        self._trim_prefill()

    def _trim_prefill(self) -> None:
        """Drop white space at the end of an answer that the model is to go on with; Anthropic refuses it."""
        if not self.turns or self.turns[-1]["role"] != "assistant":
            return
        last = self.turns[-1]["content"][-1]
        if last["type"] == "text":
            last["text"] = last["text"].rstrip()

    def _append(self, role: str, blocks: list[Block]) -> None:
        if not blocks:
            return
        if self.turns and self.turns[-1]["role"] == role:
            self.turns[-1]["content"] += blocks
        else:
            self._put_results()
            self.turns.append({"role": role, "content": blocks})

    def _add_result(self, result: Block) -> None:
        if not self.turns or self.turns[-1]["role"] != "user":
            self.turns.append({"role": "user", "content": []})
        self._results.append(result)

    def _put_results(self) -> None:
        if self._results:
            self.turns[-1]["content"][:0] = self._results
            self._results = []


def read_conversation(messages: Any) -> Conversation:
    """Read `messages`. Raises `Untranslatable`."""
    if not isinstance(messages, list):
        raise Untranslatable("messages must be a list.", "messages")
    conversation = Conversation()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise Untranslatable(f"{where} must be an object.", where)
        conversation.add(message, where)
    if not conversation.turns:
        raise Untranslatable("Anthropic needs at least one user or assistant message that is not empty.", "messages")
    conversation.end()
    return conversation


def tool_id(value: Any, where: str) -> str:
    """An id that Anthropic takes (letters, digits, `_`, `-`).

    Calls that another provider began have ids such as `functions.search:0`; the same id always becomes the same one,
    so that a call and its result still find each other.

        >>> tool_id("functions.search:0", "id")
        'functions_2e_search_3a_0'
    """
    if not isinstance(value, str) or not value:
        raise Untranslatable(f"{where} must be a string that is not empty.", where)
    if len(value) > _LONG_ID:
        if _FOREIGN.search(value) is None:
            return value
        return f"id_{hashlib.blake2b(value.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"
    return _FOREIGN.sub(lambda found: f"_{ord(found.group()):x}_", value)


def _assistant(message: Mapping[str, Any], where: str) -> list[Block]:
    """Thinking, text, and tool calls with the thinking between them: the order in which Anthropic's models write."""
    if message.get("audio") is not None:
        raise Untranslatable("Anthropic cannot refer to earlier audio.", f"{where}.audio")
    if message.get("function_call") is not None:
        raise Untranslatable("Anthropic needs the ids of tool calls: use tool_calls.", f"{where}.function_call")
    thinking = _thinking(message.get("thinking_blocks"))
    blocks = thinking.pop(0, [])
    blocks += only_text(blocks_of(message.get("content"), f"{where}.content"), where, "assistant messages")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise Untranslatable("tool_calls must be a list.", f"{where}.tool_calls")
    for index, call in enumerate(calls or ()):
        blocks += thinking.pop(index, ())
        blocks.append(_tool_use(call, f"{where}.tool_calls[{index}]"))
    for place in sorted(thinking):
        blocks += thinking[place]
    if blocks and all(block["type"] in ("thinking", "redacted_thinking") for block in blocks):
        return []  # an answer that ends in thinking is refused; it was cut before it said anything
    keep_cache_control(blocks, message, where)
    return blocks


def _thinking(given: Any) -> dict[int, list[Block]]:
    """Signed thinking to send back, which a tool loop needs, by the number of tool calls that stand before it.

    Unsigned thinking would be refused: it is left out.
    """
    found: dict[int, list[Block]] = {}
    if not isinstance(given, list):
        return found
    for each in given:
        if not isinstance(each, dict):
            continue
        thinking, signature, data = each.get("thinking"), each.get("signature"), each.get("data")
        before = each.get("tool_calls_before")
        place = before if type(before) is int and before > 0 else 0
        if each.get("type") == "thinking" and isinstance(thinking, str) and isinstance(signature, str) and signature:
            block = {"type": "thinking", "thinking": thinking, "signature": signature}
        elif each.get("type") == "redacted_thinking" and isinstance(data, str) and data:
            block = {"type": "redacted_thinking", "data": data}
        else:
            continue
        found.setdefault(place, []).append(block)
    return found


def _tool_use(call: Any, where: str) -> Block:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise Untranslatable("Anthropic knows only tool calls of type function.", where)
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Untranslatable(f"{where}.function needs a name.", f"{where}.function")
    at = f"{where}.function.arguments"
    block = {
        "type": "tool_use",
        "id": tool_id(call.get("id"), f"{where}.id"),
        "name": function["name"],
        "input": _arguments(function.get("arguments"), at),
    }
    keep_cache_control([block], call, where)
    return block


def _arguments(given: Any, where: str) -> msgspec.Raw:
    """The JSON text of the arguments, untouched: the prompt cache and large numbers survive."""
    if given is None or given == "":
        return msgspec.Raw(b"{}")
    if not isinstance(given, str):
        raise Untranslatable(f"{where} must be a string of JSON.", where)
    try:
        text = given.encode()
        parsed = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise Untranslatable(f"{where} is not valid JSON, which Anthropic insists on.", where) from error
    if not isinstance(parsed, dict):
        raise Untranslatable(f"{where} must be a JSON object.", where)
    return msgspec.Raw(text)


def _tool_result(message: Mapping[str, Any], where: str) -> Block:
    at = f"{where}.tool_call_id"
    block: Block = {"type": "tool_result", "tool_use_id": tool_id(message.get("tool_call_id"), at)}
    content = blocks_of(message.get("content"), f"{where}.content")
    if content:
        block["content"] = content
    keep_cache_control([block], message, where)
    return block
