"""A whole answer out of a stream is what the engine itself answers without one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.assemble import Assembler
from backends.dialects.protocol import TranslationError

Tree = dict[str, Any]

HEAD = {"id": "c1", "created": 7, "model": "m", "system_fingerprint": "f"}


def chunk(*choices: Tree, **members: Any) -> Tree:
    return {**HEAD, "object": "chat.completion.chunk", "choices": list(choices), **members}


def choice(delta: Tree, finish: str | None = None, index: int = 0, **members: Any) -> Tree:
    return {"index": index, "delta": delta, "finish_reason": finish, **members}


def stream(chunks: Sequence[Any], *, done: bool = True) -> bytes:
    events = [b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks]
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def assembled(chunks: Sequence[Any], choices: int = 1, **options: Any) -> Any:
    assembler = Assembler(choices, **options)
    assert assembler.feed(stream(chunks)) == b""
    whole = assembler.assembled()
    return None if whole is None else json.loads(whole)


def message(chunks: Sequence[Any], **options: Any) -> Any:
    return assembled(chunks, **options)["choices"][0]["message"]


def test_text_usage_and_all_members_come_together() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert assembled(
        [
            chunk(choice({"role": "assistant", "content": ""}), usage=None),
            chunk(choice({"content": "Hé"}), usage=None, service_tier=None),
            chunk(choice({"content": "llo"}, token_count=1)),
            chunk(choice({}, "stop", stop_reason=13, token_count=2)),
            chunk(choice({}, None, stop_reason=None)),
            chunk(usage=usage, timings={"cache_n": 1}),
            chunk(usage=None, timings=None),
        ]
    ) == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Héllo"},
                "finish_reason": "stop",
                "stop_reason": 13,
                "token_count": 2,
            }
        ],
        "usage": usage,
        "timings": {"cache_n": 1},
        "service_tier": None,
    }


def test_parallel_tool_calls_are_told_apart_by_index() -> None:
    def call(index: int, **function: str) -> Tree:
        return {"index": index, "function": function}

    assert message(
        [
            chunk(choice({"role": "assistant", "content": None})),
            chunk(choice({"tool_calls": [{**call(0, name="look", arguments=""), "id": "a", "type": "function"}]})),
            chunk(choice({"tool_calls": [call(0, arguments='{"x":')]})),
            chunk(choice({"tool_calls": [{**call(1, name="go", arguments="{"), "id": "b", "type": "function"}]})),
            chunk(choice({"tool_calls": [call(1, arguments="}"), call(0, name="", arguments="1}")]}, "tool_calls")),
        ]
    ) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "go", "arguments": "{}"}},
        ],
    }


def test_calls_keep_their_order_whichever_begins_first() -> None:
    calls = [{"index": number, "id": str(number)} for number in (2, 0, 1)]
    said = message([*(chunk(choice({"tool_calls": [call]})) for call in calls), chunk(choice({}, "tool_calls"))])
    assert [call["id"] for call in said["tool_calls"]] == ["0", "1", "2"]


def test_usage_that_never_came_is_not_there() -> None:
    assert "usage" not in assembled([chunk(choice({"content": "x"}, "stop"), usage=None)])


def test_the_older_function_call_is_put_together() -> None:
    deltas: list[Tree] = [{"function_call": {"name": "go", "arguments": ""}}, {"function_call": {"arguments": "{}"}}]
    said = message([*(chunk(choice(delta)) for delta in deltas), chunk(choice({}, "function_call"))])
    assert said == {"role": "assistant", "content": None, "function_call": {"name": "go", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("deltas", "unsaid", "content"),
    [
        ([{"content": ""}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}], None, None),
        ([{"content": None}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}], "", ""),
        ([{"content": "so"}, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}], None, "so"),
        ([{"content": None}, {"reasoning_content": "hm"}], None, None),
        ([{"content": None}, {"reasoning_content": "hm"}], "", ""),
        ([{"content": ""}, {"reasoning_content": "hm"}], None, ""),
        ([{"content": None}], None, ""),
        ([{}], None, ""),
    ],
)
def test_content_that_was_never_said_is_as_the_engine_has_it(
    deltas: list[Tree], unsaid: str | None, content: str | None
) -> None:
    said = message([*(chunk(choice(delta)) for delta in deltas), chunk(choice({}, "stop"))], unsaid=unsaid)
    assert said["content"] == content


def test_reasoning_and_refusal_are_text_too() -> None:
    deltas: list[Tree] = [
        {"reasoning_content": "a", "reasoning": None},
        {"reasoning_content": "b"},
        {"refusal": "n"},
        {"refusal": "o"},
        {"content": "x", "annotations": [1]},
    ]
    assert message([*(chunk(choice(delta)) for delta in deltas), chunk(choice({}, "stop"))]) == {
        "role": "assistant",
        "content": "x",
        "refusal": "no",
        "reasoning_content": "ab",
        "reasoning": None,
        "annotations": [1],
    }


def test_log_probabilities_are_continued() -> None:
    first, second = {"token": "a", "logprob": -1.5}, {"token": "b", "logprob": -0.5}
    whole = assembled(
        [
            chunk(choice({"content": "a"}, logprobs={"content": [first], "refusal": None})),
            chunk(choice({"content": "b"}, logprobs={"content": [second]})),
            chunk(choice({}, "stop", logprobs=None)),
        ]
    )
    assert whole["choices"][0]["logprobs"] == {"content": [first, second], "refusal": None}


def test_text_completions_keep_their_form() -> None:
    def part(text: str, finish: str | None, logprobs: Any, index: int = 0) -> Tree:
        piece = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return {**HEAD, "object": "text_completion", "choices": [piece]}

    one = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    two = {"tokens": ["b"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -1.0}], "text_offset": [1]}
    whole = assembled(
        [part("b", None, None, 1), part("a", None, one), part("", "length", None, 1), part("b", "stop", two)], 2
    )
    assert whole == {
        **HEAD,
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": "ab",
                "finish_reason": "stop",
                "logprobs": {key: one[key] + two[key] for key in one},  # type: ignore[operator]
            },
            {"index": 1, "text": "b", "finish_reason": "length", "logprobs": None},
        ],
    }


def test_done_does_not_make_an_answer_complete() -> None:
    assert assembled([chunk(choice({"content": "half"}))]) is None
    assert assembled([]) is None
    finished = chunk(choice({"content": "x"}, "stop"))
    assert assembled([finished], 2) is None
    assert assembled([finished, chunk(choice({"content": "y"}, index=1))], 2) is None
    assert assembled([finished, chunk(choice({"content": "y"}, index=1))]) is None


def test_an_answer_whose_stream_broke_off_behind_it_is_complete() -> None:
    assembler = Assembler()
    assembler.feed(stream([chunk(choice({"content": "x"}, "stop"))], done=False))
    assert assembler.assembled() is not None


def test_a_body_that_is_no_stream_passes_through() -> None:
    assert Assembler().whole(b'{"choices": []}') == b'{"choices": []}'


def test_pings_and_null_events_say_nothing() -> None:
    assembler = Assembler()
    assembler.feed(b": ping\n\ndata: null\n\n" + stream([chunk(choice({"content": "x"}, "stop"))]))
    assert assembler.assembled() is not None


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (b'data: {"error":{"message":"no room","code":503}}', {"message": "no room", "code": 503}),
        (b'data: {"error":"no room"}', {"message": "no room"}),
        (b'data: {"object":"error","message":"no room"}', {"object": "error", "message": "no room"}),
        (b'event: error\ndata: {"message":"no room"}', {"message": "no room"}),
    ],
)
def test_an_error_in_the_stream_is_told(event: bytes, said: Tree) -> None:
    assembler = Assembler()
    assembler.feed(stream([chunk(choice({"content": "x"}))], done=False))
    with pytest.raises(TranslationError) as raised:
        assembler.feed(event + b"\n\n")
    assert raised.value.error == said


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b"3",
        b'{"choices":{}}',
        b'{"choices":[3]}',
        b'{"choices":[{"index":"0"}]}',
        b'{"choices":[{"index":0,"text":3}]}',
        b'{"choices":[{"index":0,"delta":{"content":["x"]}}]}',
        b'{"choices":[{"index":0,"delta":{"tool_calls":[3]}}]}',
        b'{"x":' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"choices":[{"index":0,"logprobs":{"content":' + b"[" * 400 + b"]" * 400 + b"}}]}",
    ],
)
def test_what_is_no_stream_of_chunks_is_refused(payload: bytes) -> None:
    with pytest.raises(TranslationError) as raised:
        Assembler().feed(b"data: " + payload + b"\n\n")
    assert raised.value.error["code"] == 502


def flood(tree: Tree) -> list[Tree]:
    return [tree] * 400


@pytest.mark.parametrize(
    "chunks",
    [
        flood(chunk(choice({"content": "x" * 20}))),
        flood(chunk(choice({"reasoning_content": "x" * 20}))),
        flood({"choices": [{"index": 0, "text": "x" * 20}]}),
        flood(chunk(choice({"tool_calls": [{"index": 0, "function": {"arguments": "x" * 20}}]}))),
        flood(chunk(choice({}, logprobs={"content": [{"token": "x", "logprob": -1.0}]}))),
        [{"choices": [{"index": number}]} for number in range(4)],
        [chunk(choice({"tool_calls": [{"index": number}]})) for number in range(12)],
        [chunk(**{f"member{number}": number}) for number in range(25)],
        [chunk(choice({f"member{number}": number})) for number in range(25)],
        [chunk(timings="x" * 5000)],
        [chunk(choice({}, logprobs={"content": [0]}))] * 90,
    ],
)
def test_what_is_kept_is_bounded(chunks: list[Tree]) -> None:
    with pytest.raises(TranslationError, match="5000 bytes"):
        Assembler(limit_bytes=5000).feed(stream(chunks))


def test_what_replaces_an_older_value_is_not_counted_again() -> None:
    chunks = flood(chunk(choice({}), timings={"n": 12345}))
    assert assembled([*chunks, chunk(choice({}, "stop"))], limit_bytes=5000) is not None


@pytest.mark.parametrize("values", [(1, True, 1.0, "1"), ("x" * 300, "y", "x" * 300, None), (0, None, [0], 0), ("", 0)])
def test_the_last_value_wins_whatever_its_type(values: tuple[Any, ...]) -> None:
    for end in range(1, len(values) + 1):
        whole = assembled([*(chunk(service_tier=value) for value in values[:end]), chunk(choice({}, "stop"))])
        last = [value for value in values[:end] if value is not None][-1]
        assert whole["service_tier"] == last
        assert type(whole["service_tier"]) is type(last)


def test_an_event_without_an_end_is_bounded() -> None:
    assembler = Assembler(limit_bytes=3000)
    assembler.feed(b"data: " + b"x" * 2900)
    with pytest.raises(TranslationError, match="3000 bytes"):
        assembler.feed(b"x" * 200)


SAMPLE = stream(
    [
        chunk(choice({"role": "assistant", "content": "é😀"}, logprobs={"content": [{"token": "é"}]})),
        chunk(choice({"content": "\n\ndata: x"}), choice({"content": "b"}, index=1)),
        chunk(choice({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}, "stop")),
        chunk(choice({}, "length", 1)),
        chunk(usage={"prompt_tokens": 1}),
    ]
)


@given(st.lists(st.integers(0, len(SAMPLE))), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_chunking_assembles_the_same(cuts: list[int], line_end: bytes) -> None:
    data = SAMPLE.replace(b"\n", line_end)
    at_once, piecewise = Assembler(2), Assembler(2)
    at_once.feed(data)
    places = sorted({0, *cuts, len(data)})
    for start, end in itertools.pairwise(places):
        piecewise.feed(data[start:end])
    assert piecewise.assembled() == at_once.assembled() is not None


TEXT = st.text(max_size=12)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXT,
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": st.text(min_size=1, max_size=5), "arguments": TEXT}),
        }
    ),
    min_size=1,
    max_size=3,
)
TOKENS = st.lists(st.fixed_dictionaries({"token": TEXT, "logprob": st.floats(-9, 0)}), max_size=4)


@st.composite
def messages(draw: st.DrawFn) -> Tree:
    tree: Tree = {"role": "assistant"}
    if draw(st.booleans()):
        tree["tool_calls"] = draw(CALLS)
    for name in ("refusal", "reasoning_content", "reasoning"):
        if draw(st.booleans()):
            tree[name] = draw(TEXT)
    tree["content"] = draw(TEXT)
    if not tree["content"] and "tool_calls" in tree:
        tree["content"] = None
    return tree


@st.composite
def wholes(draw: st.DrawFn) -> Tree:
    """Whole chat completions as engines answer them."""
    choices = []
    for index in range(draw(st.integers(1, 3))):
        tree: Tree = {
            "index": index,
            "message": draw(messages()),
            "finish_reason": draw(st.sampled_from(["stop", "x"])),
        }
        if draw(st.booleans()):
            tree["logprobs"] = draw(st.none() | st.fixed_dictionaries({"content": TOKENS}))
        if draw(st.booleans()):
            tree["stop_reason"] = draw(st.none() | st.integers(0, 9) | TEXT)
        choices.append(tree)
    usage = {"prompt_tokens": draw(st.integers(0, 9)), "completion_tokens": 1}
    return {**HEAD, "object": "chat.completion", "choices": choices, "usage": usage, "timings": {"cache_n": 1}}


def pieces(draw: st.DrawFn, text: str | None) -> list[str | None]:
    if text is None:
        return [None]
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=3))})
    return [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]


def deltas_of(draw: st.DrawFn, said: Tree) -> list[Tree]:
    deltas: list[Tree] = [{"role": said["role"]}]
    for name in ("content", "refusal", "reasoning_content", "reasoning"):
        if name in said:
            deltas += [{name: piece} for piece in pieces(draw, said[name])]
    for number, call in enumerate(said.get("tool_calls", ())):
        opening = {**call, "index": number, "function": {"name": call["function"]["name"]}}
        deltas.append({"tool_calls": [opening]})
        for piece in pieces(draw, call["function"]["arguments"]):
            deltas.append({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
    return deltas


@st.composite
def streamed(draw: st.DrawFn) -> tuple[Tree, list[Tree]]:
    """A whole answer, and chunks that say the same with the choices' chunks mixed."""
    whole = draw(wholes())
    queues: list[list[Tree]] = []
    for each in whole["choices"]:
        queue = [choice(delta, None, each["index"]) for delta in deltas_of(draw, each["message"])]
        if "logprobs" in each:
            tokens = each["logprobs"]
            parts: list[Any] = [None] if tokens is None else [{"content": [token]} for token in tokens["content"]]
            queue += [choice({}, None, each["index"], logprobs=part) for part in parts or [{"content": []}]]
        rest = {key: value for key, value in each.items() if key not in ("index", "message", "logprobs")}
        queues.append([*queue, {"index": each["index"], "delta": {}, **rest}])
    chunks = []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        chunks.append(chunk(queue.pop(0), usage=None))
    return whole, [*chunks, chunk(usage=whole["usage"], timings=whole["timings"])]


@given(streamed())
def test_what_was_taken_apart_comes_together_again(both: tuple[Tree, list[Tree]]) -> None:
    whole, chunks = both
    assert assembled(chunks, len(whole["choices"])) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "index", "content", "tool_calls", "function", "arguments", "text"])
            | st.sampled_from(["logprobs", "finish_reason", "usage", "error", "object", "function_call", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(st.binary(max_size=20) | JSON.map(lambda tree: b"data: " + json.dumps(tree).encode() + b"\n\n")))
def test_no_stream_breaks_it(parts: list[bytes]) -> None:
    assembler = Assembler()
    with contextlib.suppress(TranslationError):
        for part in parts:
            assert assembler.feed(part) == b""
    whole = assembler.assembled()
    assert whole is None or isinstance(json.loads(whole), dict)
