"""Canonical pieces of a prompt: equal for equal JSON, different where the engine would see a difference."""

from __future__ import annotations

import json
import random
import string
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.body import parse
from gateway.prompt import MAX_SESSION_CHARS, prompt_parts, session_of
from routing.keys import SEPARATOR, TAILS, seed_of, text_prefix
from routing.prefix import Prefix

SEED = seed_of("chat")
PATHS = (CHAT, COMPLETIONS, EMBEDDINGS)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "integer"}}},
    },
}

text = st.text(max_size=60)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), text
)
trees = st.recursive(
    scalars,
    lambda below: st.one_of(st.lists(below, max_size=4), st.dictionaries(st.text(max_size=9), below, max_size=4)),
    max_leaves=12,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "critic"])
messages = st.fixed_dictionaries(
    {"role": roles, "content": text},
    optional={"name": text, "tool_call_id": text, "reasoning_content": text, "tool_calls": st.lists(trees, max_size=2)},
)
conversations = st.lists(messages, min_size=1, max_size=6)
names = st.sampled_from(["role", "content", "type", "text", "image_url", "url", "tools", "name", "input_audio", "file"])
odd = st.recursive(
    scalars,
    lambda below: st.one_of(st.lists(below, max_size=4), st.dictionaries(names, below, max_size=4)),
    max_leaves=15,
)


def chat(*messages: Any, **fields: Any) -> list[bytes]:
    return prompt_parts(CHAT, {"messages": list(messages), **fields})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def keys(parts: list[bytes]) -> Prefix:
    return text_prefix(parts, SEED, 100)


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same JSON with the keys of every object in another order."""
    if isinstance(value, dict):
        items = [(name, shuffled(each, rng)) for name, each in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(each, rng) for each in value] if isinstance(value, list) else value


@given(
    conversation=conversations,
    tools=st.one_of(st.none(), st.lists(trees, max_size=3)),
    rng=st.randoms(use_true_random=False),
    ascii_only=st.booleans(),
)
def test_equal_json_has_equal_pieces(
    conversation: list[dict[str, Any]], tools: Any, rng: random.Random, ascii_only: bool
) -> None:
    body = {"model": "chat", "messages": conversation, "tools": tools, "temperature": 0.5}
    rewritten = shuffled(body, rng)
    for message in rewritten["messages"]:
        if rng.random() < 0.5:
            message["content"] = [{"text": message["content"], "type": "text"}]
        if rng.random() < 0.5:
            message["refusal"] = None
    one = parse(orjson.dumps(body)).fields
    other = parse(json.dumps(rewritten, ensure_ascii=ascii_only, indent=2).encode()).fields
    assert prompt_parts(CHAT, one) == prompt_parts(CHAT, other)
    assert not any(SEPARATOR in part for part in prompt_parts(CHAT, one))


@given(conversation=conversations, other=messages, data=st.data())
def test_a_change_in_one_message_leaves_all_keys_before_it(
    conversation: list[dict[str, Any]], other: dict[str, Any], data: st.DataObject
) -> None:
    for message in conversation:
        message["content"] *= 40
    number = data.draw(st.integers(0, len(conversation) - 1))
    changed = [*conversation]
    changed[number] = other
    before, after = chat(*conversation), chat(*changed)
    assert before[:number] == after[:number]
    unchanged = len(SEPARATOR.join(before[:number]))
    one, two = keys(before), keys(after)
    count = sum(end <= unchanged for end in one.ends)
    assert one.digests[:count] == two.digests[:count]
    if before[number] != after[number]:
        assert one.tails[0] != two.tails[0]


@given(conversation=conversations, answer=text, asked=text)
def test_the_next_turn_has_the_whole_of_the_last_among_its_tails(
    conversation: list[dict[str, Any]], answer: str, asked: str
) -> None:
    last = keys(chat(*conversation))
    following = keys(chat(*conversation, {"role": "assistant", "content": answer}, user(asked)))
    assert last.tails[0] in following.tails[:TAILS]


def test_an_agents_parallel_calls_do_not_hide_its_last_turn() -> None:
    asked = [{"role": "system", "content": "s" * 600}, user("weather?")]
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "weather", "arguments": "{}"}} for n in range(9)]
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": "rain"} for n in range(9)]
    answered = [*asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    assert keys(chat(*asked, tools=[TOOL])).tails[0] in keys(chat(*answered, tools=[TOOL])).tails


@given(conversation=st.lists(messages, min_size=2, max_size=4), character=st.characters(codec="utf-8"))
def test_no_character_can_move_over_a_boundary_unnoticed(conversation: list[dict[str, Any]], character: str) -> None:
    first, second, *others = conversation
    before = [{**first, "content": first["content"] + character}, second, *others]
    after = [first, {**second, "content": character + second["content"]}, *others]
    assert keys(chat(*before)).tails[0] != keys(chat(*after)).tails[0]
    role, content = first["role"], first["content"]
    in_role, in_content = {**first, "role": role + character}, {**first, "content": character + content}
    assert keys(chat(in_role, second)).tails[0] != keys(chat(in_content, second)).tails[0]
    merged = {**first, "content": content + second["content"]}
    assert keys(chat(merged, *others)).tails[0] != keys(chat(first, second, *others)).tails[0]


def test_parts_of_a_content_are_told_apart() -> None:
    a, b = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    ways = [
        user("ab"),
        user([a, b]),
        user([{"type": "text", "text": "ab"}, {"type": "text", "text": ""}]),
        user([{"type": "image_url", "image_url": {"url": "ab"}}]),
        user([a, {"type": "image_url", "image_url": {"url": "b"}}]),
        user(["a", "b", "c"]),
        {"role": "assistant", "content": "ab"},
        {**user("ab"), "name": "x"},
        user({"ab": 1}),
        user(7),
    ]
    assert len({tuple(chat(message)) for message in ways}) == len(ways)
    assert chat(user([a])) == chat(user("a")) == chat(user(["a"]))


def test_what_no_template_reads_makes_no_difference() -> None:
    plain = chat(user("a"))
    assert chat({**user("a"), "cache_control": {"type": "ephemeral"}}) == plain
    assert chat(user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}])) == plain
    assert chat(user("a"), temperature=1, stream=True, tools=[], functions=None, prompt="x", input="y") == plain
    none, empty = {"role": "assistant", "content": None}, {"role": "assistant", "content": ""}
    assert chat(none) == chat(empty) == chat({"role": "assistant"}) == chat({"role": "assistant", "content": []})


def test_tools_come_first_whatever_the_order_of_their_schemas() -> None:
    parts = chat({"role": "system", "content": "s"}, user("a"), tools=[TOOL])
    assert parts[1:] == chat({"role": "system", "content": "s"}, user("a"))
    assert b"weather" in parts[0]
    assert chat(user("a"), tools=[shuffled(TOOL, random.Random(1))])[0] == parts[0]
    other = {**TOOL, "function": {"name": "time"}}
    assert chat(user("a"), tools=[TOOL, other])[0] != chat(user("a"), tools=[other, TOOL])[0]


@pytest.mark.parametrize("name", ["name", "tool_calls", "tool_call_id", "reasoning_content", "something_new"])
def test_other_fields_of_a_message_belong_to_it(name: str) -> None:
    plain = {"role": "assistant", "content": "a"}
    assert chat({**plain, name: "x"}, user("b"))[0] != chat(plain, user("b"))[0]
    assert chat({**plain, name: "x"}, user("b"))[1] == chat(plain, user("b"))[1]
    assert chat({**plain, name: {"b": 1, "a": 2}}) == chat({name: {"a": 2, "b": 1}, **plain})


@pytest.mark.parametrize(
    "field", ["functions", "documents", "chat_template_kwargs", "reasoning_effort", "cache_salt", "extra_key"]
)
def test_what_templates_read_besides_the_messages_stands_before_them(field: str) -> None:
    parts = chat(user("a"), **{field: "x"})
    assert parts[1:] == chat(user("a"))
    assert len(parts) == 2


def test_prompts_of_completions() -> None:
    def parts(prompt: Any, **more: Any) -> list[bytes]:
        return prompt_parts(COMPLETIONS, {"prompt": prompt, **more})

    assert parts("abc") == parts(["abc"])
    assert parts([1, 2, 3]) == parts([[1, 2, 3]])
    assert len(parts(["a", "b"])) == len(parts([[1], [2]])) == 2
    different = [parts("1,2"), parts([1, 2]), parts(["1", "2"]), parts([[1], [2]]), parts(["ab"]), parts(["a", "b"])]
    assert len(set(map(tuple, different))) == len(different)
    assert parts("abc", suffix="x") != parts("abc", suffix="y")
    assert parts("abc", suffix="x")[0] == parts("abc")[0]
    assert parts("abc", suffix="") == parts("abc")
    # The ids of a longer prompt begin with those of a shorter one.
    short, long = keys(parts(list(range(1000)))), keys(parts(list(range(2000))))
    assert short.digests == long.digests[: len(short.digests)] != []
    assert prompt_parts(COMPLETIONS, {"messages": [user("a")]}) == parts(None) == parts([]) == []


def test_inputs_of_embeddings() -> None:
    assert prompt_parts(EMBEDDINGS, {"input": "abc"}) == prompt_parts(COMPLETIONS, {"prompt": "abc"}) != []
    assert len(prompt_parts(EMBEDDINGS, {"input": ["a", "b", "c"]})) == 3
    assert prompt_parts(EMBEDDINGS, {"prompt": "abc"}) == []


@given(path=st.sampled_from(PATHS), value=odd, tools=odd, other=odd)
def test_bodies_of_any_shape_have_some_keys_or_none(path: str, value: Any, tools: Any, other: Any) -> None:
    for name in ("messages", "prompt", "input"):
        for given_value in (
            value,
            [value],
            [value, other],
            [{"role": value, "content": other}],
            [user([value, other])],
        ):
            fields = {name: given_value, "tools": tools, "suffix": other, "prompt_cache_key": value}
            parts = prompt_parts(path, fields)
            assert not any(SEPARATOR in part for part in parts)
            prefix = keys(parts)
            assert bool(prefix.tails) == (prefix.total > 0) == bool(parts)
            session_of(fields, [], "t")
    assert prompt_parts(path, {}) == []


def test_what_no_parser_gives_does_no_harm() -> None:
    for odd_value in ("\udfff", 2**80, {1: 2}, {"\udfff": 1}, object, b"bytes", {1, 2}):
        for content in (odd_value, [odd_value], [{"type": "text", "text": odd_value}, odd_value]):
            assert keys(chat(user(content), tools=[odd_value])).tails
    assert keys(chat({"role": "\udfff", "content": "a"})).tails


def test_pictures_are_known_by_their_digest() -> None:
    rng = random.Random(7)
    url = "data:image/png;base64," + "".join(rng.choices(string.ascii_letters, k=1_048_576))

    def picture(url: str, **more: Any) -> dict[str, Any]:
        return user([{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url, **more}}])

    (part,) = chat(picture(url))
    assert len(part) < 200
    assert chat(picture(url)) == [part]
    assert chat(picture(url[:-1] + "!")) != [part]
    assert chat(picture(url, detail="low")) != [part]
    assert chat(picture("https://example.com/a.png")) != chat(picture("https://example.com/b.png"))
    fields = {"messages": [picture(url)]}
    took: list[float] = []
    for _ in range(30):
        begin = time.perf_counter()
        prompt_parts(CHAT, fields)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.001


def test_sound_and_unknown_media_are_known_by_their_digest() -> None:
    for kind in ("input_audio", "video_url", "file", "something_new"):
        (part,) = chat(user([{"type": kind, kind: {"data": "x" * 100_000, "format": "wav"}}]))
        assert len(part) < 250
        assert chat(user([{"type": kind, kind: {"data": "y" * 100_000, "format": "wav"}}])) != [part]


def test_a_long_prompt_is_scaled_by_its_tokens() -> None:
    parts = chat(user("word " * 1000))
    prefix = text_prefix(parts, SEED, 1000)
    assert prefix.ends[-1] * prefix.unit_tokens == pytest.approx(1000, rel=0.13)


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        ([], {}, None),
        ([], {"prompt_cache_key": "k"}, "t\x00k"),
        ([], {"prompt_cache_key": ""}, None),
        ([], {"prompt_cache_key": 7}, None),
        ([(b"x-session-id", b"s")], {"prompt_cache_key": "k"}, "t\x00s"),
        ([(b"x-session-id", b"s"), (b"x-tidegate-session", b"o")], {}, "t\x00o"),
        ([(b"x-tidegate-session", b"o"), (b"x-session-id", b"s")], {}, "t\x00o"),
        ([(b"x-tidegate-session", b""), (b"accept", b"*/*")], {"prompt_cache_key": "k"}, "t\x00k"),
        ([(b"x-tidegate-session", b"\xff")], {}, "t\x00\xff"),
    ],
)
def test_sessions(headers: list[tuple[bytes, bytes]], fields: dict[str, Any], expected: str | None) -> None:
    assert session_of(fields, headers, "t") == expected


def test_sessions_are_each_tenants_own_and_never_long() -> None:
    fields = {"prompt_cache_key": "x" * 100_000}
    one, other = session_of(fields, [], "a"), session_of(fields, [], "b")
    assert one is not None
    assert one != other
    assert len(one) < MAX_SESSION_CHARS
    assert one != session_of({"prompt_cache_key": "x" * 99_999}, [], "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{}] * 150_000},
        {"messages": [1] * 1_000_000},
        {"messages": [{"role": "user", "content": [1] * 1_000_000}]},
        {"messages": [{"role": "user", "content": [1] * 1000}] * 1000},
        {"messages": [{"role": "user", "content": [{"a": [1] * 1_000_000}]}]},
        {"prompt": ["x"] * 1_000_000},
        {"prompt": [[1]] * 150_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_hostile_bodies_take_no_longer_than_to_write_them(fields: dict[str, Any]) -> None:
    """Each of these took 0.3 to 3 seconds piece by piece."""
    path = CHAT if "messages" in fields else COMPLETIONS
    parts = prompt_parts(path, fields)
    assert 1 <= len(parts) <= 4097
    took: list[float] = []
    for _ in range(3):
        begin = time.process_time()
        keys(prompt_parts(path, fields))
        took.append(time.process_time() - begin)
    assert min(took) < 0.25
    name = next(iter(fields))
    shorter = prompt_parts(path, {name: fields[name][:-1]})
    assert shorter != parts
