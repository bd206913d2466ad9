"""How urgent a request is, in each engine's words, and what becomes of a priority that the caller says itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from backends.dialects import DIALECTS
from backends.dialects.protocol import CHAT, Dialect, Priority, Wish
from backends.dialects.sglang import SGLang
from backends.dialects.trtllm import TrtLlm
from backends.dialects.vllm import VLLM

SAYING = {"sglang": SGLang(), "vllm": VLLM(), "trtllm": TrtLlm()}
"""The engines that read a priority."""


def priority(dialect: Dialect, own: Any = None, **wish: Any) -> Any:
    """What is set in the body: a number, None for JSON's null, "nothing" where it is left as it is."""
    fields: Mapping[str, Any] = {"model": "ours", "messages": [{"role": "user", "content": "x"}]} | (
        {} if own is None else {"priority": own}
    )
    values = dialect.prepare(Wish(path=CHAT, fields=fields, request_id="id-1", stream=False, **wish)).values
    return json.loads(values["priority"]) if "priority" in values else "nothing"


def test_each_engine_is_told_in_its_own_direction() -> None:
    assert [priority(SGLang(), urgency=each) for each in (-2, -1, 1, 7)] == [-2, -1, 1, 7]
    assert [priority(VLLM(), urgency=each) for each in (-2, -1, 1, 7)] == [2, 1, -1, -7]
    assert [priority(TrtLlm(), urgency=each) for each in (-1, 1)] == [0.25, 0.75]


def test_ordinary_requests_are_said_only_where_an_engine_puts_those_that_say_nothing_last() -> None:
    # SGLang 0.5.23, managers/scheduler.py `_set_or_validate_priority`: None becomes the lowest number there is.
    assert priority(SGLang(), urgency=0) == 0
    assert [priority(each, urgency=0) for each in (VLLM(), TrtLlm())] == ["nothing", "nothing"]


@pytest.mark.parametrize("dialect", SAYING.values(), ids=SAYING)
def test_a_class_takes_the_place_of_the_callers_own_priority(dialect: Dialect) -> None:
    for urgency in (-1, 0, 2):
        ordinary = priority(TrtLlm(), own=1, urgency=0) if dialect.name == "trtllm" else 0
        said = priority(dialect, own=99, urgency=urgency)
        assert said == (ordinary if urgency == 0 else priority(dialect, urgency=urgency))


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_without_classes_nothing_is_said_and_the_callers_own_is_left(dialect: Dialect) -> None:
    assert priority(dialect) == "nothing"
    if dialect.name in SAYING:
        assert priority(dialect, own=99) == "nothing"


@pytest.mark.parametrize("name", sorted(set(DIALECTS) - set(SAYING)))
def test_engines_without_priorities_are_told_none(name: str) -> None:
    dialect = DIALECTS[name]
    assert dialect.priority is Priority.NONE
    assert priority(dialect, urgency=3) == "nothing"


def test_an_sglang_that_was_started_the_other_way_round_is_told_so() -> None:
    assert priority(SGLang(), urgency=2, priority=Priority.LOWER_FIRST) == -2
    assert priority(SGLang(), urgency=2, priority=Priority.HIGHER_FIRST) == 2


def test_an_sglang_without_priorities_is_told_none_the_callers_own_neither() -> None:
    # It ignores them, or refuses with 503 where it has --abort-on-priority-when-disabled.
    assert priority(SGLang(), urgency=2, priority=Priority.NONE) == "nothing"
    assert priority(SGLang(), own=99, urgency=2, priority=Priority.NONE) is None
    assert priority(SGLang(), own=99, priority=Priority.NONE) == "nothing"
