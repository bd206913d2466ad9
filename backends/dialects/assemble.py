"""One whole answer out of an event stream, for engines that are better asked to stream.

A llama.cpp server goes on generating a whole answer after its caller has left, and stops a stream at once. So a caller
who wants a whole answer is served from a stream, and must not notice: what comes out is what the engine itself would
have answered without `stream`. Where engines disagree, this follows what OpenAI, vLLM, SGLang and llama.cpp do alike.

Everything is kept as the JSON text or UTF-8 that it will be written as, not as Python objects, which are some ten
times larger: the bound on memory is then a bound on bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from backends.dialects.protocol import TranslationError
from backends.sse import DONE, EventSplitter, EventTooLarge

LIMIT_BYTES = 64 << 20
"""As large as the answers that the gateway relays unassembled."""

_PROSE = ("content", "refusal", "reasoning_content", "reasoning")
"""Members of a delta that arrive in pieces of text."""
_STREAM_ONLY = frozenset({"object", "choices", "usage", "obfuscation", "error"})
"""Top-level members that are no plain copies of what a whole answer has."""

_SHORT = 256
"""Length up to which a string is worth comparing with the one before, instead of writing it out again."""

_MEMBER, _PIECE, _CALL, _CHOICE = 200, 40, 500, 1_600
"""Bytes that Python takes for a member, a piece of a list, a tool call and a choice beside their text, about: an engine
that sends millions of empty ones would fill the memory within the limit otherwise."""

_Charge = Callable[[int], None]


def broken(message: str) -> TranslationError:
    """An answer that is not what the engine's API promises."""
    return TranslationError({"message": message, "type": "server_error", "param": None, "code": 502})


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:  # nested more deeply than it writes, though it reads that
        raise broken("The engine streamed an event that is nested too deeply.") from error


class _Kept:
    """Members of an object of which the last value wins, as JSON text. A null never replaces a value."""

    __slots__ = ("_charge", "_last", "texts")

    def __init__(self, charge: _Charge) -> None:
        self._charge = charge
        self._last: dict[str, Any] = {}
        self.texts: dict[str, bytes] = {}

    def put(self, name: str, value: Any) -> None:
        # Most members are the same in each of thousands of chunks: id, model, a finish reason that is still null.
        kind = type(value)
        if kind is int or value is None or (kind is str and len(value) < _SHORT):
            if name in self._last and self._last[name] == value and type(self._last[name]) is kind:
                return
            self._last[name] = value
        else:
            self._last.pop(name, None)
        before = self.texts.get(name)
        if value is None and before is not None:
            return
        text = _json(value)
        self._charge(len(text) - len(before) if before is not None else len(text) + len(name) + _MEMBER)
        self.texts[name] = text

    def into(self, tree: dict[str, Any]) -> None:
        tree.update((name, orjson.Fragment(text)) for name, text in self.texts.items())


class _Prose:
    """Text that arrives in pieces. None and no piece at all are told apart from the empty text."""

    __slots__ = ("_charge", "_text", "seen")

    def __init__(self, charge: _Charge) -> None:
        self._charge = charge
        self._text = bytearray()
        self.seen = False
        """A piece came, be it an empty one."""

    def add(self, piece: Any) -> None:
        if piece is None:
            return
        if not isinstance(piece, str):
            raise broken("The engine streamed text that is no string.")
        data = piece.encode()
        self._charge(len(data))
        self._text += data
        self.seen = True

    @property
    def empty(self) -> bool:
        return not self._text

    @property
    def text(self) -> str | None:
        # Pieces are whole characters each, as strings of JSON are.
        return self._text.decode() if self.seen else None


class _Lists:
    """An object whose lists are continued from chunk to chunk: log probabilities, in both of OpenAI's forms."""

    __slots__ = ("_charge", "_items", "_others")

    def __init__(self, charge: _Charge) -> None:
        self._charge = charge
        self._items: dict[str, list[bytes]] = {}
        self._others = _Kept(charge)

    def add(self, value: Mapping[str, Any]) -> None:
        for name, part in value.items():
            if not isinstance(part, list):
                if name not in self._items:
                    self._others.put(name, part)
                continue
            items = self._items.setdefault(name, [])
            if part:
                text = _json(part)[1:-1]
                self._charge(len(text) + _PIECE)
                items.append(text)

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        self._others.into(tree)
        tree.update((name, orjson.Fragment(b"[" + b",".join(items) + b"]")) for name, items in self._items.items())
        return tree


class _Call:
    """One tool call, or the function call of OpenAI's older form, put together from its pieces."""

    __slots__ = ("_arguments", "_charge", "_function", "_members")

    def __init__(self, charge: _Charge) -> None:
        charge(_CALL)
        self._charge = charge
        self._members = _Kept(charge)
        self._function: _Kept | None = None
        self._arguments = _Prose(charge)

    def add(self, piece: Mapping[str, Any]) -> None:
        for name, value in piece.items():
            if name == "function" and isinstance(value, dict):
                self.add_function(value)
            elif name != "index":
                self._members.put(name, value)

    def add_function(self, piece: Mapping[str, Any]) -> None:
        if self._function is None:
            self._function = _Kept(self._charge)
        for name, value in piece.items():
            if name == "arguments" and (isinstance(value, str) or value is None):
                self._arguments.add(value)
            elif value != "" or name not in self._function.texts:
                # Some engines repeat the name as an empty string in every later piece.
                self._function.put(name, value)

    def tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        self._members.into(tree)
        if self._function is not None:
            tree["function"] = self.function()
        return tree

    def function(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        if self._function is not None:
            self._function.into(tree)
        if self._arguments.seen:
            tree["arguments"] = self._arguments.text
        elif "arguments" not in tree:
            tree["arguments"] = ""
        return tree


class _Choice:
    """One of the answers that a request asked for."""

    __slots__ = (
        "_calls",
        "_charge",
        "_function_call",
        "_logprobs",
        "_members",
        "_message",
        "_nulls",
        "_prose",
        "_text",
        "finished",
    )

    def __init__(self, charge: _Charge) -> None:
        charge(_CHOICE)
        self._charge = charge
        self._members = _Kept(charge)
        self._message = _Kept(charge)
        self._prose = {name: _Prose(charge) for name in _PROSE}
        self._nulls: set[str] = set()
        self._text = _Prose(charge)
        self._calls: dict[int, _Call] = {}
        self._function_call: _Call | None = None
        self._logprobs: _Lists | None = None
        self.finished = False

    def add(self, piece: Mapping[str, Any]) -> None:
        for name, value in piece.items():
            if name == "delta":
                if isinstance(value, dict):
                    self._add_delta(value)
            elif name == "text":
                self._text.add(value)
            elif name == "logprobs" and isinstance(value, dict):
                if self._logprobs is None:
                    self._logprobs = _Lists(self._charge)
                self._logprobs.add(value)
            elif name != "index":
                self._members.put(name, value)
        self.finished = self.finished or piece.get("finish_reason") is not None

    def _add_delta(self, delta: Mapping[str, Any]) -> None:
        for name, value in delta.items():
            if name in self._prose:
                self._prose[name].add(value)
                if value is None:
                    self._nulls.add(name)
            elif name == "tool_calls" and isinstance(value, list):
                self._add_calls(value)
            elif name == "function_call" and isinstance(value, dict):
                if self._function_call is None:
                    self._function_call = _Call(self._charge)
                self._function_call.add_function(value)
            else:
                self._message.put(name, value)

    def _add_calls(self, pieces: list[Any]) -> None:
        for position, piece in enumerate(pieces):
            if not isinstance(piece, dict):
                raise broken("The engine streamed a tool call that is no object.")
            index = piece.get("index")
            key = index if type(index) is int else position
            if key not in self._calls:
                self._calls[key] = _Call(self._charge)
            self._calls[key].add(piece)

    def tree(self, index: int, *, chat: bool, unsaid: str | None) -> dict[str, Any]:
        tree: dict[str, Any] = {"index": index}
        if chat:
            tree["message"] = self._message_tree(unsaid)
        else:
            tree["text"] = self._text.text or ""
        self._members.into(tree)
        if self._logprobs is not None:
            tree["logprobs"] = self._logprobs.tree()
        return tree

    def _message_tree(self, unsaid: str | None) -> dict[str, Any]:
        tree: dict[str, Any] = {"role": "assistant"}
        self._message.into(tree)
        for name, prose in self._prose.items():
            if name != "content" and (prose.seen or name in self._nulls):
                tree[name] = prose.text
        if self._calls:
            tree["tool_calls"] = [self._calls[key].tree() for key in sorted(self._calls)]
        if self._function_call is not None:
            tree["function_call"] = self._function_call.function()
        tree["content"] = self._content(unsaid)
        return tree

    def _content(self, unsaid: str | None) -> str | None:
        content = self._prose["content"]
        if content.empty and (self._calls or self._function_call is not None):
            return unsaid  # also where "" was streamed before the calls, as vLLM and SGLang do
        if content.seen:
            return content.text
        elsewhere = any(not prose.empty for prose in self._prose.values())
        return unsaid if elsewhere else ""


class Assembler:
    """A `Translation` from an OpenAI event stream to the whole answer.

    `choices`: how many the request asked for; the answer is complete only when so many have finished, whatever
    `[DONE]` says (engines that are being stopped have sent it early). `unsaid`: the `content` of a message that
    consists of something else, such as tool calls: null for most engines, an empty string for llama.cpp.
    `limit_bytes` bounds what is kept.
    """

    def __init__(self, choices: int = 1, *, unsaid: str | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self._expected = choices
        self._unsaid = unsaid
        self._limit_bytes = limit_bytes
        self._kept_bytes = 0
        self._splitter = EventSplitter(limit_bytes)
        self._members = _Kept(self._charge)
        self._choices: dict[int, _Choice] = {}
        self._chat = False

    def whole(self, body: bytes) -> bytes:
        """The engine answered without a stream: its own words."""
        return body

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes in; nothing is told before the end, so this returns nothing.

        Raises `TranslationError` for an error in the stream, for what is no stream of OpenAI's, and past the limit.
        """
        try:
            events = self._splitter.feed(data)
        except EventTooLarge as error:
            raise self._too_large() from error
        for name, payload in events:
            if payload != DONE:
                self._take(name, payload)
        return b""

    def assembled(self) -> bytes | None:
        """The whole answer; None while a choice is unfinished. Usage is in it if the stream carried it."""
        if len(self._choices) < self._expected or not all(choice.finished for choice in self._choices.values()):
            return None
        tree: dict[str, Any] = {}
        self._members.into(tree)
        tree["object"] = "chat.completion" if self._chat else "text_completion"
        tree["choices"] = [
            self._choices[index].tree(index, chat=self._chat, unsaid=self._unsaid) for index in sorted(self._choices)
        ]
        return orjson.dumps(tree)

    def _take(self, name: bytes, payload: bytes) -> None:
        try:
            tree = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise broken("The engine streamed an event that is no JSON.") from error
        if tree is None:
            return  # llama.cpp opens the stream of several prompts with it
        if not isinstance(tree, dict):
            raise broken("The engine streamed an event that is no object.")
        self._check_error(name, tree)
        for member, value in tree.items():
            if member not in _STREAM_ONLY or (member == "usage" and value is not None):
                self._members.put(member, value)
        choices = tree.get("choices")
        if choices is None:
            return
        if not isinstance(choices, list):
            raise broken("The engine streamed choices that are no list.")
        for piece in choices:
            self._take_choice(piece)

    def _take_choice(self, piece: Any) -> None:
        index = piece.get("index", 0) if isinstance(piece, dict) else None
        if type(index) is not int:
            raise broken("The engine streamed a choice without a number.")
        self._chat = self._chat or "delta" in piece
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(self._charge)
        choice.add(piece)

    def _check_error(self, name: bytes, tree: Mapping[str, Any]) -> None:
        """Engines put errors under `error`, or flat with `object: error`, or name the event so."""
        error = tree.get("error")
        if isinstance(error, str) and error:
            error = {"message": error}
        if isinstance(error, dict):
            raise TranslationError(error)
        if tree.get("object") == "error" or name == b"error":
            raise TranslationError(dict(tree))

    def _charge(self, size_bytes: int) -> None:
        self._kept_bytes += size_bytes
        if self._kept_bytes > self._limit_bytes:
            raise self._too_large()

    def _too_large(self) -> TranslationError:
        return broken(f"The engine's answer exceeded {self._limit_bytes} bytes.")
