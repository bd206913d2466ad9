"""One answer over several legs: what is kept of it, what is asked next, what the client sees, and what ends it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects import DIALECTS
from backends.dialects.protocol import CHAT, COMPLETIONS, NotOffered
from gateway.continuation import MAX_CONTINUATIONS, MAX_TEXT_BYTES, Continuation
from gateway.sse import StreamReader

SGLANG, VLLM, LLAMACPP = DIALECTS["sglang"], DIALECTS["vllm"], DIALECTS["llamacpp"]
MESSAGES = [{"role": "user", "content": "Say it."}]
ASKED: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stream": True, "max_tokens": 20, "seed": 7}
PROMPT_TOKENS = 11
ROLE: dict[str, Any] = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}


def chat(**fields: Any) -> Continuation:
    return Continuation.of(CHAT, {**ASKED, **fields}, 1)


def delta(text: Any, *, usage: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    chunk: dict[str, Any] = {
        "id": "a",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": finish}],
    }
    return chunk if usage is None else {**chunk, "usage": usage}


def counts(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **more}


def cut_after(continuation: Continuation, *texts: str) -> None:
    for text in texts:
        continuation.observe(delta(text))
    assert continuation.cut() == ""


def shown(passed: bytes | None) -> dict[str, Any]:
    assert passed is not None
    assert passed.startswith(b"data: ")
    assert passed.endswith(b"\n\n")
    found: dict[str, Any] = json.loads(passed[6:])
    return found


# Any stream, cut anywhere.


class Engine:
    """A replica that says what comes after a beginning, with an id of its own. A token is a piece of the text."""

    def __init__(self, pieces: list[str], name: int, *, chat: bool, counting: bool) -> None:
        self._pieces = pieces
        self._name = name
        self._chat = chat
        self._counting = counting

    def stream(self, begun: str) -> bytes:
        left = list(self._pieces)
        while begun:
            assert begun.startswith(left[0]), "only whole pieces were ever sent"
            begun = begun.removeprefix(left.pop(0))
        prompt = PROMPT_TOKENS + len(self._pieces) - len(left)
        events = []
        if self._chat:
            events.append(self._event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}))
        for number, piece in enumerate(left, 1):
            said = {"delta": {"content": piece}} if self._chat else {"text": piece}
            usage = {"usage": counts(prompt, number)} if self._counting else {}
            events.append(self._event({**said, "finish_reason": None}, **usage))
        events.append(self._event({**({"delta": {}} if self._chat else {"text": ""}), "finish_reason": "stop"}))
        events.append(self._chunk(choices=[], usage=counts(prompt, len(left))))
        return b"".join(events) + b"data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any], **more: Any) -> bytes:
        return self._chunk(choices=[{"index": 0, **choice}], **more)

    def _chunk(self, **members: Any) -> bytes:
        head = {"id": f"c-{self._name}", "created": 1000 + self._name, "model": f"m{self._name}"}
        return b"data: " + json.dumps({**head, **members}).encode() + b"\n\n"


PIECES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=12)
CUTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=MAX_CONTINUATIONS)
"""Where each leg breaks off, and where the read before ended, in parts of what there is."""


@given(PIECES, CUTS, st.booleans(), st.booleans(), st.booleans())
def test_any_stream_cut_anywhere_is_one_stream_to_the_client(
    pieces: list[str], cuts: list[tuple[float, float]], is_chat: bool, counting: bool, wants_usage: bool
) -> None:
    prompt = "" if is_chat else "Once "
    own = {"messages": MESSAGES} if is_chat else {"prompt": prompt}
    body: dict[str, Any] = {**own, "max_tokens": 100}
    continuation = Continuation.of(CHAT if is_chat else COMPLETIONS, body, 1)
    dialect = SGLANG if counting else LLAMACPP
    continuation.counting(dialect)
    received = b""
    reader = StreamReader()
    for leg, (cut, middle) in enumerate([*cuts, (1.0, 0.5)]):
        engine = Engine(pieces, leg, chat=is_chat, counting=counting)
        begun = body["messages"][1:] if is_chat else body["prompt"].removeprefix(prompt)
        sent = engine.stream(begun[0]["content"] if is_chat and begun else "".join(begun))
        end = round(len(sent) * cut)
        reader = StreamReader(hide_usage=not wants_usage, observe=continuation.observe)
        passed = reader.feed(sent[: round(end * middle)]) + reader.feed(sent[round(end * middle) : end])
        if reader.content_started or leg == len(cuts):
            received += passed
        if reader.complete:
            received += reader.feed(sent[end:])
            break
        if reader.content_started:  # else nothing was shown: another attempt at the same
            assert continuation.cut() == ""
            body = continuation.body(dialect).fields
            assert body["max_tokens"] == 100 - continuation.sent_tokens
    events = [json.loads(event[6:]) for event in received.split(b"\n\n") if event.startswith(b"data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    said = [choice["delta"].get("content") if is_chat else choice["text"] for choice in choices]
    assert "".join(text or "" for text in said) == "".join(pieces)
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert sum("role" in choice.get("delta", {}) for choice in choices) == (1 if is_chat else 0)
    assert [choice["finish_reason"] for choice in choices].count("stop") == 1
    assert received.endswith(b"data: [DONE]\n\n")
    assert received.count(b"[DONE]") == 1
    used = [event["usage"] for event in events if event.get("usage")]
    assert used == ([counts(PROMPT_TOKENS, len(pieces))] if wants_usage else [])
    assert reader.usage is not None
    assert (reader.usage.prompt_tokens, reader.usage.completion_tokens) == (PROMPT_TOKENS, len(pieces))


# What is asked next.


def test_the_next_leg_is_asked_for_with_the_text_and_what_is_left_of_its_tokens() -> None:
    continuation = chat(max_completion_tokens=30, n_predict=-1, min_tokens=2, temperature=0.5, logit_bias={"1": 2})
    cut_after(continuation, "One ", "two ", "three")
    body = continuation.body(LLAMACPP)
    assert json.loads(body.raw) == body.fields
    assert body.fields == {
        **ASKED,
        "messages": [*MESSAGES, {"role": "assistant", "content": "One two three"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 17,
        "max_completion_tokens": 27,
        "n_predict": -1,
        "min_tokens": 0,
        "temperature": 0.5,
        "logit_bias": {"1": 2},
        "timings_per_token": True,
    }
    assert continuation.sent_tokens == 3


def test_the_tokens_of_several_legs_add_up() -> None:
    continuation = chat()
    cut_after(continuation, "One ", "two ")
    cut_after(continuation, "three ")
    assert continuation.body(VLLM).fields["max_tokens"] == 17
    assert continuation.text == "One two three "


def test_a_token_that_the_engine_assumed_counts_too() -> None:
    continuation = Continuation.of(COMPLETIONS, {"prompt": "Once"}, 1)
    continuation.observe({"choices": [{"index": 0, "text": " upon"}]})
    assert continuation.cut() == ""
    fields = continuation.body(VLLM).fields
    assert (fields["prompt"], fields["max_tokens"]) == ("Once upon", 15)


@pytest.mark.parametrize(("text", "blank"), [("One", False), ("One\n", True), ("One\u00a0", True), ("\n\tOne", False)])
def test_white_space_at_the_end_is_known(text: str, blank: bool) -> None:
    continuation = chat()
    assert not continuation.ends_blank
    cut_after(continuation, text)
    assert continuation.ends_blank is blank


def test_an_engine_that_cannot_go_on_says_so() -> None:
    continuation = chat()
    cut_after(continuation, "One")
    with pytest.raises(NotOffered):
        continuation.body(DIALECTS["openai"])


def test_a_body_that_is_too_large_with_the_text_is_not_offered() -> None:
    continuation = chat()
    cut_after(continuation, "{" * 60_000, "{" * 60_000)
    with pytest.raises(NotOffered):
        continuation.body(LLAMACPP)


# Counting.


@pytest.mark.parametrize("dialect", [SGLANG, VLLM])
def test_engines_that_can_are_asked_to_count_and_the_client_does_not_see_it(dialect: Any) -> None:
    continuation = chat(stream_options={"include_usage": True, "other": 1})
    (options,) = continuation.counting(dialect).values()
    assert json.loads(options) == {"include_usage": True, "continuous_usage_stats": True, "other": 1}
    chunk = delta("One two ", usage=counts(11, 2))
    assert "usage" not in shown(continuation.observe(chunk))
    assert chunk["usage"] == counts(11, 2), "who settles the request still sees it"
    assert continuation.sent_tokens == 2
    assert continuation.observe({"id": "a", "choices": [], "usage": counts(11, 2)}) is None
    assert continuation.cut() == ""
    assert continuation.body(dialect).fields["max_tokens"] == 18
    assert continuation.body(dialect).fields["stream_options"]["continuous_usage_stats"] is True


def test_llamacpp_counts_in_its_own_words() -> None:
    continuation = chat()
    assert continuation.counting(LLAMACPP) == {"timings_per_token": b"true"}
    assert chat(timings_per_token=True).counting(LLAMACPP) == {}
    timings = {"predicted_n": 3, "prompt_n": 4, "cache_n": 7}
    assert "timings" not in shown(continuation.observe({**delta("\N{WATER WAVE}"), "timings": timings}))
    assert continuation.sent_tokens == 3
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "timings": {}, "usage": counts(11, 3)}
    assert continuation.observe(last) is None, "the engine tells both at the end, unasked"
    assert continuation.cut() == ""
    again = shown(continuation.observe({"choices": [], "timings": timings, "usage": counts(14, 2)}))
    assert again["usage"] == counts(11, 5)
    assert again["timings"] == timings


def test_others_are_not_asked_to_count() -> None:
    assert chat().counting(DIALECTS["openai"]) == {}


def test_a_client_that_asks_for_counts_gets_those_of_the_whole_answer() -> None:
    continuation = chat(stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert continuation.counting(VLLM) == {}
    assert continuation.observe(delta("One two ", usage=counts(11, 2))) is None
    assert continuation.cut() == ""
    assert shown(continuation.observe(delta("three", usage=counts(13, 1))))["usage"] == counts(11, 3)


def test_stream_options_of_another_kind_are_left_for_the_engine_to_refuse() -> None:
    assert chat(stream_options="all").counting(VLLM) == {}


def test_tokens_without_text_are_not_taken_for_sent() -> None:
    continuation = chat()
    continuation.counting(VLLM)
    continuation.observe(delta("Smile ", usage=counts(11, 2)))
    continuation.observe(delta("", usage=counts(11, 3)))  # the first bytes of an emoji
    assert continuation.sent_tokens == 2


def test_the_usage_is_the_whole_answers() -> None:
    continuation = chat()
    cut_after(continuation, "One ", "two ")
    chunk = {"choices": [], "usage": counts(13, 5, prompt_tokens_details={"cached_tokens": 12})}
    passed = shown(continuation.observe(chunk))
    assert passed["usage"] == counts(11, 7, prompt_tokens_details={"cached_tokens": 11})
    assert (passed["id"], passed["model"]) == ("a", "m")


def test_a_usage_that_is_none_is_left_alone() -> None:
    continuation = chat()
    cut_after(continuation, "One ")
    assert shown(continuation.observe({"choices": [], "usage": {"prompt_tokens": "x"}}))["usage"] == {
        "prompt_tokens": "x"
    }


# What the client sees.


def test_the_first_leg_passes_byte_for_byte() -> None:
    continuation = chat()
    for chunk in (dict(ROLE), delta("One"), delta("", finish="stop"), {"choices": [], "usage": counts(1, 1)}):
        assert continuation.observe(chunk) is None


def test_a_later_leg_speaks_with_the_first_ones_voice() -> None:
    continuation = chat()
    continuation.observe({**delta("One "), "system_fingerprint": "f"})
    assert continuation.cut() == ""
    assert continuation.observe({"id": "b", **ROLE}) == b""
    later = {**delta("two", role="assistant", logprobs=None), "id": "b", "created": 9, "model": "other", "t": 5}
    assert shown(continuation.observe(later)) == {
        **delta("two", logprobs=None),
        "system_fingerprint": "f",
        "t": 5,
    }
    end = shown(continuation.observe({**delta("", finish="length", role="assistant"), "id": "b"}))
    assert (end["id"], end["choices"][0]["finish_reason"]) == ("a", "length")
    assert "role" not in end["choices"][0]["delta"]


def test_the_head_is_that_of_the_attempt_whose_content_was_shown() -> None:
    continuation = chat()
    continuation.observe({"id": "lost", "created": 0, "model": "m", **ROLE})
    continuation.observe({"id": "a", "created": 1, "model": "m", **ROLE})
    cut_after(continuation, "One ")
    assert shown(continuation.observe({**delta("two"), "id": "b"}))["id"] == "a"


def test_an_event_nested_too_deeply_to_be_written_passes_as_it_came() -> None:
    continuation = chat()
    cut_after(continuation, "One ")
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    assert continuation.observe({**delta("two"), "deep": deep}) is None


# What ends honestly.


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "n"),
        ({"n_cmpl": 2}, "n"),
        ({"use_beam_search": True}, "n"),
        ({"response_format": {"type": "json_object"}}, "structured_output"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "structured_output"),
        ({"response_format": "json"}, "structured_output"),
        ({"guided_json": {"type": "object"}}, "structured_output"),
        ({"guided_regex": "a+"}, "structured_output"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_output"),
        ({"regex": "a+"}, "structured_output"),
        ({"ebnf": "root ::= x"}, "structured_output"),
        ({"grammar": "root ::= x"}, "structured_output"),
        ({"json_schema": {"type": "object"}}, "structured_output"),
        ({"structural_tag": "{}"}, "structured_output"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "tool_choice"),
        ({"echo": True}, "echo"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "audio"),
        ({"prompt_logprobs": 0}, "engine_details"),
        ({"return_token_ids": True}, "engine_details"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "One"}]}, "assistant_last"),
        ({"continue_final_message": True}, "assistant_last"),
        ({"add_generation_prompt": False}, "assistant_last"),
        ({"messages": "Say it."}, "messages"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_gone_on_with_is_known_at_once(fields: dict[str, Any], reason: str) -> None:
    continuation = chat(**fields)
    assert continuation.refusal == reason
    continuation.observe(delta("One"))
    assert continuation.cut() == reason
    assert continuation.continuations == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{}], "tool_choice": "auto"},
        {"tools": [{}]},
        {"tool_choice": "none", "function_call": "auto"},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "grammar": ""},
        {"n": 1, "best_of": None, "echo": False, "return_token_ids": False},
        {"modalities": ["text"], "audio": None},
        {"logprobs": True, "top_logprobs": 2},
    ],
)
def test_what_only_looks_like_it_goes_on(fields: dict[str, Any]) -> None:
    continuation = chat(**fields)
    cut_after(continuation, "One")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "Once", "logprobs": 0}, "logprobs_of_completions"),
        ({"prompt": "Once", "logprobs": 3}, "logprobs_of_completions"),
        ({"prompt": "Once", "suffix": "end"}, "suffix"),
        ({"prompt": "Once", "echo": True}, "echo"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["Once"]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "Once", "logprobs": None}, ""),
    ],
)
def test_text_completions_that_cannot_be_gone_on_with(fields: dict[str, Any], reason: str) -> None:
    assert Continuation.of(COMPLETIONS, fields, 1).refusal == reason


def test_several_prompts_and_other_paths_cannot() -> None:
    assert Continuation.of(COMPLETIONS, {"prompt": "Once"}, 2).refusal == "n"
    assert Continuation.of("/v1/embeddings", {"input": "x"}, 1).refusal == "path"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}, "tool_call"),
        ({"function_call": {"name": "f"}}, "tool_call"),
        ({"reasoning_content": "Hm."}, "reasoning"),
        ({"reasoning": "Hm."}, "reasoning"),
        ({"refusal": "No."}, "refusal"),
        ({"audio": {"data": "x"}}, "audio"),
        ({"gen_tokens": [1]}, "other_content"),
        ({"content": [{"type": "text", "text": "x"}]}, "other_content"),
        ({"tool_calls": None, "reasoning_content": "", "role": "assistant"}, ""),
    ],
)
def test_what_is_no_text_ends_it(more: dict[str, Any], reason: str) -> None:
    continuation = chat()
    continuation.observe(delta("One "))
    chunk = delta(None)
    chunk["choices"][0]["delta"] |= more
    continuation.observe(chunk)
    assert continuation.refusal == reason
    assert continuation.cut() == reason


def test_a_second_choice_that_nobody_asked_for_ends_it() -> None:
    continuation = chat()
    continuation.observe({"choices": [{"index": 1, "delta": {"content": "x"}}]})
    assert continuation.cut() == "n"


def test_an_event_that_cannot_be_read_ends_it() -> None:
    continuation = chat()
    reader = StreamReader(observe=continuation.observe)
    event = b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n'
    assert reader.feed(event) == event
    assert continuation.cut() == "unreadable"


def test_a_text_that_grows_too_long_is_let_go() -> None:
    continuation = chat()
    for _ in range(4):
        continuation.observe(delta("ü" * (MAX_TEXT_BYTES // 8)))
    assert continuation.refusal == ""
    continuation.observe(delta("x"))
    assert (continuation.refusal, continuation.text) == ("too_long", "")


def test_a_request_that_killed_two_replicas_at_the_same_point_is_not_given_to_a_third() -> None:
    continuation = chat()
    cut_after(continuation, "One ")
    continuation.observe(dict(ROLE))
    assert continuation.cut() == "no_progress"
    assert continuation.continuations == 1


def test_an_answer_is_gone_on_with_a_few_times_only() -> None:
    continuation = chat()
    for _ in range(MAX_CONTINUATIONS):
        cut_after(continuation, "more ")
    continuation.observe(delta("more "))
    assert continuation.cut() == "too_often"


@pytest.mark.parametrize("is_chat", [True, False])
def test_an_answer_that_had_all_its_tokens_is_ended_and_not_gone_on_with(is_chat: bool) -> None:
    """A replica may die between the last token and the event that says why the answer ends."""
    own = {"messages": MESSAGES} if is_chat else {"prompt": "Once"}
    continuation = Continuation.of(CHAT if is_chat else COMPLETIONS, {**own, "max_tokens": 2}, 1)
    pieces = ["One ", "two "]
    reader = StreamReader(observe=continuation.observe)
    reader.feed(Engine(pieces, 0, chat=is_chat, counting=False).stream("").partition(b'"stop"')[0])
    assert continuation.cut() == ""
    assert continuation.body(LLAMACPP).fields["max_tokens"] == 1
    reader = StreamReader(observe=continuation.observe)
    passed = reader.feed(Engine([*pieces, "three"], 1, chat=is_chat, counting=False).stream("One two "))
    (end, used) = [shown(event + b"\n\n") for event in passed.split(b"\n\n") if event.startswith(b"data: {")]
    said: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    assert end["choices"] == [{"index": 0, **said, "finish_reason": "length"}]
    assert used["usage"] == counts(PROMPT_TOKENS, 2)
    assert reader.complete
