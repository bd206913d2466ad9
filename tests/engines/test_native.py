"""What the engines do, without the gateway: the facts that the dialects build on, each seen in the engine itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from tests.engines.fleet import Fleet
from tests.engines.gateway_process import eventually
from tests.engines.install import MODEL
from tests.engines.native import Stream, ask, client_of, streaming, text
from tests.engines.replica import ADAPTERS, LATER, NAME, RUNNING_LIMIT, Replica
from tests.engines.sglang.replica import QUEUE_LIMIT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEA = "Tell me all about the sea."
IDLE_WITHIN_S = 10.0
LONG_PROMPT = "The moon pulls the sea, the sea follows late, and the shore waits. " * 6


@asynccontextmanager
async def occupied(replica: Replica, streams: int, **fields: Any) -> AsyncIterator[list[Stream]]:
    """So many endless streams under way; when the block ends they are dropped, and the engine is idle again."""
    try:
        async with AsyncExitStack() as stack:
            opened = []
            for place in range(streams):
                stream = await stack.enter_async_context(streaming(replica, f"Story {place}", **fields))
                await stream.next()
                opened.append(stream)
            yield opened
    finally:
        await idle(replica)


async def idle(replica: Replica) -> None:
    await eventually(lambda: replica.busy() == 0, limit_s=IDLE_WITHIN_S, what=f"{replica.name} is idle")


# Answers.


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("prompt", [SEA, "What makes the tides?"])
async def test_all_engines_say_the_same(mixed_fleet: dict[str, Replica], prompt: str, adapter: str | None) -> None:
    answers = {name: await text(replica, prompt, adapter, max_tokens=24) for name, replica in mixed_fleet.items()}
    assert len(set(answers.values())) == 1, answers


async def test_all_engines_count_the_same_prompt_tokens(mixed_fleet: dict[str, Replica]) -> None:
    prompt = "Größe: 1234 metres,\n\n  'twas in 1987!\t\n" + LONG_PROMPT
    answers = [await ask(replica, prompt, max_tokens=1) for replica in mixed_fleet.values()]
    assert len({answer.json()["usage"]["prompt_tokens"] for answer in answers}) == 1


async def test_an_adapter_says_something_else(replica: Replica) -> None:
    answers = [await text(replica, SEA, adapter) for adapter in (None, *ADAPTERS)]
    assert len(set(answers)) == len(answers)


async def test_cached_tokens_are_reported(replica: Replica) -> None:
    prompt = f"{replica.url} {time.monotonic_ns()} {LONG_PROMPT}"  # nothing of it was asked before
    first, second = [(await ask(replica, prompt, max_tokens=2)).json()["usage"] for _ in range(2)]
    # The first tokens are the chat template's, which every prompt shares.
    assert first["prompt_tokens_details"]["cached_tokens"] < 10
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert second["prompt_tokens"] - 33 <= cached < second["prompt_tokens"]  # a vLLM block has 32


async def test_cached_tokens_are_per_adapter(replica: Replica) -> None:
    prompt = f"{time.monotonic_ns()} {LONG_PROMPT}"
    await text(replica, prompt)
    usage = (await ask(replica, prompt, ADAPTERS[0], max_tokens=2)).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] < 10


# Names.


async def test_vllm_refuses_a_model_it_does_not_have(vllm_replica: Replica) -> None:
    for name in ("nonesuch", f"{NAME}:{ADAPTERS[0]}"):
        answer = await ask(vllm_replica, SEA, model=name)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


@pytest.mark.parametrize("name", ["nonesuch", ADAPTERS[0]], ids=["unknown", "bare adapter"])
async def test_sglang_answers_any_name_with_its_base_model(sglang_replica: Replica, name: str) -> None:
    answer = await ask(sglang_replica, SEA, model=name)
    assert answer.status_code == 200
    assert answer.json()["model"] == name
    assert answer.json()["choices"][0]["message"]["content"] == await text(sglang_replica, SEA)


async def test_sglang_refuses_an_adapter_it_has_not_loaded(sglang_replica: Replica) -> None:
    answer = await ask(sglang_replica, SEA, model=f"{NAME}:nonesuch")
    assert answer.status_code == 400
    assert "never been loaded" in answer.json()["message"]


async def test_llamacpp_answers_any_name_and_says_its_own(llamacpp_tiny: Replica) -> None:
    answer = await ask(llamacpp_tiny, SEA, model="nonesuch")
    assert answer.status_code == 200
    assert answer.json()["model"] == NAME


@pytest.mark.parametrize("lora", [None, []], ids=["absent", "empty"])
async def test_llamacpp_answers_from_an_adapters_cache_unless_every_scale_is_given(
    llamacpp_tiny: Replica, lora: list[object] | None
) -> None:
    """Worse: what is then in its cache as the base model's answers requests that do give every scale."""
    prompt = f"{time.monotonic_ns()}, then all about the sea and what is in it."
    try:
        base = await text(llamacpp_tiny, prompt)
        adapted = await text(llamacpp_tiny, prompt, ADAPTERS[0])
        assert base == await text(llamacpp_tiny, prompt)
        assert adapted == await text(llamacpp_tiny, prompt, ADAPTERS[0])
        assert base != adapted
        async with client_of(llamacpp_tiny) as client:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json=body if lora is None else {**body, "lora": lora})
        assert answer.json()["choices"][0]["message"]["content"] != base
        assert await text(llamacpp_tiny, prompt) != base
    finally:
        llamacpp_tiny.kill()  # nobody else shall be answered from this cache


@pytest.mark.parametrize("cache_prompt", [True, False])
async def test_llamacpps_cache_of_finished_prompts_does_not_tell_adapters_apart(
    llamacpp_with_prompt_cache: Replica, cache_prompt: bool
) -> None:
    """Although every scale is given. Right are answers without that cache (`--cache-ram 0`), or without any."""
    replica = llamacpp_with_prompt_cache

    async def fill(prompt: str, adapter: str | None) -> list[str]:
        """Ask in all slots at a time."""
        asking = (
            text(replica, prompt, adapter, max_tokens=24, cache_prompt=cache_prompt) for _ in range(RUNNING_LIMIT)
        )
        return await asyncio.gather(*asking)

    base = await text(replica, SEA, max_tokens=24)
    seen = set()
    for place in range(8):
        await fill(SEA, ADAPTERS[0])  # is put into the cache when the slots get something else to do
        await fill(f"{place} {LONG_PROMPT}", None)
        seen |= set(await fill(SEA, None))
    assert (seen == {base}) is not cache_prompt


async def adapters(client: httpx2.AsyncClient) -> set[str]:
    """The adapters that SGLang or vLLM lists: the models with a parent."""
    models = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models if model["parent"] is None] == [NAME]
    return {model["id"] for model in models if model["parent"] == NAME}


async def test_sglang_loads_and_unloads_an_adapter(sglang_replica: Replica, llamacpp_tiny: Replica) -> None:
    async with client_of(sglang_replica) as client:
        loaded = await client.post("/load_lora_adapter", json={"lora_name": LATER, "lora_path": str(MODEL / LATER)})
        assert loaded.status_code == 200
        again = await client.post("/load_lora_adapter", json={"lora_name": LATER, "lora_path": str(MODEL / LATER)})
        assert again.status_code == 400
        try:
            assert await adapters(client) == {*ADAPTERS, LATER}
            assert await text(sglang_replica, SEA, LATER) == await text(llamacpp_tiny, SEA, LATER)
        finally:
            unloaded = await client.post("/unload_lora_adapter", json={"lora_name": LATER})
        assert unloaded.status_code == 200
        gone = await client.post("/unload_lora_adapter", json={"lora_name": LATER})
        assert gone.status_code == 400
        assert LATER not in await adapters(client)
        # Yet who asks for it has it loaded again.
        assert await text(sglang_replica, SEA, LATER) == await text(llamacpp_tiny, SEA, LATER)
        assert LATER in await adapters(client)


async def test_vllm_loads_and_unloads_an_adapter(vllm_replica: Replica, llamacpp_tiny: Replica) -> None:
    async with client_of(vllm_replica) as client:
        loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": LATER, "lora_path": str(MODEL / LATER)})
        assert loaded.status_code == 200
        again = await client.post("/v1/load_lora_adapter", json={"lora_name": LATER, "lora_path": str(MODEL / LATER)})
        assert again.status_code == 400
        try:
            assert await adapters(client) == {*ADAPTERS, LATER}
            assert await text(vllm_replica, SEA, LATER) == await text(llamacpp_tiny, SEA, LATER)
        finally:
            unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": LATER})
        assert unloaded.status_code == 200
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": LATER})
        assert gone.status_code == 404
    assert (await ask(vllm_replica, SEA, LATER)).status_code == 404


async def test_vllm_on_a_cpu_answers_for_its_base_model_from_the_adapter_in_the_last_slot(
    vllm_replica: Replica, fleet: Fleet
) -> None:
    """In a batch with others the base model's requests have slot -1, which torch takes for the last of `--max-loras`.

    Here all slots are filled; the other tests leave the last one empty, and so without effect.
    """
    spare = "spare"
    base = await text(vllm_replica, SEA)

    async def side_by_side() -> list[str]:
        wanted = (None, *ADAPTERS, None)
        answers = await asyncio.gather(*(text(vllm_replica, SEA, adapter) for adapter in wanted))
        return [answers[0], answers[-1]]

    assert await side_by_side() == [base, base]
    try:
        async with client_of(vllm_replica) as client:
            for name in (LATER, spare):
                order = {"lora_name": name, "lora_path": str(MODEL / LATER)}
                assert (await client.post("/v1/load_lora_adapter", json=order)).status_code == 200
        for adapter in (*ADAPTERS, LATER, spare):
            await text(vllm_replica, SEA, adapter)
        assert await text(vllm_replica, SEA) == base, "alone it is right"
        wrong = [await side_by_side() for _ in range(5)]
        assert any(answer != base for answers in wrong for answer in answers)
    finally:
        vllm_replica.kill()  # nothing empties a slot
        fleet.begin(vllm_replica.name)


# Load, queues and priority.


@pytest.mark.parametrize("streams", [1, RUNNING_LIMIT])
async def test_the_load_it_reports_is_what_runs(replica: Replica, streams: int) -> None:
    async with occupied(replica, streams):
        counts = await asyncio.to_thread(replica.counts)
        assert (counts.running, counts.waiting) == (streams, 0)


async def test_what_has_to_wait_is_reported_as_waiting(replica: Replica) -> None:
    async with occupied(replica, RUNNING_LIMIT), asyncio.TaskGroup() as group:
        waiting = [group.create_task(ask(replica, f"{place} waits", max_tokens=1)) for place in range(2)]
        await eventually(lambda: replica.counts().waiting == 2, limit_s=5, what="two wait")
        counts = await asyncio.to_thread(replica.counts)
        assert (counts.running, counts.waiting) == (RUNNING_LIMIT, 2)
        for task in waiting:
            task.cancel()


async def test_vllms_load_is_running_and_waiting_together(vllm_replica: Replica) -> None:
    async with client_of(vllm_replica) as client, occupied(vllm_replica, 3):
        assert (await client.get("/load")).json() == {"server_load": 3}


async def test_sglang_refuses_what_its_queue_has_no_room_for(sglang_replica: Replica) -> None:
    """With 503; but once a stream is asked for, with 200 and an error as its only event."""
    async with occupied(sglang_replica, RUNNING_LIMIT), asyncio.TaskGroup() as group:
        waiting = [group.create_task(ask(sglang_replica, f"{place} waits")) for place in range(QUEUE_LIMIT)]
        await eventually(lambda: sglang_replica.counts().waiting == QUEUE_LIMIT, limit_s=5, what="the queue is full")
        whole = await ask(sglang_replica, SEA)
        assert whole.status_code == 503
        assert whole.json()["message"] == "The request queue is full."
        async with streaming(sglang_replica, SEA) as stream:
            await stream.rest()
        assert stream.status == 200
        assert (stream.pieces, stream.done) == (0, True)
        assert [(error["code"], error["message"]) for error in stream.errors] == [(503, "The request queue is full.")]
        for task in waiting:
            task.cancel()


async def order_of_completion(replica: Replica, *priorities: int) -> list[int]:
    """Which of these requests, sent in this order to a full engine, is answered when."""
    answered: list[int] = []

    async def wait_for_answer(priority: int) -> None:
        answer = await ask(replica, f"priority {priority}", max_tokens=2, priority=priority)
        assert answer.status_code == 200
        answered.append(priority)

    async with (
        occupied(replica, RUNNING_LIMIT - 1, priority=0),
        streaming(replica, "the one that makes room", priority=0) as leaving,
    ):
        await leaving.next()
        async with asyncio.TaskGroup() as group:
            for place, priority in enumerate(priorities, start=1):
                group.create_task(wait_for_answer(priority))
                await eventually(lambda: replica.counts().waiting == place, limit_s=5, what=f"{place} wait")  # noqa: B023
            await leaving.close()
    return answered


async def test_sglang_serves_the_higher_number_first(sglang_replica: Replica) -> None:
    assert await order_of_completion(sglang_replica, 1, 5, 3) == [5, 3, 1]


async def test_vllm_serves_the_lower_number_first(vllm_replica: Replica) -> None:
    assert await order_of_completion(vllm_replica, 3, 5, 1) == [1, 3, 5]


async def test_llamacpp_serves_in_the_order_of_arrival(llamacpp_tiny: Replica) -> None:
    assert await order_of_completion(llamacpp_tiny, 3, 5, 1) == [3, 5, 1]


async def test_sglang_interrupts_requests_without_a_priority_for_one_that_has_any(sglang_replica: Replica) -> None:
    """Without one a request has the lowest there is, and ten steps of difference make SGLang preempt."""
    async with occupied(sglang_replica, RUNNING_LIMIT), asyncio.timeout(5):
        assert await text(sglang_replica, SEA, max_tokens=2, priority=0)
    async with occupied(sglang_replica, RUNNING_LIMIT, priority=0):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await text(sglang_replica, SEA, max_tokens=2, priority=0)


# Health.


async def timed(client: httpx2.AsyncClient, path: str) -> tuple[int, float]:
    began_at = time.monotonic()
    answer = await client.get(path)
    return answer.status_code, time.monotonic() - began_at


async def test_sglangs_ready_is_cheap_and_its_health_is_a_generation(sglang_replica: Replica) -> None:
    """/health asks the scheduler for a token and looks after it once a second."""
    async with client_of(sglang_replica) as client:
        for streams in (0, RUNNING_LIMIT):
            async with occupied(sglang_replica, streams):
                status, took_s = await timed(client, "/ready")
                assert status == 200
                assert took_s < 0.5
                status, took_s = await timed(client, "/health")
                assert status == 200
                assert 0.9 < took_s < 5


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
async def test_health_is_cheap_and_there_is_no_ready(mixed_fleet: dict[str, Replica], name: str) -> None:
    replica = mixed_fleet[name]
    async with client_of(replica) as client:
        assert (await client.get("/ready")).status_code == 404
        for streams in (0, RUNNING_LIMIT):
            async with occupied(replica, streams):
                status, took_s = await timed(client, "/health")
                assert status == 200
                assert took_s < 0.5


# Clients that leave.


async def test_a_dropped_stream_stops_the_engine(replica: Replica) -> None:
    async with occupied(replica, 1):
        before = await asyncio.to_thread(replica.counts)
    aborted = None if before.aborted is None else before.aborted + 1
    await eventually(lambda: replica.busy() == 0, limit_s=2, what="the engine has stopped")
    after = await asyncio.to_thread(replica.counts)
    assert after.generated_tokens - before.generated_tokens < 3000, "it went on to the end"
    if before.aborted is not None:  # of these engines, SGLang counts them
        await eventually(lambda: replica.counts().aborted == aborted, limit_s=10, what="the abort is counted")
