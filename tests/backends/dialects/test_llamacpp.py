"""llama.cpp: against the real server, and against what it was recorded to answer (`recorded/llamacpp`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.llamacpp import LlamaCpp, adapter_name, choices_of, info_from, load_from_slots, with_metrics
from backends.dialects.protocol import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    Adapter,
    EngineLoad,
    NotOffered,
    Prepared,
    Readiness,
    Untranslatable,
    Wish,
)
from backends.side import Answer, SideChannel, SideChannelError
from tests.backends.dialects.lora import serving_adapters
from tests.backends.dialects.replies import answering, recorded
from tests.llamacpp import LlamaCpp as Replica
from tests.llamacpp import running_llamacpp

ENDPOINTS = recorded("llamacpp/endpoints")
ANSWERS = recorded("llamacpp/answers")["answers"]
HELD = (Adapter("lora-a", "m/lora-a.gguf", 0), Adapter("lora-b", "m/lora-b.gguf", 1))


def wish(path: str = CHAT, fields: Any = None, *, stream: bool = False, **kwargs: Any) -> Wish:
    return Wish(path, {} if fields is None else fields, "r1", stream, **kwargs)


def sent(prepared: Prepared) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in prepared.values.items()}


# What it is asked.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_whole_answer_is_asked_for_as_a_stream(path: str) -> None:
    prepared = LlamaCpp().prepare(wish(path, {"stream": False, "stream_options": None, "return_progress": True}))
    assert sent(prepared) == {"stream": True, "stream_options": {"include_usage": True}, "return_progress": False}
    assert prepared.translation is not None


@pytest.mark.parametrize(
    "asked",
    [
        wish(stream=True),
        wish(EMBEDDINGS),
        wish(fields={"verbose": True}),
        wish(fields={"reasoning_format": "deepseek-legacy"}),
    ],
)
def test_streams_embeddings_and_what_streams_do_differently_are_asked_for_as_they_are(asked: Wish) -> None:
    prepared = LlamaCpp().prepare(asked)
    assert "stream" not in prepared.values
    assert prepared.translation is None


@pytest.mark.parametrize(
    ("path", "fields", "choices"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": 3}, 3),
        (CHAT, {"n": 3, "n_cmpl": 2}, 2),
        (CHAT, {"n": True, "prompt": ["a", "b"]}, 1),
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, 4),
        (COMPLETIONS, {"prompt": [[5, 6], "b"]}, 2),
        (COMPLETIONS, {"prompt": [5, "b"]}, 1),
        (COMPLETIONS, {"prompt": []}, 1),
    ],
)
def test_the_answer_is_expected_to_have_as_many_choices_as_asked_for(
    path: str, fields: dict[str, Any], choices: int
) -> None:
    """As the real server counts them."""
    assert choices_of(wish(path, fields)) == choices


def test_beside_tool_calls_content_is_an_empty_string() -> None:
    """Written after common/chat.cpp (`to_json_oaicompat`), not recorded: the test models call no tools."""
    translation = LlamaCpp().prepare(wish()).translation
    assert translation is not None
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for delta, finish in (({"role": "assistant", "content": None}, None), ({"tool_calls": [call]}, "tool_calls")):
        event = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        translation.feed(f"data: {json.dumps(event)}\n\n".encode())
    assert json.loads(translation.assembled() or b"")["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("adapter", [None, "lora-a", "lora-b"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_adapters_scale_is_sent_always(adapter: str | None, stream: bool) -> None:
    scales = sent(LlamaCpp().prepare(wish(stream=stream, adapter=adapter, adapters=HELD)))["lora"]
    assert scales == [{"id": held.id, "scale": float(held.name == adapter)} for held in HELD]


def test_a_server_without_adapters_is_not_spoken_to_of_them() -> None:
    assert "lora" not in LlamaCpp().prepare(wish()).values
    assert "lora" not in LlamaCpp().prepare(wish(EMBEDDINGS, adapters=HELD)).values


@pytest.mark.parametrize(
    "asked",
    [
        wish(adapter="other", adapters=HELD),
        wish(adapter="lora-a"),
        wish(adapter="x", adapters=[Adapter("x", "1/x.gguf", 0), Adapter("x", "2/x.gguf", 1)]),
        wish(EMBEDDINGS, adapter="lora-a", adapters=HELD),
    ],
)
def test_an_adapter_that_cannot_be_addressed_is_refused(asked: Wish) -> None:
    with pytest.raises(Untranslatable) as raised:
        LlamaCpp().prepare(asked)
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("m/lora-a.gguf", "lora-a"),
        ("a.v2.gguf", "a.v2"),
        ("C:\\loras\\b.gguf", "b"),
        ("/x.y/plain", "plain"),
        ("/x/.gguf", ".gguf"),
        ("/x/", ""),
    ],
)
def test_an_adapter_is_called_after_its_file(path: str, name: str) -> None:
    assert adapter_name(path) == name


# What it answered when it was recorded.


@pytest.mark.parametrize("name", ANSWERS)
def test_a_recorded_stream_assembles_to_the_recorded_whole_answer(name: str) -> None:
    answer = ANSWERS[name]
    translation = LlamaCpp().prepare(wish(answer["path"], answer["request"])).translation
    assert translation is not None
    translation.feed(answer["stream"].encode())
    whole = translation.assembled()
    assert whole is not None
    got, expected = json.loads(whole), json.loads(answer["whole"])
    assert got.keys() == expected.keys()
    assert got["timings"].keys() == expected["timings"].keys()
    # Each is an answer of its own, with an id of its own. Of several prompts it reports the use of one: of the first
    # in a whole answer, of the last to finish in a stream.
    several = isinstance(answer["request"].get("prompt"), list)
    for own in ("id", "created", "timings", *(["usage"] if several else [])):
        del got[own], expected[own]
    assert got == expected


def test_a_recorded_stream_that_is_cut_is_no_answer() -> None:
    answer = ANSWERS["two_choices"]
    events = answer["stream"].split("\n\n")
    last = max(number for number, event in enumerate(events) if '"finish_reason":"length"' in event)
    translation = LlamaCpp().prepare(wish(answer["path"], answer["request"])).translation
    assert translation is not None
    translation.feed("".join(f"{event}\n\n" for event in [*events[:last], "data: [DONE]"]).encode())
    assert translation.assembled() is None


async def test_slots_and_counters_make_the_load() -> None:
    async with answering(ENDPOINTS["busy"]) as side:
        load = await LlamaCpp().load(side, None)
    assert (load.running, load.max_running, load.waiting) == (2, 2, 1)
    assert (load.kv_used_tokens, load.kv_capacity_tokens) == (2 * 1073, 8192)
    assert load.kv_use == 2146 / 8192
    async with answering(ENDPOINTS["idle"]) as side:
        load = await LlamaCpp().load(side, None)
    assert load == EngineLoad(
        running=0,
        max_running=2,
        waiting=0,
        kv_use=0.0,
        kv_used_tokens=0,
        kv_capacity_tokens=8192,
        prefill_tokens_total=31,
        prefill_busy_s_total=0.002103,
        generated_tokens_total=9000,
    )


async def test_either_half_of_the_load_will_do() -> None:
    busy, off = ENDPOINTS["busy"], ENDPOINTS["switched_off"]
    async with answering({**off, "GET /slots": busy["GET /slots"]}) as side:
        load = await LlamaCpp().load(side, None)
    assert (load.running, load.waiting, load.kv_used_tokens) == (2, None, 2146)
    async with answering({**off, "GET /metrics": busy["GET /metrics"]}) as side:
        load = await LlamaCpp().load(side, None)
    assert (load.running, load.waiting, load.kv_used_tokens) == (2, 1, None)


async def test_without_either_half_it_says_how_to_have_them() -> None:
    async with answering(ENDPOINTS["switched_off"]) as side:
        with pytest.raises(NotOffered, match="--metrics"):
            await LlamaCpp().load(side, None)
        info = await LlamaCpp().info(side)
    assert [signal for signal, _ in info.lacks] == ["load"]
    async with answering({}) as side:
        with pytest.raises(NotOffered):
            await LlamaCpp().load(side, None)


async def test_it_says_what_it_is() -> None:
    async with answering(ENDPOINTS["idle"]) as side:
        info = await LlamaCpp().info(side)
    assert (info.models, info.version) == (("tiny",), "b0-unknown")
    assert (info.context_tokens, info.kv_capacity_tokens, info.lacks) == (4096, 8192, ())
    assert info.max_running == 2
    async with answering(ENDPOINTS["switched_off"]) as side:
        other = await LlamaCpp().info(side)
    assert info.epoch is not None
    assert info.epoch != other.epoch


async def test_adapters_are_listed_with_their_numbers() -> None:
    async with answering(ENDPOINTS["idle"]) as side:
        assert await LlamaCpp().adapters(side) == HELD
    async with answering(ENDPOINTS["switched_off"]) as side:
        assert await LlamaCpp().adapters(side) == ()
    async with answering({}) as side:
        with pytest.raises(NotOffered):
            await LlamaCpp().adapters(side)
        with pytest.raises(NotOffered, match="--lora"):
            await LlamaCpp().load_adapter(side, "a", "/a.gguf")
        with pytest.raises(NotOffered, match="start"):
            await LlamaCpp().unload_adapter(side, "a")


async def test_a_server_that_loads_its_model_is_not_ready() -> None:
    body = '{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'
    async with answering({"GET /health": {"status": 503, "body": body}}) as side:
        assert await LlamaCpp().probe(side, "m") is Readiness.NOT_READY
    async with answering(ENDPOINTS["idle"]) as side:
        assert await LlamaCpp().probe(side, "m") is Readiness.READY


def test_cached_tokens_are_read_from_either_place() -> None:
    old = {"usage": {"prompt_tokens": 9, "completion_tokens": 1}, "timings": {"cache_n": 4}}
    new = {**old, "usage": {**old["usage"], "prompt_tokens_details": {"cached_tokens": 7}}}
    cached = [usage.cached_tokens for tree in (old, new) if (usage := LlamaCpp().read_usage(tree)) is not None]
    assert cached == [4, 7]
    assert LlamaCpp().read_usage({"timings": {"cache_n": 4}}) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["is_processing", "n_ctx", "n_prompt_tokens", "default_generation_settings"])
            | st.sampled_from(["total_slots", "media_marker", "build_info", "id", "path"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=30) | JSON.map(lambda tree: json.dumps(tree).encode()), st.binary(max_size=60))
def test_no_answer_breaks_the_readers(body: bytes, page: bytes) -> None:
    load = EngineLoad()
    with contextlib.suppress(SideChannelError):
        load = load_from_slots(Answer("engine/slots", 200, body))
    load = with_metrics(load, b"llamacpp:requests_deferred " + page + b"\n" + page)
    assert load.kv_use is None or 0 <= load.kv_use <= 1
    with contextlib.suppress(SideChannelError):
        info_from(Answer("engine/props", 200, body).json_object(), ())


@given(JSON, st.sampled_from([CHAT, COMPLETIONS]))
def test_no_request_breaks_the_preparation(value: Any, path: str) -> None:
    names = ("n", "n_cmpl", "prompt", "stream_options", "verbose", "reasoning_format", "return_progress")
    LlamaCpp().prepare(wish(path, dict.fromkeys(names, value)))


# What the real server does.


@contextlib.asynccontextmanager
async def channel(url: str) -> AsyncIterator[SideChannel]:
    side = SideChannel(origin=url)
    try:
        yield side
    finally:
        await side.aclose()


async def ask(client: httpx2.AsyncClient, asked: Wish) -> tuple[Any, Any]:
    """The engine's own whole answer, and ours out of the stream the dialect asks it for."""
    prepared = LlamaCpp().prepare(asked)
    assert prepared.translation is not None
    lora = {name: value for name, value in sent(prepared).items() if name == "lora"}
    own = (await client.post(asked.path, json={**asked.fields, **lora})).json()
    prepared.translation.feed((await client.post(asked.path, json={**asked.fields, **sent(prepared)})).content)
    whole = prepared.translation.assembled()
    return own, None if whole is None else json.loads(whole)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"n": 2}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"grammar": 'root ::= "hello" " there"', "return_progress": True}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}}),
        (COMPLETIONS, {"prompt": "One, two,", "logprobs": 2}),
        (COMPLETIONS, {"prompt": [5, "a b"]}),
    ],
)
async def test_the_real_whole_answer_and_ours_are_the_same(
    llamacpp_replica: Replica, path: str, fields: dict[str, Any]
) -> None:
    told = {"messages": [{"role": "user", "content": "Count to three."}]} if path == CHAT else {}
    common = {"max_tokens": 6, "temperature": 0, "seed": 1, "cache_prompt": False}
    async with httpx2.AsyncClient(base_url=llamacpp_replica.url, timeout=60) as client:
        own, ours = await ask(client, wish(path, {**told, **common, **fields}))
    assert own.keys() == ours.keys()
    for name in ("object", "model", "system_fingerprint", "choices", "usage"):
        assert ours[name] == own[name], name


async def idle(side: SideChannel) -> bool:
    return (await LlamaCpp().load(side, None)).running == 0


@pytest.mark.engine
async def test_a_whole_answer_stops_when_its_caller_leaves(llamacpp_replica: Replica) -> None:
    body = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 1500, "ignore_eos": True}
    fields = {**body, **sent(LlamaCpp().prepare(wish(fields=body)))}
    async with channel(llamacpp_replica.url) as side:
        before = (await LlamaCpp().load(side, None)).generated_tokens_total
        async with (
            httpx2.AsyncClient(base_url=llamacpp_replica.url, timeout=60) as client,
            client.stream("POST", CHAT, json=fields) as reply,
        ):
            await anext(reply.aiter_raw())
            busy = await LlamaCpp().load(side, None)
        async with asyncio.timeout(10):
            while not await idle(side):  # noqa: ASYNC110  the engine announces nothing
                await asyncio.sleep(0.05)
        after = (await LlamaCpp().load(side, None)).generated_tokens_total
    assert busy.running == 1
    assert busy.kv_used_tokens
    assert before is not None
    assert after is not None
    assert after - before < 1000


@pytest.mark.engine
async def test_a_real_server_says_how_it_is(llamacpp_replica: Replica) -> None:
    async with channel(llamacpp_replica.url) as side:
        assert await LlamaCpp().probe(side, "smollm2") is Readiness.READY
        info, again = await LlamaCpp().info(side), await LlamaCpp().info(side)
        load = await LlamaCpp().load(side, None)
        assert await LlamaCpp().adapters(side) == ()
    assert info.models == ("smollm2",)
    assert info.epoch == again.epoch is not None
    assert info.kv_capacity_tokens == load.kv_capacity_tokens == 4096
    assert None not in (load.waiting, load.prefill_tokens_total, load.prefill_busy_s_total)


@pytest.mark.engine
async def test_the_epoch_changes_with_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    epochs = []
    for _ in range(2):
        with running_llamacpp(tmp_path_factory.mktemp("llamacpp") / "replica.log") as replica:
            async with channel(replica.url) as side:
                epochs.append((await LlamaCpp().info(side)).epoch)
    assert None not in epochs
    assert epochs[0] != epochs[1]


@pytest.fixture(scope="module")
def adapters_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_adapters(tmp_path_factory.mktemp("lora"), ("sql", "poems")) as url:
        yield url


@pytest.mark.engine
async def test_real_adapters_are_used_alone_and_never_linger(adapters_server: str, llamacpp_replica: Replica) -> None:
    """The server applies both at scale 1 unless told otherwise, and has the other's cache entries."""
    fields = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "logprobs": 3}

    def tokens(answer: Any) -> list[tuple[str, float]]:
        return [(t["token"], round(t["logprob"], 2)) for t in answer["choices"][0]["logprobs"]["content"]]

    async with channel(adapters_server) as side:
        held = await LlamaCpp().adapters(side)
    assert [(adapter.name, adapter.id) for adapter in held] == [("sql", 0), ("poems", 1)]
    said = []
    # The server ends a connection that is idle for some seconds, as one may be on a busy machine; httpx2 tries once.
    anew = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=adapters_server, timeout=60, limits=anew) as client:
        for name in (None, "sql", None, "poems", "sql", "poems", None):
            own, ours = await ask(client, wish(COMPLETIONS, fields, adapter=name, adapters=held))
            assert tokens(own) == tokens(ours)
            said.append(tokens(ours))
        unasked = tokens((await client.post(COMPLETIONS, json=fields)).json())
    async with httpx2.AsyncClient(base_url=llamacpp_replica.url, timeout=60) as client:
        base = tokens((await client.post(COMPLETIONS, json=fields)).json())
    assert said[0] == said[2] == said[6] == base
    assert said[1] == said[4]
    assert said[3] == said[5]
    assert len({tuple(each) for each in (said[0], said[1], said[3], unasked)}) == 4
