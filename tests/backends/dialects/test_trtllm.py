"""TensorRT-LLM, against replies written after its source (see `recorded/trtllm/replies.json`)."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.protocol import CHAT, Adapter, EngineLoad, NotOffered, Readiness, Untranslatable, Wish
from backends.dialects.trtllm import (
    TrtLlm,
    adapter_number,
    load_from_iterations,
    load_from_page,
    priority_of,
)
from backends.side import Answer, SideChannelError
from tests.backends.dialects.replies import answering, recorded

REPLIES = recorded("trtllm/replies")
SQL = Adapter("sql", "/adapters/sql")


def wish(**kwargs: Any) -> Wish:
    return Wish(CHAT, {"messages": []}, "r1", kwargs.pop("stream", False), **kwargs)


async def test_the_newest_iteration_is_the_load() -> None:
    async with answering(REPLIES["plain"]) as side:
        load = await TrtLlm().load(side, None)
    assert load == EngineLoad(
        running=4,
        max_running=2048,
        waiting=2,
        kv_use=3 / 101256,
        kv_used_tokens=3 * 32,
        kv_capacity_tokens=101256 * 32,
    )


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({"maxBatchSizeRuntime": 64, "maxNumActiveRequests": 2048}, 64),
        ({"maxBatchSizeRuntime": 0, "maxNumActiveRequests": 256}, 256),
        ({"maxNumActiveRequests": "256"}, None),
    ],
)
async def test_requests_at_once_are_the_smaller_bound_that_is_one(stats: dict[str, Any], expected: int | None) -> None:
    async with answering({"GET /metrics": {"status": 200, "body": json.dumps([stats])}}) as side:
        assert (await TrtLlm().load(side, None)).max_running == expected


async def test_no_new_iteration_is_no_news_and_no_missing_signal() -> None:
    async with answering(REPLIES["nothing_new"]) as side:
        assert await TrtLlm().load(side, None) == EngineLoad()


async def test_the_page_that_forgets_nothing_is_preferred() -> None:
    async with answering(REPLIES["prometheus"]) as side:
        load = await TrtLlm().load(side, None)
    assert load == EngineLoad(
        running=4,
        waiting=2,
        kv_use=0.25,
        kv_used_tokens=8000,
        kv_capacity_tokens=32000,
        generated_tokens_total=12345,
    )


async def test_a_page_without_the_queue_is_not_enough() -> None:
    async with answering(REPLIES["old_prometheus"]) as side:
        assert (await TrtLlm().load(side, None)).running == 4


async def test_what_is_not_there_is_not_offered() -> None:
    dialect = TrtLlm()
    async with answering({}) as side:
        with pytest.raises(NotOffered, match="enable_iter_perf_stats"):
            await dialect.load(side, None)
        with pytest.raises(NotOffered, match="ranks"):
            await dialect.load(side, 0)
        with pytest.raises(NotOffered):
            await dialect.adapters(side)
        with pytest.raises(NotOffered):
            await dialect.load_adapter(side, "sql", "/adapters/sql")
        with pytest.raises(NotOffered):
            await dialect.unload_adapter(side, "sql")
    assert dialect.abort_request("r1") is None


async def test_it_says_version_model_and_where_it_can_its_cache() -> None:
    async with answering(REPLIES["plain"]) as side:
        plain = await TrtLlm().info(side)
    async with answering(REPLIES["prometheus"]) as side:
        measured = await TrtLlm().info(side)
    assert (plain.version, plain.models, plain.epoch) == ("1.4.0rc1", ("TinyLlama-1.1B-Chat-v1.0",), None)
    assert (plain.kv_capacity_tokens, plain.block_size) == (None, None)
    assert (measured.kv_capacity_tokens, measured.block_size) == (32000, 32)


async def test_a_dead_executor_takes_no_work() -> None:
    async with answering(REPLIES["plain"]) as side:
        assert await TrtLlm().probe(side, "m") is Readiness.READY
    async with answering(REPLIES["dead"]) as side:
        assert await TrtLlm().probe(side, "m") is Readiness.NOT_READY


def test_an_adapter_is_named_with_its_path() -> None:
    prepared = TrtLlm().prepare(wish(adapter="sql", adapters=[Adapter("poems", "/adapters/poems"), SQL]))
    sent = json.loads(prepared.values["lora_request"])
    assert sent == {"lora_name": "sql", "lora_int_id": adapter_number(SQL), "lora_path": "/adapters/sql"}


@pytest.mark.parametrize("adapters", [[], [Adapter("poems", "/adapters/poems")], [Adapter("sql")]])
def test_an_adapter_of_unknown_path_cannot_be_asked_for(adapters: list[Adapter]) -> None:
    with pytest.raises(Untranslatable):
        TrtLlm().prepare(wish(adapter="sql", adapters=adapters))


def test_an_adapter_at_a_new_path_gets_a_new_number_and_keeps_its_own() -> None:
    assert adapter_number(SQL) == adapter_number(Adapter("sql", "/adapters/sql")) > 0
    assert adapter_number(SQL) != adapter_number(Adapter("sql", "/adapters/sql-2"))
    assert adapter_number(Adapter("sql", "/adapters/sql", id=7)) == 7


def test_the_base_model_is_asked_for_without_more() -> None:
    assert TrtLlm().prepare(wish(model="m")).values == {"model": b'"m"'}


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_urgency_keeps_its_order_within_the_range(one: int, other: int) -> None:
    assert 0 < priority_of(one) < 1
    assert (one < other) == (priority_of(one) < priority_of(other))


def test_urgency_is_sent_as_a_fraction() -> None:
    assert json.loads(TrtLlm().prepare(wish(urgency=1)).values["priority"]) == 0.75
    assert "priority" not in TrtLlm().prepare(wish()).values


def test_cached_tokens_are_in_the_usage() -> None:
    usage = TrtLlm().read_usage(REPLIES["usage"])
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (70, 3, 64)


@pytest.mark.parametrize(
    ("stats", "use", "used"),
    [
        ({"maxNumBlocks": 10, "usedNumBlocks": 11, "tokensPerBlock": 32}, 1.0, 352),
        ({"maxNumBlocks": 10, "freeNumBlocks": 6, "tokensPerBlock": 32}, 0.4, 128),
        ({"maxNumBlocks": 10, "freeNumBlocks": 60, "tokensPerBlock": 32}, None, None),
        ({"maxNumBlocks": 0, "usedNumBlocks": 0}, None, None),
        (None, None, None),
    ],
)
def test_the_cache_is_read_as_far_as_it_is_told(stats: Any, use: float | None, used: int | None) -> None:
    load = load_from_iterations(Answer("engine/metrics", 200, json.dumps([{"kvCacheStats": stats}, 3]).encode()))
    assert (load.kv_use, load.kv_used_tokens) == (use, used)


VALUE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
STATS = st.dictionaries(
    st.sampled_from(["numActiveRequests", "numQueuedRequests", "kvCacheStats", "iter"]),
    VALUE
    | st.dictionaries(st.sampled_from(["maxNumBlocks", "usedNumBlocks", "freeNumBlocks", "tokensPerBlock"]), VALUE),
)


@given(st.one_of(st.binary(), st.lists(STATS | VALUE).map(lambda tree: json.dumps(tree).encode())))
def test_no_answer_breaks_the_readers(body: bytes) -> None:
    for reader in (load_from_iterations, load_from_page):
        with contextlib.suppress(SideChannelError):
            load = reader(Answer("engine/metrics", 200, body))
            assert load.kv_use is None or 0 <= load.kv_use <= 1
            assert load.running is None or load.running >= 0
