"""The strict body parser and the splicing of values into a body's own bytes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.body import LARGE_BYTES, MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS, parse
from gateway.errors import InvalidRequest

REFUSED = {
    "empty": b"",
    "only white space": b" \n\t ",
    "not JSON": b"hello",
    "cut off": b'{"model": "m"',
    "trailing text": b'{"model":"m"} x',
    "a second document": b'{"model":"m"}{"model":"n"}',
    "a trailing comma": b'{"model":"m",}',
    "a comment": b'{"model":"m" /* c */}',
    "single quotes": b"{'model':'m'}",
    "a list": b'[{"model":"m"}]',
    "a string": b'"model"',
    "null": b"null",
    "a number": b"17",
    "NaN": b'{"temperature":NaN}',
    "Infinity": b'{"temperature":Infinity}',
    "minus Infinity": b'{"temperature":-Infinity}',
    "a number beyond a double": b'{"temperature":1e999}',
    "an integer of 5000 digits": b'{"seed":%b}' % (b"9" * 5000),
    "a leading zero": b'{"seed":01}',
    "a plus sign": b'{"seed":+1}',
    "hexadecimal": b'{"seed":0x10}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "UTF-16": '{"model":"m"}'.encode("utf-16"),
    "an invalid UTF-8 byte": b'{"user":"\xff"}',
    "cut UTF-8": b'{"user":"\xe2\x82"}',
    "overlong UTF-8": b'{"user":"\xc0\xaf"}',
    "an encoded surrogate": b'{"user":"\xed\xa0\x80"}',
    "a lone high surrogate": b'{"user":"\\ud800"}',
    "a lone low surrogate": b'{"user":"\\udc00"}',
    "surrogates the wrong way round": b'{"user":"\\udc00\\ud800"}',
    "a lone surrogate in a key": b'{"\\ud800":1}',
    "a raw control character": b'{"user":"a\nb"}',
    "a NUL byte": b'{"user":"a\x00"}',
    "an unknown escape": b'{"user":"\\x41"}',
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_strict_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


DUPLICATES = {
    "the same value": b'{"model":"m","model":"m"}',
    "another value": b'{"model":"m","model":"n"}',
    "the first longer": b'{"n":12,"n":1}',
    "the first shorter": b'{"n":1,"n":12}',
    "numbers that begin alike": b'{"n":1.5,"n":1}',
    "an exponent": b'{"n":1e2,"n":1}',
    "white space around the value": b'{"n": 1 , "n" : 1 }',
    "an escaped spelling": b'{"model":"m","\\u006dodel":"n"}',
    "an escaped spelling first": b'{"\\u006dodel":"n","model":"m"}',
    "an escaped slash": b'{"a/b":1,"a\\/b":1}',
    "far apart": b'{"model":"m","messages":[{"model":"x"}],"a":1,"model":"m"}',
    "objects": b'{"a":{"b":1},"a":{"b":1}}',
    "the empty key": b'{"":1,"":1}',
    "not ASCII": '{"ä":1,"\\u00e4":1}'.encode(),
}


@pytest.mark.parametrize("raw", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_a_top_level_key_that_comes_twice_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "duplicate_key")
    assert caught.value.param is not None


def test_the_key_that_comes_twice_is_named() -> None:
    with pytest.raises(InvalidRequest, match="'model'") as caught:
        parse(b'{"model":"secret text","model":"other"}')
    assert caught.value.param == "model"
    assert "secret" not in caught.value.message


def test_keys_that_only_look_alike_are_two_keys() -> None:
    assert parse(b'{"model":"m","Model":"n","model ":"o"}').fields == {"model": "m", "Model": "n", "model ": "o"}


def test_below_the_top_level_a_key_may_come_twice_since_nothing_is_read_there() -> None:
    raw = b'{"metadata":{"a":1,"a":2}}'
    assert parse(raw).raw == raw


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A body of this depth, the object itself included."""
    return b'{"a":' + opening * (depth - 1) + b"1" + closing * (depth - 1) + b"}"


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_the_deepest_nesting_allowed(pair: tuple[bytes, bytes]) -> None:
    assert parse(nested(MAX_DEPTH, *pair)).fields
    with pytest.raises(InvalidRequest, match="nested deeper than 64"):
        parse(nested(MAX_DEPTH + 1, *pair))


@pytest.mark.parametrize("depth", [65, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "unclosed"])
@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_hostile_depth_is_refused_at_once(depth: int, closed: bool, pair: tuple[bytes, bytes]) -> None:
    raw = nested(depth, *pair) if closed else nested(depth, pair[0], b"")[:-1]
    started = time.perf_counter()
    with pytest.raises(InvalidRequest):
        parse(raw)
    assert time.perf_counter() - started < 0.05


def test_only_so_many_top_level_keys_are_walked() -> None:
    members = [b'"k%d":1' % index for index in range(MAX_KEYS + 1)]
    assert len(parse(b"{%b}" % b",".join(members[:-1])).spans) == MAX_KEYS
    with pytest.raises(InvalidRequest, match="more than 1000 top-level keys"):
        parse(b"{%b}" % b",".join(members))


def test_the_reason_never_quotes_the_body() -> None:
    for raw in (b'{"user":"hunter2', b"hunter2", b'{"user":"hunter2\xff"}'):
        with pytest.raises(InvalidRequest) as caught:
            parse(raw)
        assert "hunter2" not in caught.value.message


def test_nothing_to_change_gives_back_the_very_same_bytes() -> None:
    raw = b' \r\n{ "model" :\t"m" , "n":1.0e0 } \n'
    assert parse(raw).with_values({}) is raw


@pytest.mark.parametrize("raw", [b"{}", b"{ }", b" {\n} "])
def test_values_are_added_to_an_empty_object(raw: bytes) -> None:
    assert json.loads(parse(raw).with_values({"rid": b'"7"'})) == {"rid": "7"}
    assert json.loads(parse(raw).with_values({"rid": b'"7"', "n": b"2"})) == {"rid": "7", "n": 2}


def test_a_value_is_replaced_in_place_and_everything_else_stays_as_it_was() -> None:
    raw = b'{ "model" : "a" ,\r\n "x":1.50, "\\u0078y" : [ 1,2 ] }'
    spliced = parse(raw).with_values({"model": b'"b"', "rid": b'"7"'})
    assert spliced == b'{"rid":"7", "model" : "b" ,\r\n "x":1.50, "\\u0078y" : [ 1,2 ] }'


def test_an_escaped_key_is_replaced_and_not_added_a_second_time() -> None:
    assert parse(b'{"\\u006dodel":"a"}').with_values({"model": b'"b"'}) == b'{"\\u006dodel":"b"}'


def test_large_integers_pass_untouched() -> None:
    raw = b'{"seed":18446744073709551617,"model":"a"}'
    assert parse(raw).with_values({"model": b'"b"'}) == raw.replace(b'"a"', b'"b"')


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from(["model", "rid", "n", "stream_options"]) | texts
gaps = st.text(" \t\r\n", max_size=3)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], list[str], str]:
    """An object, its members as text in some layout, and the whole text."""
    value = draw(st.dictionaries(keys, values, max_size=6))
    members = []
    for key, member in value.items():
        name = json.dumps(key, ensure_ascii=draw(st.booleans()))
        if key and draw(st.booleans()):
            name = '"' + "".join(_escaped(letter) for letter in key) + '"'
        text = json.dumps(
            member, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from((None, 1, "\t"))), allow_nan=False
        )
        members.append(f"{draw(gaps)}{name}{draw(gaps)}:{draw(gaps)}{text}{draw(gaps)}")
    inside = ",".join(members) or draw(gaps)
    return value, members, f"{draw(gaps)}{{{inside}}}{draw(gaps)}"


def _escaped(letter: str) -> str:
    """The character as JSON escapes, even where none is needed."""
    units = letter.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2))


@given(layouts(), st.dictionaries(keys, values, max_size=4))
def test_with_values_is_an_update_that_leaves_all_other_bytes_alone(
    layout: tuple[dict[str, Any], list[str], str], update: dict[str, Any]
) -> None:
    value, members, text = layout
    body = parse(text.encode())
    assert body.fields == value
    # Keys to set are the gateway's own plain words.
    changed = {key: new for key, new in update.items() if key.isprintable() and not {'"', "\\"} & set(key)}
    spliced = body.with_values({key: json.dumps(new).encode() for key, new in changed.items()})
    assert json.loads(spliced, object_pairs_hook=_no_duplicates) == {**value, **changed}
    for key, member in zip(value, members, strict=True):
        if key not in changed:
            assert member.encode() in spliced
    before, after = text[: text.index("{") + 1].encode(), text[text.rindex("}") :].encode()
    assert spliced.startswith(before)
    assert spliced.endswith(after)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


@given(layouts())
def test_each_span_is_the_bytes_of_its_value(layout: tuple[dict[str, Any], list[str], str]) -> None:
    value, _, text = layout
    body = parse(text.encode())
    assert body.spans.keys() == value.keys()
    for key, (begin, end) in body.spans.items():
        assert json.loads(body.raw[begin:end]) == value[key]
        assert body.raw[begin:end].strip() == body.raw[begin:end]


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    try:
        body = parse(raw)
    except InvalidRequest:
        return
    assert json.loads(raw) == body.fields


def test_a_large_body_of_brackets_is_refused_before_it_is_parsed() -> None:
    raw = b'{"model":"m","x":[' + b"[]," * (MAX_CONTAINERS + 1) + b"[]]}"
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match="too many brackets"):
        parse(raw)
    assert time.perf_counter() - started < 0.05


def test_a_large_body_of_numbers_is_read() -> None:
    numbers = list(range(50_000))
    body = parse(json.dumps({"model": "m", "input": numbers}).encode())
    assert len(body.raw) > LARGE_BYTES
    assert body.fields["input"] == numbers


def test_depth_is_checked_in_a_large_body_too() -> None:
    nested = b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)
    with pytest.raises(InvalidRequest, match="nested deeper"):
        parse(b'{"a":%b,"b":"%b"}' % (nested, b"x" * LARGE_BYTES))
