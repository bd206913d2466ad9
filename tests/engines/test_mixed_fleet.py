"""Two SGLang, a vLLM and a llama.cpp behind one model name: what clients get, and what the gateway knows of each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import httpx2
import openai
import pytest

from tests.engines import native
from tests.engines.clients import SEA, SEEN_WITHIN_S, chat, gateway_for, said, stream
from tests.engines.gateway_process import MODEL, GatewayProcess, eventually
from tests.engines.replica import ADAPTERS, NAME, RUNNING_LIMIT, Metrics, Replica
from tests.engines.sglang.replica import PAGE_TOKENS
from tests.engines.vllm.replica import BLOCK_TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STORY = "The moon pulls the sea, the sea follows late, and the shore waits. " * 6


async def test_every_engine_answers_the_same_by_one_name(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    """Whole and streamed, from the base model and from adapters: who answers is not to be seen in the text."""
    prompts = {adapter: await native.text(mixed_fleet["llamacpp"], SEA, adapter) for adapter in (None, *ADAPTERS)}
    served: Counter[str] = Counter()
    async with gateway_for(tmp_path, mixed_fleet) as gateway, gateway.async_sdk() as client:
        for adapter, expected in prompts.items():
            model = MODEL if adapter is None else f"{MODEL}:{adapter}"
            whole = await asyncio.gather(*(chat(client, SEA, model) for _ in range(12)))
            begun = await asyncio.gather(*(stream(client, SEA, model, max_tokens=16) for _ in range(12)))
            streamed = [(name, (await said(chunks))[0]) for name, chunks in begun]
            assert {text for _, text in (*whole, *streamed)} == {expected}
            served.update(name for name, _ in (*whole, *streamed))
    assert set(served) == set(mixed_fleet)


async def test_names_nobody_has_are_refused_whatever_the_engines_would_say(
    mixed_fleet: dict[str, Replica], tmp_path: Path
) -> None:
    async with gateway_for(tmp_path, mixed_fleet) as gateway, gateway.async_sdk() as client:
        for name in ("nonesuch", NAME, ADAPTERS[0], f"{MODEL}:nonesuch", f"{NAME}:{ADAPTERS[0]}"):
            with pytest.raises(openai.NotFoundError):
                await chat(client, SEA, name)
        listed = {model.id async for model in client.models.list()}
    assert {MODEL, *(f"{MODEL}:{adapter}" for adapter in ADAPTERS)} <= listed


async def test_the_load_it_shows_is_what_the_engines_say(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    """Requests that came past the gateway are in it, so it can only have been read."""
    async with gateway_for(tmp_path, mixed_fleet) as gateway:
        for name, replica in mixed_fleet.items():
            async with native.streaming(replica, SEA) as one, native.streaming(replica, STORY) as other:
                await one.next()
                await other.next()
                shown = await eventually(
                    lambda: (load := gateway.replicas()[name]["load"])["running"] == 2 and load,  # noqa: B023
                    limit_s=SEEN_WITHIN_S,
                    what=f"two run in {name}",
                )
                counts = await asyncio.to_thread(replica.counts)
                assert (counts.running, counts.waiting) == (2, 0)
                assert shown["waiting"] == 0
            await eventually(
                lambda: gateway.replicas()[name]["load"]["running"] == 0,  # noqa: B023
                limit_s=SEEN_WITHIN_S,
                what=f"{name} is idle",
            )


async def test_waiting_requests_are_shown_as_waiting(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    async with gateway_for(tmp_path, {"vllm": mixed_fleet["vllm"]}) as gateway, gateway.async_sdk() as client:
        begun = [asyncio.create_task(stream(client, f"Story {place}")) for place in range(RUNNING_LIMIT + 2)]
        await eventually(
            lambda: (
                (gateway.replicas()["vllm"]["load"]["running"], gateway.replicas()["vllm"]["load"]["waiting"])
                == (RUNNING_LIMIT, 2)
            ),
            limit_s=SEEN_WITHIN_S,
            what="four run and two wait",
        )
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
    await eventually(lambda: mixed_fleet["vllm"].busy() == 0, limit_s=10, what="vLLM is idle")


async def test_cached_tokens_are_recorded_for_every_engine(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    async with gateway_for(tmp_path, mixed_fleet) as gateway, gateway.async_sdk() as client:
        prompt = f"{time.monotonic_ns()} {STORY}"
        before = {name: replica.counts().cached_tokens for name, replica in mixed_fleet.items()}
        for _ in range(10):
            await asyncio.gather(*(chat(client, prompt, max_tokens=2) for _ in range(4)))
        await eventually(lambda: len(gateway.records()) >= 40, limit_s=10, what="every record is written")
        recorded = gateway.cached_tokens()
        gained = {name: replica.counts().cached_tokens - before[name] for name, replica in mixed_fleet.items()}
    assert {name: recorded.get(name, 0) for name in gained} == gained
    gained.pop("llamacpp")  # it holds adapters, so its cache is switched off
    assert all(gained.values()), "some engine had nothing in its cache"


async def test_kv_events_tell_what_the_engines_hold(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    """The full pages of each new prompt and its answer. What SGLang can evict is that, by its own count."""
    followed = {name: each for name, each in mixed_fleet.items() if each.kind.engine != "llamacpp"}
    async with gateway_for(tmp_path, followed) as gateway:

        def shown(name: str) -> tuple[int, int]:
            events = gateway.replicas()[name]["kv_events"]
            return sum(events["blocks"].values()), sum(events["tokens"].values())

        def trusted(name: str) -> bool:
            """A stream that was joined late is trusted from the moment the engine empties its cache."""
            if followed[name].kind.engine == "sglang":
                url = f"{followed[name].url}/flush_cache"
                assert httpx2.post(url, trust_env=False, timeout=30).status_code == 200
            return gateway.replicas()[name]["kv_events"]["trusted"] is True

        for name, replica in followed.items():
            sglang = replica.kind.engine == "sglang"
            page, before, full = (PAGE_TOKENS if sglang else BLOCK_TOKENS), (0, 0), 0
            if sglang:
                await eventually(lambda: trusted(name), limit_s=SEEN_WITHIN_S, what=f"{name} is trusted")  # noqa: B023
            else:
                before = await joined(gateway, replica)
            for place in range(3):
                answer = await native.ask(replica, f"{time.monotonic_ns()} {place} {STORY * 3}", max_tokens=20)
                usage = answer.json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] < page
                # The last token of an answer is never computed with.
                full += (usage["prompt_tokens"] + usage["completion_tokens"] - 1) // page
            wanted = (before[0] + full, before[1] + full * page)
            await eventually(lambda: shown(name) == wanted, limit_s=SEEN_WITHIN_S, what=f"{name}: {wanted}")  # noqa: B023
            if sglang:
                await eventually(
                    lambda: Metrics.of(replica.url).total("sglang:kv_evictable_tokens") == wanted[1],  # noqa: B023
                    limit_s=SEEN_WITHIN_S,
                    what=f"{name} counts {wanted[1]} tokens as well",
                )
                assert gateway.replicas()[name]["kv_events"]["trusted"]


async def joined(gateway: GatewayProcess, replica: Replica) -> tuple[int, int]:
    """Ask new prompts until the gateway hears of one: a subscriber hears nothing of the time before. What it shows."""
    before = (0, 0)
    end = time.monotonic() + SEEN_WITHIN_S
    while before == (0, 0) and time.monotonic() < end:
        await native.ask(replica, f"{time.monotonic_ns()} {STORY}", max_tokens=2)
        await asyncio.sleep(0.5)  # the event is on its way
        events = gateway.replicas()[replica.name]["kv_events"]
        before = (sum(events["blocks"].values()), sum(events["tokens"].values()))
    return before


async def test_a_client_that_leaves_stops_whichever_engine_it_was(
    mixed_fleet: dict[str, Replica], tmp_path: Path
) -> None:
    """Seen in the engines' own counts: nothing runs, no token is made, and SGLang has counted an abort."""
    sglang = [name for name, replica in mixed_fleet.items() if replica.kind.engine == "sglang"]
    aborted = {name: mixed_fleet[name].counts().aborted or 0 for name in sglang}
    left: Counter[str] = Counter()
    async with gateway_for(tmp_path, mixed_fleet) as gateway, gateway.async_sdk() as client:
        begun = [await stream(client, f"Story {place}") for place in range(8)]
        for name, chunks in begun:
            await anext(aiter(chunks))
            left[name] += 1
        assert set(left) == set(mixed_fleet)
        for _, chunks in begun:
            await chunks.close()
        for name, replica in mixed_fleet.items():
            await eventually(lambda: replica.busy() == 0, limit_s=3, what=f"{name} has stopped")  # noqa: B023
    for name in sglang:
        await eventually(
            lambda: mixed_fleet[name].counts().aborted == aborted[name] + left[name],  # noqa: B023
            limit_s=10,
            what=f"{name} has counted {left[name]} aborts",
        )
