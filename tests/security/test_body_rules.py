"""S9 and S10: which fields of a body reach an engine, and how large they may be."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.dialects import DIALECTS
from gateway.body import MAX_DEPTH, parse
from gateway.body_rules import CHOICES, GRAMMARS, LISTS, LOGPROBS, PATTERNS, PENALTIES, BodyRules, body_rules
from gateway.config import Backend, Caps
from gateway.errors import InvalidRequest
from gateway.order import CHAT, COMPLETIONS, EMBEDDINGS
from tests.security.engine_fields import CAPPED, PASSED, READ, RESERVED, RISKY

ENGINES = ("vllm", "sglang")
ROOT = Path(__file__).parents[2]
SOURCES = {
    "vllm": (
        *("entrypoints/openai/chat_completion/protocol.py", "entrypoints/openai/completion/protocol.py"),
        *("entrypoints/pooling/base/protocol.py", "entrypoints/pooling/embed/protocol.py"),
    ),
    "sglang": ("srt/entrypoints/openai/protocol.py",),
}
CLASSES = frozenset(
    {
        *("ChatCompletionRequest", "CompletionRequest", "PDRoutingFields", "EmbeddingRequest"),
        *("PoolingBasicRequestMixin", "CompletionRequestMixin", "ChatRequestOptionsMixin", "ChatRequestMixin"),
        *("EncodingRequestMixin", "EmbedRequestMixin", "EmbeddingTokenizeParamsMixin", "PoolingTokenizeParamsMixin"),
    }
)


def rules(engine: str = "vllm", caps: Caps | None = None, **backend: Any) -> BodyRules:
    settings = Backend(engine=engine, replicas=[{"url": "http://127.0.0.1:1", "name": "a"}], **backend)  # type: ignore[arg-type]
    dialect = DIALECTS[settings.engine]
    return body_rules(settings, [dialect], dialect.hosted, caps or Caps())


def refusal(found: BodyRules, path: str = CHAT, /, **fields: Any) -> tuple[str | None, str | None] | None:
    """Code and parameter of the refusal; None when the body passes."""
    try:
        found.check(path, parse(json.dumps({"model": "m", "messages": [], **fields}).encode()))
    except InvalidRequest as error:
        return error.code, error.param
    return None


# -- every field that the engines know


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_what_steers_the_engine_is_refused_whatever_it_holds(engine: str, path: str) -> None:
    for field in RESERVED[engine].split():
        for value in (1, "x", {"a": 1}, [1], True, ""):
            assert refusal(rules(engine), path, **{field: value}) == ("reserved_parameter", field)
        assert refusal(rules(engine, allow_fields=[field]), path, **{field: 1}) == ("reserved_parameter", field)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_has_stopped_engines_is_refused_unless_it_is_allowed(engine: str) -> None:
    for field in RISKY[engine].split():
        assert refusal(rules(engine), **{field: "x"}) == ("reserved_parameter", field)
        assert refusal(rules(engine, allow_fields=[field]), **{field: "x"}) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_else_passes(engine: str) -> None:
    for field in PASSED[engine].split():
        assert refusal(rules(engine), CHAT, **{field: 1}) is None, field
    assert (
        refusal(rules(engine), n=2, top_logprobs=5, stop=["x"], chat_template_kwargs={"enable_thinking": False}) is None
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_dialect_has_the_fields_of_the_table(engine: str) -> None:
    assert DIALECTS[engine].reserved == set(RESERVED[engine].split())
    assert DIALECTS[engine].risky == set(RISKY[engine].split())
    capped = {*CHOICES, *LOGPROBS, *GRAMMARS, *PATTERNS, *LISTS, *PENALTIES, "chat_template_kwargs"}
    assert set(CAPPED[engine].split()) <= capped


@pytest.mark.parametrize("engine", ENGINES)
def test_no_field_of_the_installed_engine_is_missing_from_the_table(engine: str) -> None:
    folders = list((ROOT / ".engines" / engine).glob(f"venv/lib/python3*/site-packages/{engine}"))
    if not folders:
        pytest.skip(f"{engine} is not installed here")
    known = {field for table in (RESERVED, RISKY, CAPPED, READ, PASSED) for field in table[engine].split()}
    found = {name for source in SOURCES[engine] for name in fields_in(folders[0] / source)}
    assert len(found) > 60
    assert found - known == set(), "decide what becomes of these when a client sends them"


def fields_in(source: Path) -> Iterator[str]:
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_":
                    yield line.target.id


@pytest.mark.parametrize("engine", DIALECTS)
def test_a_template_is_code_at_every_engine_of_ones_own(engine: str) -> None:
    if DIALECTS[engine].hosted:
        return
    assert refusal(rules(engine), chat_template="{{ x }}") == ("reserved_parameter", "chat_template")
    for name in ("chat_template", "tokenize", "conversation"):
        found = refusal(rules(engine), chat_template_kwargs={"enable_thinking": True, name: "{{ x }}"})
        assert found == ("reserved_parameter", f"chat_template_kwargs.{name}")


# -- sizes


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("n", 128, [129, 10_000, 2**70]),
        ("best_of", 128, [129, 10_000]),
        ("n_cmpl", 4, [129, "9999", 200.0]),
        ("logprobs", 20, [21, 10_000, -1, "21", 21.0]),
        ("logprobs", True, []),
        ("top_logprobs", 20, [21, -1]),
        ("prompt_logprobs", 20, [-1, 21, 200_000, True, "-1"]),
        ("n_probs", 0, [50_000]),
        ("regex", "[ab]{3}", ["(a+)+" * 1000]),
        ("guided_regex", "a", ["a" * 5000]),
        ("ebnf", 'root ::= "a"', ["x" * 140_000]),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"a": "b" * 1000}}},
            [{"a": "b" * 140_000}],
        ),
        ("structured_outputs", {"regex": "a" * 4096}, [{"regex": "a" * 4097}, {"grammar": "a" * 140_000}]),
        ("response_format", {"type": "regex", "pattern": "a"}, [{"type": "regex", "pattern": "a" * 4097}]),
        ("logit_bias", {str(n): 1 for n in range(1024)}, [{str(n): 1 for n in range(1025)}]),
        ("stop", ["x"] * 1024, [["x"] * 1025, "x" * 70_000]),
        ("bad_words", ["x"], [["x"] * 1025]),
        ("allowed_token_ids", [1, 2], [list(range(1025))]),
        ("stop_token_ids", [1], [[1] * 2000]),
        ("frequency_penalty", -2, [2.1, -2.1, 1e300, 10**400]),
        ("presence_penalty", 2.0, [3, -1e9]),
        ("repetition_penalty", 1.1, [-0.1, 1e30]),
    ],
)
def test_sizes_are_bounded(field: str, good: Any, bad: list[Any]) -> None:
    assert refusal(rules(), **{field: good}) is None
    assert refusal(rules(), CHAT, **{field: None}) is None
    for value in bad:
        found = refusal(rules(), **{field: value})
        assert found is not None, value
        if found[0] != "invalid_json":  # which is what the parser says of numbers beyond a double
            assert found[0] in ("value_out_of_range", "invalid_type"), value
            assert (found[1] or "").split(".")[0] == field


def test_the_operator_sets_the_ceilings() -> None:
    caps = Caps(choices=2, logprobs=0, output_tokens=100, grammar_bytes=10, pattern_bytes=3, list_items=1)
    small = rules(caps=caps)
    for fields in (
        *({"n": 3}, {"top_logprobs": 1}, {"max_tokens": 101}, {"max_completion_tokens": 101}, {"n_predict": 101}),
        *({"ebnf": "x" * 10}, {"regex": "xxx"}, {"stop": ["a", "b"]}),
    ):
        found = refusal(small, **fields)
        assert found is not None, fields
        assert found[0] == "value_out_of_range"
    assert refusal(small, n=2, max_tokens=100, regex="x", stop=["a"]) is None


def test_output_is_bounded_by_keys_and_not_by_default_here() -> None:
    assert refusal(rules(), max_tokens=10_000_000) is None


def test_depth_keys_and_brackets_are_bounded_before_anything_else() -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH + 1):
        deep = {"a": deep}
    for body in (
        json.dumps({"model": "m", "response_format": deep}),
        json.dumps({"model": "m", **{f"k{n}": 1 for n in range(1100)}}),
        '{"model": "m", "logit_bias": [' + "[]," * 250_000 + "[]]}",
    ):
        with pytest.raises(InvalidRequest):
            parse(body.encode())


def test_a_pool_of_several_engines_has_the_rules_of_all() -> None:
    settings = Backend(
        engine="vllm",
        replicas=[{"url": "http://127.0.0.1:1", "name": "a"}, {"url": "http://127.0.0.1:2", "name": "b"}],  # type: ignore[arg-type]
    )
    both = body_rules(settings, [DIALECTS["vllm"], DIALECTS["sglang"]], False, Caps())
    assert DIALECTS["vllm"].reserved | DIALECTS["sglang"].reserved <= both.refused
    assert not both.allow(CHAT, parse(b'{"bootstrap_host":"x"}'))
    assert both.allow(CHAT, parse(b'{"model":"m"}'))


def test_pictures_of_other_servers_are_fetched_by_hosted_apis_only() -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]}]
    assert refusal(rules("openai"), messages=picture) is not None
    assert refusal(rules("openrouter"), messages=picture) is None
    assert refusal(rules("openrouter", remote_media=[]), messages=picture) is not None
    assert refusal(rules("sglang", remote_media=["X.org"]), messages=picture) is None
    assert refusal(rules("sglang", remote_media=["*"]), messages=picture) is None


@pytest.mark.parametrize("name", sorted(PENALTIES))
@pytest.mark.parametrize("value", ["1e300", "-5", True, [9.0], {"a": 1}])
def test_a_penalty_that_an_engine_would_read_leniently_is_refused(name: str, value: Any) -> None:
    """Pydantic's lax mode, which vLLM and SGLang use, makes a number of `"1e300"`."""
    assert refusal(rules(), **{name: value}) == ("invalid_type", name)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict", "min_tokens"])
def test_no_end_of_output_is_more_than_any_cap(name: str) -> None:
    """llama.cpp and others take -1 for "until the context is full"."""
    assert refusal(rules("llamacpp", Caps(output_tokens=100)), **{name: -1}) == ("value_out_of_range", name)
    assert refusal(rules("llamacpp"), **{name: -1}) is None


_LONG = "(a+)+" * 1000
_SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "pattern": _LONG}}}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}},
        {"structured_outputs": {"json": _SCHEMA}},
        {"structured_outputs": {"json": json.dumps(_SCHEMA)}},
        {"json_schema": json.dumps(_SCHEMA)},
        {"guided_json": {"anyOf": [{"patternProperties": {_LONG: {}}}]}},
        {"response_format": {"type": "structural_tag", "structures": [{"begin": "x", "schema": _SCHEMA}]}},
        {"tools": [_TOOL], "tool_choice": "required"},
    ],
)
def test_a_pattern_inside_of_a_schema_is_a_pattern(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    code, param = refusal(rules(), **fields) or ("", "")
    assert (code, param and param.partition(".")[0]) == ("value_out_of_range", name)
    assert refusal(rules(caps=Caps(pattern_bytes=10_000)), **fields) is None


def test_a_property_may_be_called_pattern() -> None:
    schema = {"type": "object", "properties": {"pattern": {"type": "string", "description": "x" * 9000}}}
    assert refusal(rules(), response_format={"type": "json_schema", "json_schema": {"schema": schema}}) is None
    assert refusal(rules(), tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}]) is None
    assert refusal(rules(), json_schema="{not json") is None


def test_an_escape_does_not_hide_a_pattern() -> None:
    raw = json.dumps({"model": "m", "messages": [], "tools": [_TOOL]}).replace('"pattern"', '"\\u0070attern"')
    with pytest.raises(InvalidRequest, match="tools"):
        rules().check(CHAT, parse(raw.encode()))
