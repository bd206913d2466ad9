"""SGLang's dialect: on answers recorded from 0.5.23, on older shapes, and on answers that make no sense."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.dialects import sglang_report as report
from backends.dialects.protocol import (
    CHAT,
    EMBEDDINGS,
    Adapter,
    AdapterRefused,
    EngineLoad,
    Fault,
    KvEventsEndpoint,
    NotOffered,
    Priority,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.dialects.sglang import SGLang
from backends.side import SideChannelError, Trouble
from routing.capacity import Capacity, Meter
from tests.backends.dialects.asking import ABSENT, Reply, asking, body_of, ok, recorded

SGLANG = SGLang()
LOADS = "/v1/loads?include=core,lora"
INFO = {"/server_info": "server_info", "/model_info": "model_info", "/v1/models": "models"}


def sent(**wish: Any) -> dict[str, Any]:
    """The values that are set in the body, parsed."""
    prepared = SGLANG.prepare(Wish(path=CHAT, fields={"model": "ours"}, request_id="id-1", stream=False, **wish))
    return {name: json.loads(value) for name, value in prepared.values.items()}


def replies(**files: str) -> dict[str, Reply]:
    return {path: recorded(f"sglang/{files.get(name, name)}.json") for path, name in INFO.items()}


async def load_of(answers: Mapping[str, Reply], dp_rank: int | None = None) -> EngineLoad:
    async with asking(answers) as engine:
        return await SGLANG.load(engine.side, dp_rank)


# Requests.


def test_a_request_carries_our_id_and_nothing_that_was_not_wished() -> None:
    assert sent() == {"rid": "id-1"}
    assert sent(model="base") == {"rid": "id-1", "model": "base"}


def test_a_rank_is_chosen_by_the_field_of_0_5_23_and_embeddings_have_none() -> None:
    assert sent(dp_rank=0)["routed_dp_rank"] == 0
    wish = Wish(path=EMBEDDINGS, fields={}, request_id="id-1", stream=False, dp_rank=1)
    assert set(SGLANG.prepare(wish).values) == {"rid"}


def test_an_adapter_is_addressed_behind_its_base_model() -> None:
    # A bare adapter name would silently be answered by the base model.
    assert sent(model="base", adapter="lora-a")["model"] == "base:lora-a"
    assert sent(adapter="lora-a")["model"] == "ours:lora-a"
    with pytest.raises(Untranslatable):
        SGLANG.prepare(Wish(path=CHAT, fields={"model": 3}, request_id="id-1", stream=False, adapter="lora-a"))


def test_a_request_is_aborted_by_the_id_that_it_carries() -> None:
    assert SGLANG.abort_request('a"b') == ("/abort_request", b'{"rid":"a\\"b"}')


def test_fields_that_steer_ranks_hosts_sessions_and_code_are_reserved() -> None:
    assert {"routed_dp_rank", "bootstrap_host", "session_params"} <= SGLANG.reserved
    assert "priority" not in SGLANG.reserved


def test_a_full_queue_is_overload_on_a_whole_answer_and_on_a_stream() -> None:
    status, body = recorded("sglang/queue_full.json")
    assert SGLANG.is_overload(status, json.loads(body))
    event = recorded("sglang/queue_full_stream.json")[1].split(b"\n")[0].removeprefix(b"data: ")
    error = json.loads(event)["error"]
    assert SGLANG.is_overload(error["code"], error)


def test_a_server_that_refuses_priorities_is_not_broken_and_another_may_take_the_request() -> None:
    status, body = recorded("sglang/priority_disabled.json")
    assert SGLANG.judge_error(status, json.loads(body)) is Fault.OVERLOAD
    event = recorded("sglang/priority_disabled_stream.json")[1].split(b"\n")[0].removeprefix(b"data: ")
    error = json.loads(event)["error"]
    assert SGLANG.judge_error(error["code"], error) is Fault.OVERLOAD


@pytest.mark.parametrize(
    ("status", "message", "overload"),
    [
        (503, "The request is aborted by a higher priority request.", True),
        (503, "Request waiting timeout reached.", True),
        (503, "Request running timeout reached.", False),
        (500, "Request waiting timeout reached.", False),
        (503, None, False),
    ],
)
def test_being_put_behind_others_is_overload(status: int, message: str | None, overload: bool) -> None:
    assert SGLANG.is_overload(status, {"message": message}) is overload


def test_cached_tokens_are_read_from_the_usage() -> None:
    usage = SGLANG.read_usage(body_of("sglang/chat_cached.json"))
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens) == (1105, 1104)
    plain = SGLANG.read_usage(body_of("sglang/plain_priority_3.json"))
    assert plain is not None
    assert plain.cached_tokens is None  # without --enable-cache-report


# Health.


@pytest.mark.parametrize(
    ("status", "readiness"),
    [(200, Readiness.READY), (503, Readiness.NOT_READY), (401, Readiness.UNAUTHORIZED)],
)
async def test_ready_is_asked_and_health_which_generates_is_not(status: int, readiness: Readiness) -> None:
    async with asking({"/ready": (status, b""), "/health": (200, b"")}) as engine:
        assert await SGLANG.probe(engine.side, "tiny") is readiness
        assert engine.asked == ["GET /ready"]


async def test_a_version_without_ready_is_asked_for_its_health() -> None:
    async with asking({"/health": (503, b"")}) as engine:
        assert await SGLANG.probe(engine.side, None) is Readiness.NOT_READY
        assert engine.asked == ["GET /ready", "GET /health"]


# Load.


async def test_load_of_a_busy_engine() -> None:
    # Its log of that second: "#running-req: 4, #token: 2240, token usage: 0.07, ..., #queue-req: 4".
    load = await load_of({LOADS: recorded("sglang/lora_loads_busy.json")})
    assert load == EngineLoad(
        running=4,
        max_running=4,
        waiting=4,
        waiting_uncached_tokens=1420,
        kv_use=2240 / 32768,
        kv_used_tokens=2240,
        kv_capacity_tokens=32768,
        prefill_tokens_total=1432,
        prefill_busy_s_total=0.158041,
        generated_tokens_total=778,
        adapter_slots=2,
        adapter_slots_used=1,
    )


async def test_load_of_an_idle_engine_is_zero_and_not_unknown() -> None:
    load = await load_of({LOADS: recorded("sglang/loads_after.json")})
    assert (load.running, load.waiting, load.waiting_uncached_tokens, load.kv_use) == (0, 0, 0, 0.0)
    plain = await load_of({LOADS: recorded("sglang/plain_loads.json")})
    assert plain.adapter_slots is None


async def test_what_memory_allows_is_less_than_what_is_stated_and_does_not_show_in_its_use() -> None:
    load = await load_of({LOADS: recorded("sglang/loads_memory_bound.json")})
    assert (load.running, load.waiting, load.max_running, load.kv_capacity_tokens) == (8, 4, 16, 4096)
    # It keeps room for the answers to come; what counts is that it runs 8.
    assert load.kv_use is not None
    assert load.kv_use < 0.2
    meter = Meter()
    for _ in range(2):
        meter.state(load.max_running, load.kv_capacity_tokens)
        meter.observe(load.running, load.waiting)
    assert meter.capacity == Capacity(8, 4096, "measured")


async def test_ranks_are_added_up_or_told_apart() -> None:
    answers = {LOADS: recorded("sglang/dp_loads_busy.json")}
    both, first, second = [await load_of(answers, rank) for rank in (None, 0, 1)]
    assert [(each.running, each.waiting) for each in (both, first, second)] == [(6, 2), (2, 0), (4, 2)]
    assert [each.kv_used_tokens for each in (both, first, second)] == [1668 + 2852, 1668, 2852]
    assert both.kv_capacity_tokens == 65536
    assert (both.max_running, second.max_running) == (8, 4)
    assert both.kv_use == (1668 + 2852) / 65536
    assert both.prefill_tokens_total == 722 + 1433
    with pytest.raises(NotOffered, match="rank 7"):
        await load_of(answers, 7)


async def test_a_sum_that_lacks_a_rank_is_no_sum() -> None:
    load = await load_of({LOADS: ok({"loads": [{"num_running_reqs": 1}, {"dp_rank": 1}]})})
    assert load == EngineLoad()


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ({"num_used_tokens": 12, "max_total_num_tokens": 10}, 1.0),
        ({"num_used_tokens": 12, "max_total_num_tokens": 0, "token_usage": 0.5}, 0.5),
        ({"token_usage": -0.1}, 0.0),
        ({"token_usage": True}, None),
        ({"decode_moments": [1.0, 2.0]}, None),
    ],
)
async def test_the_share_of_the_cache_is_one_or_unknown(rank: dict[str, Any], expected: float | None) -> None:
    load = await load_of({LOADS: ok({"loads": [rank]})})
    assert load.kv_use == expected
    assert load.generated_tokens_total is None


async def test_without_loads_the_metrics_are_read() -> None:
    page = recorded("sglang/lora_metrics_busy.txt")
    load = await load_of({"/metrics": page})
    assert (load.running, load.waiting, load.kv_used_tokens, load.kv_capacity_tokens) == (4, 4, 2240, 32768)
    assert load.kv_use == 2240 / 32768
    assert (load.adapter_slots, load.adapter_slots_used) == (2, 1)
    assert (load.prefill_tokens_total, load.generated_tokens_total) == (1433, 843)
    underscored = (200, page[1].replace(b"sglang:", b"sglang_"))
    assert await load_of({"/metrics": underscored}) == load
    assert await load_of({"/metrics": (307, b""), "/metrics/": page}) == load


async def test_metrics_of_single_priorities_and_ranks_are_not_counted_twice() -> None:
    answers = {"/metrics": recorded("sglang/dp_metrics_busy.txt")}
    both, second = [await load_of(answers, rank) for rank in (None, 1)]
    assert (both.running, both.waiting, both.kv_used_tokens) == (6, 2, 1654 + 2820)
    assert (second.running, second.waiting, second.kv_used_tokens) == (4, 2, 2820)
    assert (both.prefill_tokens_total, second.prefill_tokens_total) == (722 + 1433, 1433)
    assert (both.generated_tokens_total, second.generated_tokens_total) == (991 + 1476, 1476)


async def test_older_metrics_count_generated_tokens_for_all_ranks_together() -> None:
    page = (
        b'sglang:num_running_reqs 1\nsglang:generation_tokens_total{priority=""} 5\nsglang:generation_tokens_total 2\n'
    )
    assert (await load_of({"/metrics": (200, page)})).generated_tokens_total == 7
    assert (await load_of({"/metrics": (200, page)}, 0)).generated_tokens_total is None


async def test_old_versions_have_get_load() -> None:
    answers = {"/get_load": ok([{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 900}])}
    assert await load_of(answers) == EngineLoad(running=3, waiting=2)
    with pytest.raises(NotOffered):
        await load_of({"/get_load": ok({"load": 900})})


async def test_an_engine_without_any_of_them_does_not_offer_its_load() -> None:
    with pytest.raises(NotOffered, match="--enable-metrics"):
        await load_of({"/metrics": recorded("sglang/plain_metrics.json")})


@pytest.mark.parametrize(
    ("reply", "trouble"),
    [
        ((500, b"Internal Server Error"), Trouble.STATUS),
        ((401, b"{}"), Trouble.STATUS),
        ((200, b"<html>"), Trouble.BROKEN),
        ((200, b"[]"), Trouble.BROKEN),
        (ok({"loads": {}}), Trouble.BROKEN),
        (ok({"loads": [3]}), Trouble.BROKEN),
    ],
)
async def test_a_load_that_is_none_is_an_error_and_no_other_path_is_tried(reply: Reply, trouble: Trouble) -> None:
    async with asking({LOADS: reply, "/get_load": ok([{"num_reqs": 1, "num_waiting_reqs": 0}])}) as engine:
        with pytest.raises(SideChannelError) as caught:
            await SGLANG.load(engine.side, None)
        assert caught.value.trouble is trouble
        assert engine.asked == [f"GET {LOADS}"]


# What it is.


async def test_info_of_a_server_with_everything_switched_on() -> None:
    async with asking(replies()) as engine:
        info = await SGLANG.info(engine.side)
    assert (info.version, info.models, info.context_tokens) == ("0.5.23", ("tiny",), 8192)
    assert (info.kv_capacity_tokens, info.block_size, info.dp_size, info.role) == (32768, 16, 1, None)
    assert info.kv_events == KvEventsEndpoint("tcp://*:18310", "tcp://*:18311", "kv-events", 16, 1)
    assert (info.max_running, info.priority) == (4, Priority.HIGHER_FIRST)
    assert info.lacks == ()


async def test_info_says_what_the_server_was_started_without() -> None:
    files = {name: f"plain_{name}" for name in INFO.values()}
    async with asking(replies(**files)) as engine:
        info = await SGLANG.info(engine.side)
    assert info.block_size == 1
    assert info.kv_events is None
    assert (info.max_running, info.priority) == (4, Priority.NONE)
    assert [signal for signal, _ in info.lacks] == ["cached_tokens", "priority", "adapters", "kv_events"]


async def test_ranks_are_counted_together_and_reversed_priorities_are_known() -> None:
    async with asking(replies(server_info="dp_server_info")) as engine:
        info = await SGLANG.info(engine.side)
    assert (info.priority, info.max_running) == (Priority.LOWER_FIRST, 8)
    assert "priority" not in dict(info.lacks)
    assert (info.dp_size, info.kv_capacity_tokens) == (2, 65536)
    assert info.kv_events == KvEventsEndpoint("tcp://*:18312", None, "kv-events", 1, 2)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({}, None),
        ({"max_running_requests": None}, None),
        ({"max_running_requests": 16}, 16),
        ({"max_running_requests": 16, "dp_size": 2}, None),  # of one rank, or of both?
        ({"max_running_requests": 16, "internal_states": [{"effective_max_running_requests_per_dp": 9}]}, 9),
        ({"dp_size": 2, "internal_states": [{"effective_max_running_requests_per_dp": 9}]}, None),
        ({"max_running_requests": 16, "internal_states": [{}]}, 16),
        ({"max_running_requests": 0, "internal_states": "no"}, None),
    ],
)
def test_requests_at_once_are_what_the_ranks_say_else_the_setting_of_a_single_one(
    server: dict[str, Any], expected: int | None
) -> None:
    assert report.info(server, {}, []).max_running == expected


async def test_an_endpoint_in_the_file_system_is_known_from_the_setting() -> None:
    async with asking(replies(server_info="lora_server_info")) as engine:
        info = await SGLANG.info(engine.side)
    assert info.kv_events == KvEventsEndpoint("ipc:///adapters/kv.ipc", None, "kv-events", 16, 1)
    assert "kv_events" not in dict(info.lacks)


async def test_old_names_of_the_endpoints_are_tried() -> None:
    old = {
        "/get_server_info": recorded("sglang/server_info.json"),
        "/get_model_info": recorded("sglang/model_info.json"),
    }
    async with asking(old) as engine:
        info = await SGLANG.info(engine.side)
    assert (info.version, info.models, info.context_tokens) == ("0.5.23", ("tiny",), None)
    async with asking({}) as engine:
        assert (await SGLANG.info(engine.side)).version is None


def test_the_epoch_changes_with_a_restart_and_with_the_weights_and_not_otherwise() -> None:
    server, model = body_of("sglang/server_info.json"), body_of("sglang/model_info.json")
    before = report.epoch(server, model)
    # The same command, started again.
    again = body_of("sglang/lora_server_info.json")
    assert again["random_seed"] == server["random_seed"]
    epochs = {
        before,
        report.epoch(again, model),
        report.epoch(server, body_of("sglang/model_info_new_weights_version.json")),
        report.epoch(server, body_of("sglang/model_info_other_path.json")),
    }
    assert None not in epochs
    assert len(epochs) == 4
    busy = {**server, "internal_states": [{"last_gen_throughput": 5.0}]}
    assert report.epoch(busy, model) == before
    assert report.epoch({}, model) is None


def test_a_prefill_server_says_so() -> None:
    assert report.info({}, {"disaggregation_mode": "prefill"}, []).role == "prefill"
    assert report.info({"disaggregation_mode": "decode"}, {}, []).role == "decode"


def test_an_ipv6_host_of_an_endpoint_is_bracketed() -> None:
    told = {"endpoint_host": "::", "endpoint_port_base": 5557}
    info = report.info({"kv_events": told, "page_size": 8}, {}, [])
    assert info.kv_events == KvEventsEndpoint("tcp://[::]:5557", block_size=8)


# Adapters.


async def test_adapters_are_the_models_with_a_parent() -> None:
    async with asking({"/v1/models": recorded("sglang/models_two_adapters.json")}) as engine:
        known = await SGLANG.adapters(engine.side)
    assert known == (Adapter("lora-a", "/adapters/lora-a"), Adapter("lora-b", "/adapters/lora-b"))
    async with asking({"/v1/models": recorded("sglang/plain_models.json")}) as engine:
        assert await SGLANG.adapters(engine.side) == ()


@pytest.mark.parametrize(
    "paths", [{"a": "/x"}, ["a=/x"], [{"lora_name": "a", "lora_path": "/x", "pinned": False}]], ids=str
)
async def test_old_versions_name_the_adapters_they_were_started_with(paths: Any) -> None:
    models = ok({"data": [{"id": "tiny", "root": "tiny"}]})
    async with asking({"/v1/models": models, "/get_server_info": ok({"lora_paths": paths})}) as engine:
        assert await SGLANG.adapters(engine.side) == (Adapter("a", "/x"),)
    async with asking({"/v1/models": models}) as engine:
        with pytest.raises(NotOffered):
            await SGLANG.adapters(engine.side)


async def test_an_adapter_is_loaded_and_unloaded() -> None:
    files = {f"/{what}_lora_adapter": recorded(f"sglang/{what}_adapter.json") for what in ("load", "unload")}
    async with asking(files) as engine:
        await SGLANG.load_adapter(engine.side, "lora-b", "/adapters/lora-b")
        await SGLANG.unload_adapter(engine.side, "lora-b")
        assert engine.asked == ["POST /load_lora_adapter", "POST /unload_lora_adapter"]
        assert engine.bodies == [{"lora_name": "lora-b", "lora_path": "/adapters/lora-b"}, {"lora_name": "lora-b"}]


@pytest.mark.parametrize(
    ("reply", "raised", "words"),
    [
        (recorded("sglang/load_adapter_again.json"), AdapterRefused, "already loaded"),
        (recorded("sglang/load_adapter_bad_path.json"), AdapterRefused, "Repo id must be in the form"),
        (recorded("sglang/plain_load_adapter.json"), NotOffered, "--enable-lora"),
        (ok({"success": False, "error_message": "no room"}), AdapterRefused, "no room"),
        (ABSENT, NotOffered, "no /load_lora_adapter"),
        ((401, b'{"error":"Unauthorized"}'), SideChannelError, "401"),
        ((403, b'{"message":"admin key required"}'), SideChannelError, "403"),
        ((500, b"Internal Server Error"), SideChannelError, "500"),
        (ok({}), SideChannelError, "did not say"),
        ((200, b"fine"), SideChannelError, "JSON"),
    ],
)
async def test_why_an_adapter_was_not_loaded(reply: Reply, raised: type[Exception], words: str) -> None:
    async with asking({"/load_lora_adapter": reply}) as engine:
        with pytest.raises(raised, match=words):
            await SGLANG.load_adapter(engine.side, "lora-b", "/adapters/lora-b")


# Nonsense.

NAMES = st.sampled_from(
    [
        *sorted(body_of("sglang/loads_busy.json")["loads"][0]),
        *(
            "loads",
            "slots_total",
            "data",
            "id",
            "parent",
            "startup_time",
            "kv_events",
            "kv_events_config",
            "lora_paths",
        ),
        *("endpoint", "publisher", "endpoint_host", "endpoint_port_base", "dp_size", "success", "error_message"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    LEAVES | st.just('{"publisher":"zmq","endpoint":3}'),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(NAMES, inner, max_size=8),
    max_leaves=30,
)


async def ask_everything(reply: Reply) -> None:
    paths = ("/server_info", "/model_info", "/v1/models", "/load_lora_adapter", "/metrics", "/get_load")
    for answers in ({path: reply for path in (*paths, LOADS)}, {path: reply for path in paths}):
        async with asking(answers) as engine:
            side = engine.side
            for question in (
                SGLANG.probe(side, None),
                SGLANG.info(side),
                SGLANG.load(side, None),
                SGLANG.load(side, 0),
                SGLANG.adapters(side),
                SGLANG.load_adapter(side, "a", "b"),
            ):
                try:
                    await question
                except (NotOffered, AdapterRefused, SideChannelError):
                    continue


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_no_json_raises_anything_but_the_documented_errors(tree: Any) -> None:
    try:
        body = orjson.dumps(tree, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        body = json.dumps(tree).encode()  # integers beyond 64 bits, lone surrogates
    asyncio.run(ask_everything((200, body)))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, TREES), st.dictionaries(NAMES, TREES), st.none() | st.integers(0, 2))
def test_no_tree_raises_in_the_readers(server: dict[str, Any], model: dict[str, Any], rank: int | None) -> None:
    tree = json.loads(json.dumps({"s": server, "m": model}))
    report.info(tree["s"], tree["m"], [])
    try:
        load = report.load([tree["s"], tree["m"]], rank)
        assert load.kv_use is None or 0 <= load.kv_use <= 1
        report.old_load([{**tree["s"], "num_reqs": tree["m"]}], rank)
    except (NotOffered, SideChannelError):
        return


def test_a_setting_that_could_not_be_written_down_is_no_endpoint() -> None:
    config = '{"publisher":"zmq","endpoint":"tcp://*:5557","topic":"\\ud800"}'
    assert report.info({"kv_events_config": config}, {}, []).kv_events is None
    assert report.info({"kv_events_config": config.replace("\\ud800", "t")}, {}, []).kv_events is not None
