"""LMDeploy, against replies written after its source (see `recorded/lmdeploy/replies.json`)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.lmdeploy import LmDeploy, load_from_page
from backends.dialects.protocol import CHAT, Adapter, EngineLoad, NotOffered, Readiness, Wish
from backends.side import SideChannelError
from tests.backends.dialects.replies import answering, recorded

REPLIES = recorded("lmdeploy/replies")


def wish(**kwargs: Any) -> Wish:
    return Wish(CHAT, {"messages": []}, "r1", kwargs.pop("stream", False), **kwargs)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("plain", Readiness.READY),
        ("old", Readiness.READY),
        ("asleep", Readiness.NOT_READY),
        ("starting", Readiness.NOT_READY),
    ],
)
async def test_only_an_engine_that_is_awake_is_ready(server: str, expected: Readiness) -> None:
    async with answering(REPLIES[server]) as side:
        assert await LmDeploy().probe(side, "internlm3-8b") is expected


async def test_those_without_a_request_handle_wait_too() -> None:
    async with answering(REPLIES["plain"]) as side:
        load = await LmDeploy().load(side, None)
    assert load == EngineLoad(running=3, waiting=3, kv_use=0.5, generated_tokens_total=400)


async def test_ranks_are_told_apart_and_taken_together() -> None:
    dialect = LmDeploy()
    async with answering(REPLIES["two_ranks"]) as side:
        together, second, absent = [await dialect.load(side, rank) for rank in (None, 1, 2)]
    assert together == EngineLoad(running=5, waiting=4, kv_use=0.375, generated_tokens_total=600)
    assert second == EngineLoad(running=2, waiting=1, kv_use=0.25, generated_tokens_total=200)
    assert absent == EngineLoad()


async def test_a_server_without_metrics_says_how_to_have_them() -> None:
    async with answering(REPLIES["metrics_off"]) as side:
        info = await LmDeploy().info(side)
        with pytest.raises(NotOffered, match="--disable-metrics"):
            await LmDeploy().load(side, None)
    assert info.models == ("internlm3-8b",)
    assert info.epoch is None
    assert [signal for signal, _ in info.lacks] == ["load"]


async def test_the_start_of_its_process_is_the_epoch_and_adapters_are_no_models() -> None:
    async with answering(REPLIES["plain"]) as side:
        info = await LmDeploy().info(side)
    assert (info.models, info.epoch, info.lacks) == (("internlm3-8b",), "1795320851.38", ())


async def test_adapters_are_listed_behind_the_model() -> None:
    async with answering(REPLIES["plain"]) as side:
        assert await LmDeploy().adapters(side) == (Adapter("sql"), Adapter("poems"))
    async with answering(REPLIES["metrics_off"]) as side:
        assert await LmDeploy().adapters(side) == ()
        with pytest.raises(NotOffered, match="--adapters"):
            await LmDeploy().load_adapter(side, "sql", "/adapters/sql")
        with pytest.raises(NotOffered, match="--adapters"):
            await LmDeploy().unload_adapter(side, "sql")


def test_an_adapter_is_asked_for_as_a_model() -> None:
    assert LmDeploy().prepare(wish(model="m", adapter="sql")).values == {"model": b'"sql"'}
    assert LmDeploy().prepare(wish(model="m")).values == {"model": b'"m"'}
    assert LmDeploy().abort_request("r1") is None


def test_cached_tokens_are_told_for_chats_only() -> None:
    chat, text = (LmDeploy().read_usage(REPLIES[name]) for name in ("chat_usage", "completion_usage"))
    assert chat is not None
    assert text is not None
    assert (chat.prompt_tokens, chat.cached_tokens) == (70, 64)
    assert (text.prompt_tokens, text.cached_tokens) == (70, None)


LINE = st.builds(
    "lmdeploy:{}{} {}".format,
    st.sampled_from(["num_requests_running", "gpu_cache_usage_perc", "num_api_requests_waiting"]),
    st.sampled_from(["", '{engine="0"}', '{engine="1"}', "{", '{engine="0}']),
    st.floats().map(str) | st.text(max_size=4),
)


@given(st.binary() | st.lists(LINE).map(lambda lines: "\n".join(lines).encode()), st.none() | st.integers(0, 2))
def test_no_page_breaks_the_reader(page: bytes, dp_rank: int | None) -> None:
    load = load_from_page(page, dp_rank)
    assert load.kv_use is None or 0 <= load.kv_use <= 1
    assert load.running is None or load.running >= 0


@pytest.mark.parametrize("body", ["{}", '{"data": 3}', '{"data": [1, {"id": 2}]}'])
async def test_a_list_without_models_has_no_adapters(body: str) -> None:
    async with answering({"GET /v1/models": {"status": 200, "body": body}}) as side:
        assert await LmDeploy().adapters(side) == ()


@pytest.mark.parametrize("body", ["", "[]", '"x"', "{"])
async def test_what_is_no_list_is_said_to_be_none(body: str) -> None:
    async with answering({"GET /v1/models": {"status": 200, "body": body}}) as side:
        with pytest.raises(SideChannelError, match="/v1/models"):
            await LmDeploy().adapters(side)
