"""A prompt in canonical pieces: what prefix keys are made of, without a tokeniser (`routing.keys.text_prefix`).

The JSON of a request can be written in many ways that an engine reads as one prompt, and the pieces must not tell them
apart: keys in any order, white space, escapes, a text alone or as the only part of a list, fields that are null. The
order of the pieces is that in which chat templates write them: tools first, since templates put them into or before
the system message, then the messages.

    head       HEAD  what templates read besides the messages (`tools`, ...), as JSON with sorted keys
    message    ANSWER | MESSAGE  role  FIELD  content  [FIELD  its other fields, as JSON with sorted keys]
    content    its text; of several parts: PART and the text, or PART MEDIA and JSON, or PART LONG and a digest, each
    prompt     PROMPT  text, or TOKENS and the ids; SUFFIX and what comes after the gap, where there is one

Everything in capitals is a byte that UTF-8 text never has, or comes first where nothing else can, so that no text can
imitate a boundary. Pictures, sound and documents stand as their digest. Nothing here raises: a body of any shape has
some pieces or none, and the engine says what is wrong with it. Nor does anything take long: what has more than
`MAX_PIECES` elements is written as JSON from there on, at the speed of C.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from xxhash import xxh3_128_hexdigest

from backends.dialects.protocol import CHAT, EMBEDDINGS
from routing.keys import ANSWER

SALT_FIELDS = ("cache_salt", "extra_key")
"""By which a request has a cache of its own, in vLLM and SGLang."""
HEAD_FIELDS = frozenset(
    {
        *("tools", "functions", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort"),
        *SALT_FIELDS,
    }
)
"""What templates may read besides the messages, and what parts caches. vLLM's and SGLang's names for what is not
OpenAI's."""
MAX_INLINE_BYTES = 256
"""Longer pictures and the like stand as their digest."""
MAX_PIECES = 4096
"""Of messages, of content parts in all messages together, of prompts; OpenAI takes 2,048 inputs in one request."""
MAX_SESSION_CHARS = 256
"""Longer session ids stand as their digest."""

_HEAD, _MESSAGE, _PROMPT, _TOKENS, _SUFFIX = b"\x02", b"\x03", b"\x04", b"\x05", b"\x06"
_FIELD, _PART, _MEDIA, _ODD, _LONG = b"\xfe", b"\xfd", b"\xfc", b"\xfb", b"\xfa"
_LEADS = {
    "user": _MESSAGE + b"user" + _FIELD,
    "assistant": ANSWER + b"assistant" + _FIELD,
    "system": _MESSAGE + b"system" + _FIELD,
    "developer": _MESSAGE + b"developer" + _FIELD,
    "tool": _MESSAGE + b"tool" + _FIELD,
}
_UNREAD = frozenset({"role", "content", "cache_control"})
"""Fields of a message that stand elsewhere, or are for a hosted API's cache only and move from turn to turn."""


def prompt_parts(path: str, fields: Mapping[str, Any]) -> list[bytes]:
    """The pieces of a request's prompt, none where it has none. `fields` is the body as parsed, of any shape.

    `path` is the OpenAI path the client called.
    """
    parts: list[bytes] = []
    if not HEAD_FIELDS.isdisjoint(fields):
        head = {name: fields[name] for name in HEAD_FIELDS if fields.get(name)}
        if head:
            parts.append(_HEAD + _json(head))
    if path == CHAT:
        _messages(parts, fields.get("messages"))
    else:
        _prompts(parts, fields.get("input" if path == EMBEDDINGS else "prompt"))
        suffix = fields.get("suffix")
        if suffix and parts:
            parts.append(_SUFFIX + (_utf8(suffix) if type(suffix) is str else _ODD + _json(suffix)))
    return parts


def session_of(fields: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]], tenant: str) -> str | None:
    """What the caller says belongs together, within this tenant; None where nothing is said.

    The headers `x-tidegate-session` and `x-session-id` and the field `prompt_cache_key`, in this order. Header names
    are lower case.
    """
    found: str | None = None
    for name, value in headers:
        if name == b"x-tidegate-session" and value:
            found = value.decode("latin-1")
            break
        if name == b"x-session-id" and value:
            found = value.decode("latin-1")
    if found is None:
        key = fields.get("prompt_cache_key")
        if type(key) is not str or not key:
            return None
        found = key
    if len(found) > MAX_SESSION_CHARS:
        found = xxh3_128_hexdigest(_utf8(found))
    return f"{tenant}\x00{found}"


def _messages(parts: list[bytes], messages: Any) -> None:
    if type(messages) is not list:
        return
    spare = MAX_PIECES
    for message in messages if len(messages) <= MAX_PIECES else messages[:MAX_PIECES]:
        if type(message) is dict:
            # The usual message, written out: this runs for every message of every request.
            role, content = message.get("role"), message.get("content")
            if type(content) is str and len(message) == 2 and type(role) is str and role in _LEADS:
                parts.append(_LEADS[role] + _utf8(content))
                continue
            if type(content) is list:
                spare -= len(content)
            if spare >= 0:
                parts.append(_message(message, role, content))
                continue
        parts.append(_MESSAGE + _ODD + _json(message))
    if len(messages) > MAX_PIECES:
        parts.append(_MESSAGE + _ODD + _json(messages[MAX_PIECES:]))


def _message(message: dict[str, Any], role: Any, content: Any) -> bytes:
    if type(role) is str:
        lead = _LEADS.get(role) or _MESSAGE + _utf8(role) + _FIELD
    else:
        lead = _MESSAGE + _ODD + _json(role) + _FIELD
    piece = lead + _content(content)
    others = {name: value for name, value in message.items() if name not in _UNREAD and value is not None}
    return piece + _FIELD + _json(others) if others else piece


def _content(content: Any) -> bytes:
    """Null, missing and empty are one."""
    if type(content) is str:
        return _utf8(content)
    if type(content) is not list:
        return b"" if content is None else _ODD + _json(content)
    if len(content) == 1:
        text = _text_of(content[0])
        if text is not None:
            return _utf8(text)
    pieces: list[bytes] = []
    for part in content:
        text = _text_of(part)
        pieces.append(_PART)
        pieces.append(_media(part) if text is None else _utf8(text))
    return b"".join(pieces)


def _text_of(part: Any) -> str | None:
    """The text of a text part; None for anything else. What else it has (`cache_control`) never reaches a template."""
    if type(part) is str:
        return part
    if type(part) is dict:
        text = part.get("text")
        if type(text) is str and part.get("type") in ("text", "input_text", None):
            return text
    return None


def _prompts(parts: list[bytes], prompt: Any) -> None:
    """The prompt of a completion or the input of an embedding: a text, token ids, or a list of either."""
    if type(prompt) is str:
        parts.append(_PROMPT + _utf8(prompt))
    elif type(prompt) is list and prompt:
        if type(prompt[0]) is int:
            parts.append(_TOKENS + _json(prompt)[1:-1])
            return
        for each in prompt[:MAX_PIECES]:
            if type(each) is str:
                parts.append(_PROMPT + _utf8(each))
            elif type(each) is list:
                parts.append(_TOKENS + _json(each)[1:-1])
            else:
                parts.append(_PROMPT + _ODD + _json(each))
        if len(prompt) > MAX_PIECES:
            parts.append(_PROMPT + _ODD + _json(prompt[MAX_PIECES:]))
    elif prompt is not None and prompt != []:
        parts.append(_PROMPT + _ODD + _json(prompt))


def _media(part: Any) -> bytes:
    written = _json(part)
    if len(written) <= MAX_INLINE_BYTES:
        return _MEDIA + written
    return _LONG + xxh3_128_hexdigest(written).encode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates, which the parser of bodies refuses
        return text.encode("utf-8", "surrogatepass")


def _json(value: Any) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # what no JSON has, or too deep
        return _utf8(repr(value))
