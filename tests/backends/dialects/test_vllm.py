"""vLLM's dialect: on answers recorded from 0.32.0, on older shapes, and on answers that make no sense."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.dialects.protocol import (
    CHAT,
    Adapter,
    AdapterRefused,
    EngineInfo,
    EngineLoad,
    KvEventsEndpoint,
    NotOffered,
    Readiness,
    Wish,
)
from backends.dialects.vllm import VLLM, read_load
from backends.side import SideChannelError, Trouble
from tests.backends.dialects.asking import ABSENT, Reply, asking, body_of, ok, recorded

VLLM_DIALECT = VLLM()


def sent(**wish: Any) -> dict[str, Any]:
    """The values that are set in the body, parsed."""
    prepared = VLLM_DIALECT.prepare(Wish(path=CHAT, fields={"model": "ours"}, request_id="id-1", stream=False, **wish))
    return {name: json.loads(value) for name, value in prepared.values.items()}


async def load_of(page: bytes, dp_rank: int | None = None) -> EngineLoad:
    async with asking({"/metrics": (200, page)}) as engine:
        return await VLLM_DIALECT.load(engine.side, dp_rank)


async def info_of(answers: Mapping[str, Reply]) -> EngineInfo:
    async with asking(answers) as engine:
        return await VLLM_DIALECT.info(engine.side)


# Requests.


def test_nothing_is_set_that_was_not_wished_and_a_rank_has_no_field() -> None:
    assert sent() == {}
    assert sent(dp_rank=1) == {}
    assert sent(model="base") == {"model": "base"}


def test_an_adapter_is_addressed_by_its_own_name() -> None:
    assert sent(model="base", adapter="lora-a") == {"model": "lora-a"}


def test_fields_that_steer_transfers_between_hosts_are_reserved() -> None:
    assert {"kv_transfer_params", "ec_transfer_params", "vllm_xargs", "request_id"} <= VLLM_DIALECT.reserved


def test_a_full_queue_is_overload_and_a_dead_engine_is_not() -> None:
    status, body = recorded("vllm/plain_queue_full.json")
    assert VLLM_DIALECT.is_overload(status, json.loads(body)["error"])
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    assert not VLLM_DIALECT.is_overload(500, {"message": message})


def test_requests_are_not_aborted_by_id_because_only_development_servers_can() -> None:
    assert recorded("vllm/abort_requests.json")[0] == 404
    assert VLLM_DIALECT.abort_request("id-1") is None


def test_cached_tokens_are_read_from_the_usage() -> None:
    usage = VLLM_DIALECT.read_usage(body_of("vllm/chat_cached.json"))
    assert usage is not None
    assert usage.cached_tokens == 1024  # in blocks of 128
    plain = VLLM_DIALECT.read_usage(body_of("vllm/plain_priority_3.json"))
    assert plain is not None
    assert plain.cached_tokens is None  # without --enable-prompt-tokens-details


# Health.


@pytest.mark.parametrize(
    ("status", "readiness"),
    [(200, Readiness.READY), (503, Readiness.NOT_READY), (401, Readiness.UNAUTHORIZED)],
)
async def test_health_is_asked(status: int, readiness: Readiness) -> None:
    async with asking({"/health": (status, b"")}) as engine:
        assert await VLLM_DIALECT.probe(engine.side, "tiny") is readiness


# Load.


async def test_load_of_a_busy_engine() -> None:
    # Its log of that time: "Running: 4 reqs, Waiting: 4 reqs, CPU KV cache usage: 2.4%".
    load = await load_of(recorded("vllm/metrics_busy.txt")[1])
    assert load == EngineLoad(
        running=4,
        waiting=4,
        kv_use=0.024917552216929262,
        kv_used_tokens=8707,
        kv_capacity_tokens=2730 * 128,
        prefill_tokens_total=1200,
        prefill_busy_s_total=0.20623874599914416,
        generated_tokens_total=442,
        adapter_slots=2,
        adapter_slots_used=1,
        resident_adapters=("lora-a",),
    )
    assert await load_of(recorded("vllm/metrics_busy.txt")[1], 0) == EngineLoad(
        running=4,
        waiting=4,
        kv_use=0.024917552216929262,
        kv_used_tokens=8707,
        kv_capacity_tokens=2730 * 128,
        prefill_tokens_total=1200,
        prefill_busy_s_total=0.20623874599914416,
        generated_tokens_total=442,
    )


async def test_the_newest_of_the_adapter_series_counts() -> None:
    # The series that named lora-a is still on the page, and nine milliseconds older than the empty one.
    load = await load_of(recorded("vllm/metrics_after.txt")[1])
    assert (load.running, load.waiting, load.kv_use, load.kv_used_tokens) == (0, 0, 0.0, 0)
    assert (load.adapter_slots, load.adapter_slots_used, load.resident_adapters) == (2, 0, ())


async def test_an_engine_without_adapters_says_nothing_about_them() -> None:
    load = await load_of(recorded("vllm/plain_metrics_busy.txt")[1])
    assert (load.running, load.waiting) == (2, 0)
    assert (load.adapter_slots, load.adapter_slots_used, load.resident_adapters) == (None, None, None)


TWO_ENGINES = b"""
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 2
vllm:num_requests_waiting{engine="0"} 1
vllm:num_requests_waiting{engine="1"} 0
vllm:gpu_cache_usage_perc{engine="0"} 0.5
vllm:gpu_cache_usage_perc{engine="1"} 0.25
vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="100"} 1
vllm:cache_config_info{engine="1",block_size="16",num_gpu_blocks="100"} 1
vllm:prompt_tokens_total{engine="0"} 900
vllm:prompt_tokens_total{engine="1"} 100
vllm:prefix_cache_hits_total{engine="0"} 300
vllm:prefix_cache_hits_total{engine="1"} 50
"""


async def test_engines_of_one_server_are_added_up_or_told_apart_also_under_older_names() -> None:
    assert await load_of(TWO_ENGINES) == EngineLoad(
        running=5, waiting=1, kv_use=0.375, kv_used_tokens=1200, kv_capacity_tokens=3200, prefill_tokens_total=650
    )
    assert await load_of(TWO_ENGINES, 1) == EngineLoad(
        running=2, waiting=0, kv_use=0.25, kv_used_tokens=400, kv_capacity_tokens=1600, prefill_tokens_total=50
    )
    with pytest.raises(NotOffered, match="rank 2"):
        await load_of(TWO_ENGINES, 2)


@pytest.mark.parametrize("size", ["", "None", "-16", "16.0", "²", "9" * 5000])
async def test_a_capacity_that_is_no_number_is_unknown(size: str) -> None:
    load = await load_of(TWO_ENGINES.replace(b'block_size="16"', f'block_size="{size}"'.encode()))
    assert (load.running, load.kv_use, load.kv_capacity_tokens, load.kv_used_tokens) == (5, 0.375, None, None)


async def test_a_server_without_statistics_does_not_offer_its_load() -> None:
    with pytest.raises(NotOffered, match="--disable-log-stats"):
        await load_of(b"process_start_time_seconds 1.5\n")
    async with asking({}) as engine:
        with pytest.raises(NotOffered):
            await VLLM_DIALECT.load(engine.side, None)


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_metrics_that_fail_are_an_error_and_not_an_absence(status: int) -> None:
    async with asking({"/metrics": (status, b"")}) as engine:
        with pytest.raises(SideChannelError) as caught:
            await VLLM_DIALECT.load(engine.side, None)
        assert (caught.value.trouble, caught.value.status) == (Trouble.STATUS, status)


def test_load_without_tracking_is_zero_under_load_which_is_why_it_is_not_asked() -> None:
    assert body_of("vllm/load.json") == {"server_load": 0}
    assert body_of("vllm/plain_load_busy.json") == {"server_load": 2}


# What it is.


async def test_info_of_a_server_with_adapters() -> None:
    info = await info_of(
        {
            "/version": recorded("vllm/version.json"),
            "/v1/models": recorded("vllm/models_two_adapters.json"),
            "/kv_event_sources": recorded("vllm/kv_event_sources.json"),
            "/metrics": recorded("vllm/metrics_idle.txt"),
        }
    )
    assert info == EngineInfo(
        version="0.32.0",
        models=("tiny",),
        epoch="1795320712.81",
        context_tokens=4096,
        kv_capacity_tokens=349440,
        block_size=128,
    )


async def test_info_of_a_server_that_publishes_its_cache() -> None:
    answers = {"/metrics": recorded("vllm/plain_metrics.txt")}
    info = await info_of({**answers, "/kv_event_sources": recorded("vllm/plain_kv_event_sources.json")})
    assert info.kv_events == KvEventsEndpoint("tcp://*:18330", "tcp://*:18331", "kv", 128, 1)
    quiet = ok({"0": {"enable_kv_cache_events": False, "publisher": "zmq", "endpoint": "tcp://*:5557"}})
    assert (await info_of({**answers, "/kv_event_sources": quiet})).kv_events is None


async def test_ranks_publish_from_the_first_ones_endpoint_on() -> None:
    each = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": ""}
    ranks = {str(rank): {**each, "endpoint": f"tcp://*:{5557 + rank}"} for rank in (10, 2)}
    info = await info_of({"/kv_event_sources": ok(ranks), "/metrics": (200, TWO_ENGINES)})
    assert info.kv_events == KvEventsEndpoint("tcp://*:5559", block_size=16, dp_size=2)
    assert (info.dp_size, info.kv_capacity_tokens) == (2, 3200)


async def test_the_epoch_is_the_start_of_the_process() -> None:
    pages = [recorded(f"vllm/{name}.txt") for name in ("metrics_idle", "metrics_after", "plain_metrics")]
    first, later, restarted = [(await info_of({"/metrics": page})).epoch for page in pages]
    assert first == later
    assert restarted not in (None, first)


async def test_what_an_engine_does_not_say_stays_unknown() -> None:
    assert await info_of({}) == EngineInfo()


# Adapters.


async def test_adapters_are_the_models_with_a_parent() -> None:
    async with asking({"/v1/models": recorded("vllm/models_two_adapters.json")}) as engine:
        known = await VLLM_DIALECT.adapters(engine.side)
    assert known == (Adapter("lora-a", "/adapters/lora-a"), Adapter("lora-b", "/adapters/lora-b"))
    async with asking({"/v1/models": recorded("vllm/plain_models.json")}) as engine:
        assert await VLLM_DIALECT.adapters(engine.side) == ()


async def test_an_adapter_is_loaded_and_unloaded() -> None:
    files = {f"/v1/{what}_lora_adapter": recorded(f"vllm/{what}_adapter.json") for what in ("load", "unload")}
    async with asking(files) as engine:
        await VLLM_DIALECT.load_adapter(engine.side, "lora-b", "/adapters/lora-b")
        await VLLM_DIALECT.unload_adapter(engine.side, "lora-b")
        assert engine.asked == ["POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"]
        assert engine.bodies == [{"lora_name": "lora-b", "lora_path": "/adapters/lora-b"}, {"lora_name": "lora-b"}]


@pytest.mark.parametrize(
    ("reply", "raised", "words"),
    [
        (recorded("vllm/load_adapter_again.json"), AdapterRefused, "already been loaded"),
        # Also 404, but said by the endpoint that is there.
        (recorded("vllm/load_adapter_bad_path.json"), AdapterRefused, "No adapter found"),
        (recorded("vllm/unload_adapter_unknown.json"), AdapterRefused, "cannot be found"),
        (recorded("vllm/plain_load_adapter.json"), NotOffered, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (ABSENT, NotOffered, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ((500, b'{"error":{"message":"rank too high"}}'), AdapterRefused, "rank too high"),
        ((401, b'{"error":{"message":"Unauthorized"}}'), SideChannelError, "401"),
        ((500, b"Internal Server Error"), SideChannelError, "500"),
    ],
)
async def test_why_an_adapter_was_not_changed(reply: Reply, raised: type[Exception], words: str) -> None:
    async with asking({"/v1/load_lora_adapter": reply, "/v1/unload_lora_adapter": reply}) as engine:
        with pytest.raises(raised, match=words):
            await VLLM_DIALECT.load_adapter(engine.side, "lora-b", "/adapters/lora-b")
        with pytest.raises(raised, match=words):
            await VLLM_DIALECT.unload_adapter(engine.side, "lora-b")


# Nonsense.

NAMES = st.sampled_from(
    ["data", "id", "parent", "root", "max_model_len", "version", "error", "message", "0", "1", "00"]
)
ENDPOINTS = st.sampled_from(["endpoint", "publisher", "topic", "replay_endpoint", "enable_kv_cache_events"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.just("zmq")
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NAMES | ENDPOINTS | st.text(), inner, max_size=6),
    max_leaves=20,
)


async def ask_everything(reply: Reply) -> None:
    paths = ("/version", "/v1/models", "/kv_event_sources", "/metrics", "/v1/load_lora_adapter")
    async with asking({path: reply for path in paths}) as engine:
        side = engine.side
        for question in (
            VLLM_DIALECT.probe(side, None),
            VLLM_DIALECT.info(side),
            VLLM_DIALECT.load(side, None),
            VLLM_DIALECT.adapters(side),
            VLLM_DIALECT.load_adapter(side, "a", "b"),
        ):
            try:
                await question
            except (NotOffered, AdapterRefused, SideChannelError):
                continue


@settings(max_examples=40, deadline=None)
@given(TREES, st.sampled_from([200, 404, 500]))
def test_no_json_raises_anything_but_the_documented_errors(tree: Any, status: int) -> None:
    try:
        body = orjson.dumps(tree)
    except TypeError:
        body = json.dumps(tree).encode()  # integers beyond 64 bits, lone surrogates
    asyncio.run(ask_everything((status, body)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["num_requests_running", "kv_cache_usage_perc", "cache_config_info", "lora_requests_info"]),
            st.sampled_from(["engine", "block_size", "num_gpu_blocks", "max_lora", "running_lora_adapters"]),
            st.sampled_from(["", "0", "1", "9" * 5000, "None", "-1", "a,,b", "²"]),
            st.floats(),
        )
    ),
    st.sampled_from([None, 0, 1]),
)
def test_no_page_raises(lines: list[tuple[str, str, str, float]], rank: int | None) -> None:
    page = "".join(f'vllm:{name}{{{label}="{text}"}} {value}\n' for name, label, text, value in lines)
    try:
        load = read_load(page.encode(), rank)
    except NotOffered:
        return
    assert load.kv_use is None or 0 <= load.kv_use <= 1
