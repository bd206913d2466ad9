"""Fallbacks and hedging in the configuration: what is taken, and what is refused where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import ConfigError, Settings, json_schema, load


def written(**model: Any) -> dict[str, Any]:
    return {
        "models": {
            "chat": {"backend": "pool", **model},
            "small": {"backend": "pool", "aliases": ["tiny"], "fallbacks": ["chat"]},
        },
        "backends": {
            "pool": {"engine": "sglang", "replicas": [{"url": "http://a"}]},
            "rented": {"engine": "openrouter", "replicas": [{"url": "https://b"}]},
            "mixed": {"engine": "sglang", "replicas": [{"url": "http://c"}, {"url": "https://d", "engine": "openai"}]},
        },
    }


def loaded(folder: Path, data: dict[str, Any]) -> Settings:
    path = folder / "tidegate.yaml"
    path.write_text(yaml.safe_dump(data))
    return load(path, {})


def problems(folder: Path, data: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as refused:
        loaded(folder, data)
    return [(problem.path, str(problem)) for problem in refused.value.problems]


def test_a_list_of_names_and_backends_is_taken_in_its_order_and_a_circle_too(tmp_path: Path) -> None:
    entries = [
        "small",
        {"backend": "rented", "upstream_model": "org/chat", "price": {"input": 1.0}},
        {"backend": "rented", "upstream_model": "org/chat-8b"},
        {"backend": "mixed"},
    ]
    first, second, third, fourth = loaded(tmp_path, written(fallbacks=entries)).models["chat"].fallbacks
    assert (first.model, first.backend) == ("small", None)
    assert (second.model, second.backend, second.upstream_model) == (None, "rented", "org/chat")
    assert second.price is not None
    assert (third.price, fourth.backend) == (None, "mixed")


@pytest.mark.parametrize(
    ("entries", "setting", "words"),
    [
        (["smal"], "[0]", '"smal" is not the name of a model; did you mean small?'),
        (["tiny"], "[0]", '"tiny" is not the name of a model; it is an alias; write small'),
        (["chat"], "[0]", "is the model itself"),
        (["small", "small"], "[1]", "is the same as fallbacks[0]; each is asked once"),
        ([{"backend": "rented"}, "small", {"backend": "rented"}], "[2]", "is the same as fallbacks[0]"),
        ([{"backend": "rent"}], "[0].backend", '"rent" is not the name of a backend; did you mean rented?'),
        ([{"backend": "pool"}], "[0].backend", "is the model's own backend"),
        ([{}], "[0]", "must name either another model or another backend"),
        ([{"model": "small", "backend": "rented"}], "[0]", "must name either another model or another backend"),
        ([{"model": "small", "price": {"input": 1.0}}], "[0].price", "belongs to an entry with a backend"),
        ([{"model": "small", "upstream_model": "x"}], "[0].upstream_model", "take it out; models.small has its own"),
        ([{"backend": "rented", "region": "eu"}], "[0].region", "is not a known setting"),
        ([7], "[0]", "is not a mapping"),
        ("small", "", "is not a list"),
        (["a b"], "[0]", "is not the name of a model"),
    ],
)
def test_a_bad_list_is_reported(tmp_path: Path, entries: Any, setting: str, words: str) -> None:
    (path, text), *others = problems(tmp_path, written(fallbacks=entries))
    assert path == f"models.chat.fallbacks{setting}"
    assert words in text
    assert len(others) == (entries == ["a b"])  # which could not be one either


def test_the_same_backend_is_another_fallback_under_another_name_of_the_model(tmp_path: Path) -> None:
    settings = loaded(tmp_path, written(fallbacks=[{"backend": "pool", "upstream_model": "chat-v2"}]))
    assert settings.models["chat"].fallbacks[0].upstream_model == "chat-v2"


def test_the_schema_knows_both_ways_of_writing_an_entry() -> None:
    entry = json_schema()["$defs"]["Model"]["properties"]["fallbacks"]["items"]
    assert {str(each.get("type") or each.get("$ref")) for each in entry["anyOf"]} == {"string", "#/$defs/Fallback"}


def test_hedging_is_off_unless_it_is_written_and_then_has_its_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, written()).models["chat"].hedge is None
    hedge = loaded(tmp_path, written(hedge={})).models["chat"].hedge
    assert hedge is not None
    assert (hedge.share, hedge.max_prompt_tokens, hedge.max_busy, hedge.min_delay_ms) == (0.02, 2048, 0.7, 50.0)


@pytest.mark.parametrize(("backend", "hosted"), [("rented", None), ("pool", True)])
def test_what_is_paid_for_is_not_asked_for_twice(tmp_path: Path, backend: str, hosted: bool | None) -> None:
    data = written(hedge={}, backend=backend)
    data["backends"][backend]["hosted"] = hosted
    ((path, text),) = problems(tmp_path, data)
    assert path == "models.chat.hedge"
    assert "is paid for twice; take it out" in text


def test_answers_of_hosted_apis_cannot_be_gone_on_with(tmp_path: Path) -> None:
    ((path, text),) = problems(tmp_path, written(continuation=True, backend="rented"))
    assert path == "models.chat.continuation"
    assert "cannot go on with another's answer; take it out" in text
    assert loaded(tmp_path, written(continuation=True, backend="mixed")).models["chat"].continuation
    assert not loaded(tmp_path, written(continuation=False, backend="rented")).models["chat"].continuation


def test_a_pool_with_some_rented_replicas_may_hedge_among_its_own(tmp_path: Path) -> None:
    data = written(hedge={}, backend="mixed")
    data["backends"]["mixed"]["replicas"][1]["engine"] = "openrouter"
    assert loaded(tmp_path, data).models["chat"].hedge is not None


@pytest.mark.parametrize(
    ("hedge", "setting", "words"),
    [
        ({"share": 0}, "share", "0 is too small"),
        ({"share": 0.6}, "share", "0.6 is too large; write at most 0.5"),
        ({"max_busy": 1.1}, "max_busy", "1.1 is too large"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens", "0 is too small"),
        ({"delay": 3}, "delay", "is not a known setting"),
    ],
)
def test_bad_hedging_is_reported(tmp_path: Path, hedge: dict[str, Any], setting: str, words: str) -> None:
    ((path, text),) = problems(tmp_path, written(hedge=hedge))
    assert path == f"models.chat.hedge.{setting}"
    assert words in text
