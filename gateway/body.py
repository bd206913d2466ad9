"""Reads a request body once, strictly, and changes it by splicing bytes instead of rebuilding it.

What the model server sees is what the client sent, byte for byte, except for the few top-level values that a dialect
sets. Two C parsers look at the bytes: orjson builds the tree and judges it (it refuses NaN, invalid UTF-8, lone
surrogates, byte order marks and numbers beyond a double); msgspec finds the byte range of every top-level value, and
is lax about what is inside it. Both keep the *last* of two equal keys without a word, and a model server might keep
the first, so the ranges are walked and a repeated key is refused: gateway and engine must not read two different
requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from gateway.errors import InvalidRequest

LARGE_BYTES = 65_536
"""Above this, what is dear to parse is counted first: 1 ms a megabyte, where the worst bodies take 30. (No thread could
take the parsing off the event loop: the parsers hold the interpreter's lock.)"""
MAX_CONTAINERS = 100_000
"""Brackets and braces allowed in a large body, those inside strings included. Ten megabytes of `[],` hold the event
loop for over a second inside the parser; this many, for 0.03 s. Real bodies of that size have thousands."""
MAX_COMMAS = 1_000_000
"""Commas allowed in a large body, those inside strings included: five million numbers take 0.13 s, a million 0.03 s. A
million tokens of prompt as text, which is four megabytes, have about fifty thousand; as numbers, a million."""
MAX_QUOTES = 400_000
"""Quotation marks allowed in a large body, those escaped inside strings not included: 900,000 different keys in one
object take 0.27 s, this many marks 0.06 s."""
MAX_KEY_LENGTH = 1024
"""Characters of a top-level key in a large body. Walking over one of ten megabytes, all escapes, takes 0.45 s."""
MAX_DEPTH = 64
"""Nesting allowed in a body. Real tool schemas stay under 20; recursive readers behind us fail from about 900."""
MAX_KEYS = 1000
"""Top-level keys allowed; OpenAI knows about 40. Walking a million of them would stop every client for seconds."""

_WHITESPACE = re.compile(rb"[ \t\n\r]*")
_KEY = re.compile(rb'[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_SPACE, _COMMA, _BRACE = b" ,}"
_ranges = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Body(msgspec.Struct, frozen=True, gc=False):
    """A parsed request body: the tree, the untouched bytes, and where each top-level value stands in them."""

    raw: bytes
    fields: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    start: int
    """Index of the first byte after the opening brace."""

    def with_values(self, values: Mapping[str, bytes]) -> bytes:
        """The body with these top-level values (JSON text) replaced or, where the key is missing, added.

        >>> parse(b'{"model":"a","n":1}').with_values({"model": b'"b"', "rid": b'"7"'})
        b'{"rid":"7","model":"b","n":1}'
        """
        if not values:
            return self.raw
        raw, spans, position = self.raw, self.spans, self.start
        pieces = [raw[:position]]
        replaced: list[tuple[tuple[int, int], bytes]] = []
        for key, value in values.items():
            span = spans.get(key)
            if span is None:
                pieces.append(b'"%b":%b,' % (key.encode(), value))
            else:
                replaced.append((span, value))
        if not spans:  # nothing follows
            pieces[-1] = pieces[-1][:-1]
        if len(replaced) > 1:
            replaced.sort()
        for (begin, end), value in replaced:
            pieces += (raw[position:begin], value)
            position = end
        pieces.append(raw[position:])
        return b"".join(pieces)


def parse(raw: bytes) -> Body:
    """Parse a JSON object.

    Raises `InvalidRequest` naming what is wrong: not JSON, not an object, a repeated top-level key, or more nesting,
    keys, containers, commas or strings than the limits above allow. Never includes the body's text in the message.
    """
    deep = True
    if len(raw) > LARGE_BYTES:
        containers = raw.count(b"[") + raw.count(b"{")
        deep = containers > MAX_DEPTH
        _refuse_dear(raw, containers)
    try:
        fields = orjson.loads(raw)
        if type(fields) is not dict:
            raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
        if len(fields) > MAX_KEYS:
            raise InvalidRequest(f"The request body has more than {MAX_KEYS} top-level keys.", code="too_many_keys")
        if len(raw) > LARGE_BYTES and any(len(name) > MAX_KEY_LENGTH for name in fields):
            raise InvalidRequest("The request body has a top-level key that is too long.", code="invalid_json")
        ranges = _ranges(raw)
    except (orjson.JSONDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(_reason(error), code="invalid_json") from None
    if deep and _deeper_than(fields, MAX_DEPTH):
        raise InvalidRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
    spans = _regular_spans(raw, ranges)
    if spans is not None:
        return Body(raw, fields, spans, 1)
    start, spans = _walk(raw, ranges)
    return Body(raw, fields, spans, start)


def _refuse_dear(raw: bytes, containers: int) -> None:
    """Refuse what would hold up every other client while it is parsed."""
    what = ""
    if containers > MAX_CONTAINERS:
        what = "brackets and braces"
    elif raw.count(b",") > MAX_COMMAS:
        what = "commas"
    elif (quotes := raw.count(b'"')) > MAX_QUOTES and quotes - raw.count(b'\\"') > MAX_QUOTES:
        what = "strings"
    if what:
        raise InvalidRequest(f"The request body has too many {what}.", code="invalid_json")


def _reason(error: Exception) -> str:
    """The parser's own words. orjson puts only positions in them, never text of the body."""
    if isinstance(error, orjson.JSONDecodeError):
        return f"The request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
    return "The request body is not valid JSON."


def _deeper_than(value: dict[str, Any], limit: int) -> bool:
    """Whether containers nest more than `limit` levels; breadth first, so hostile depth costs no stack."""
    level: list[Any] = [value]
    for _ in range(limit):
        below: list[Any] = []
        for container in level:
            for child in container.values() if type(container) is dict else container:
                kind = type(child)
                if kind is dict or kind is list:
                    below.append(child)
        if not below:
            return False
        level = below
    return True


def _regular_spans(raw: bytes, ranges: Mapping[str, msgspec.Raw]) -> dict[str, tuple[int, int]] | None:
    """Each value's place by adding up lengths, for the two layouts that JSON libraries write; None for any other.

    Without white space (OpenAI's SDK, JavaScript): the sum over the distinct keys is the least that an object with them
    can measure. White space, an escape in a key and a repeated key all need more, so a body of exactly that length has
    none of them, and its keys stand in the order in which the parser met them. With one space after each colon and
    comma (Python's default): a repeated key could hide in the spaces' room, so the body is compared with what it must
    be.
    """
    spans: dict[str, tuple[int, int]] = {}
    position = 1
    for name, value in ranges.items():
        begin = position + len(name) + 3
        end = begin + len(memoryview(value))
        spans[name] = (begin, end)
        position = end + 1
    if position == len(raw):
        return spans
    if position + 2 * len(spans) - 1 != len(raw) or raw != b"{%b}" % b", ".join(
        [b'"%b": %b' % (name.encode(), value) for name, value in ranges.items()]
    ):
        return None
    # Each key has two spaces more before its value than the one before, and the first of them one.
    return {
        name: (begin + spaces, end + spaces)
        for (name, (begin, end)), spaces in zip(spans.items(), range(1, 2 * len(spans), 2), strict=True)
    }


def _walk(raw: bytes, ranges: Mapping[str, msgspec.Raw]) -> tuple[int, dict[str, tuple[int, int]]]:
    """Find each top-level value's place, refusing a key that comes twice.

    The parser has kept the last value of every key. Walking from the front, the bytes at a key's first place must
    equal that value and be followed by a comma or the closing brace; where they do not, the key comes again later.
    """
    position = start = raw.index(b"{") + 1
    spans: dict[str, tuple[int, int]] = {}
    while True:
        key = _KEY.match(raw, position)
        if key is None:  # an empty object; anything else was refused by the parsers
            return start, spans
        text = key[1]
        name: str = orjson.loads(text) if b"\\" in text else text[1:-1].decode()
        begin = key.end()
        value = ranges[name]
        end = begin + len(memoryview(value))
        after = raw[end] if raw[end] > _SPACE else raw[_next(raw, end)]
        if name in spans or not raw.startswith(value, begin) or (after != _COMMA and after != _BRACE):
            raise InvalidRequest(
                f"The request body has the key {name[:64]!r} more than once.",
                param=name[:64],
                code="duplicate_key",
            )
        spans[name] = (begin, end)
        if after == _BRACE:
            return start, spans
        position = raw.index(b",", end) + 1


def _next(raw: bytes, position: int) -> int:
    """The index of the first byte from `position` on that is not white space."""
    found = _WHITESPACE.match(raw, position)
    return found.end() if found else position
