"""What operators do to the mixed fleet while it works: adapters, drains, several workers."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.engines import native
from tests.engines.clients import (
    SEA,
    SEEN_WITHIN_S,
    adapters_of,
    ask,
    chat,
    entry,
    failures,
    gateway_for,
    more,
    traffic,
)
from tests.engines.fleet import Fleet
from tests.engines.gateway_process import MODEL, eventually, running_gateway
from tests.engines.install import MODEL as MODEL_FOLDER
from tests.engines.replica import ADAPTERS, LATER, NAME, Replica
from tests.engines.tap import Tap, tapped

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LATER_PATH = str(MODEL_FOLDER / LATER)
ORDERS = f"/admin/adapters/pool/{LATER}"


async def unload_later(fleet: dict[str, Replica]) -> None:
    """Have the engines as they were, whatever the test did."""
    for replica in fleet.values():
        await unload(replica, LATER)


async def unload(replica: Replica, *names: str) -> None:
    paths = {"sglang": "/unload_lora_adapter", "vllm": "/v1/unload_lora_adapter"}
    if replica.kind.engine in paths:
        async with native.client_of(replica) as client:
            for name in names:
                await client.post(paths[replica.kind.engine], json={"lora_name": name})


@pytest.mark.parametrize("how", ["configured", "ordered"])
async def test_adapters_are_loaded_under_load(mixed_fleet: dict[str, Replica], tmp_path: Path, how: str) -> None:
    """By the configuration or by `POST /admin/adapters`: nobody waits for it, nobody fails, and all say the same."""
    expected = {
        model: await native.text(mixed_fleet["llamacpp"], SEA, adapter, max_tokens=24)
        for model, adapter in ((MODEL, None), (f"{MODEL}:{LATER}", LATER))
    }
    pool = {"adapters": [{"name": LATER, "path": LATER_PATH}]} if how == "configured" else None
    try:
        async with gateway_for(tmp_path, mixed_fleet, pool=pool) as gateway, traffic(gateway, clients=6) as ended:
            if how == "ordered":
                for name in ("sglang-1", "sglang-2", "vllm"):
                    assert LATER not in adapters_of(gateway.replicas()[name])
                    order = {"pool": "pool", "name": LATER, "path": LATER_PATH, "replica": name}
                    answer = await asyncio.to_thread(gateway.admin, "POST", "/admin/adapters", order)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["replicas"][0]["changed"]
            await eventually(
                lambda: all(LATER in adapters_of(each) for each in gateway.replicas().values()),
                limit_s=SEEN_WITHIN_S,
                what="every replica has the adapter",
            )
            async with gateway.async_sdk() as client:
                adapted = await asyncio.gather(*(ask(client, bool(n % 2), f"{MODEL}:{LATER}") for n in range(24)))
            await more(ended, 12)
            if how == "ordered":
                for name in ("sglang-1", "sglang-2", "vllm"):
                    answer = await asyncio.to_thread(gateway.admin, "DELETE", f"{ORDERS}?replica={name}")
                    assert answer.status_code == 200, answer.text
                    assert LATER not in adapters_of(gateway.replicas()[name])
                async with gateway.async_sdk() as client:
                    # Only llama.cpp has it now.
                    assert await chat(client, SEA, f"{MODEL}:{LATER}", 24) == (
                        "llamacpp",
                        expected[f"{MODEL}:{LATER}"],
                    )
    finally:
        await unload_later(mixed_fleet)
    assert failures([*ended, *adapted]) == []
    assert {each.replica for each in adapted} == set(mixed_fleet)
    wrong = {(each.replica, each.model, each.text) for each in (*ended, *adapted) if each.text != expected[each.model]}
    assert wrong == set()


@pytest.mark.parametrize("name", ["sglang-1", "vllm"])
async def test_adapters_take_turns_in_the_slot_that_is_left(fleet: Fleet, tmp_path: Path, name: str) -> None:
    """Loaded when a request asks for them, beside those of the engine's start, and dropped for one another."""
    (replica,) = fleet.ready(name)
    others = (LATER, "neap")
    pool = {
        "adapters": [{"name": other, "path": LATER_PATH} for other in others],
        "adapters_load": "on_demand",
        "adapter_slots": len(ADAPTERS) + 1,
    }
    texts: dict[str, set[str]] = {}
    try:
        async with gateway_for(tmp_path, {name: replica}, pool=pool) as gateway, gateway.async_sdk() as client:
            for other in (*others, *others):
                _, text = await chat(client, SEA, f"{MODEL}:{other}", 24)
                texts.setdefault(other, set()).add(text)
                shown = gateway.replicas()[name]
                assert adapters_of(shown) == {*ADAPTERS, other}
            _, same = await chat(client, SEA, others[1], 24)
            _, base = await chat(client, SEA, MODEL, 24)
    finally:
        await unload(replica, *others)
    assert texts[others[0]] == texts[others[1]] == {same}
    assert base != same


async def test_an_order_that_llamacpp_cannot_follow_says_so(mixed_fleet: dict[str, Replica], tmp_path: Path) -> None:
    order = {"pool": "pool", "name": "neap", "path": LATER_PATH}
    async with gateway_for(tmp_path, {"llamacpp": mixed_fleet["llamacpp"]}) as gateway:
        answer = await asyncio.to_thread(gateway.admin, "POST", "/admin/adapters", order)
    assert answer.status_code == 501
    assert "llama.cpp loads adapters only at its start" in answer.json()["replicas"][0]["reason"]


async def test_a_drained_replica_finishes_and_gets_nothing_until_it_is_undrained(
    mixed_fleet: dict[str, Replica], tmp_path: Path
) -> None:
    """Each in turn by command, under load, with two workers. An engine is idle by its own count when it is empty."""
    expected = await native.text(mixed_fleet["llamacpp"], SEA, max_tokens=24)
    async with gateway_for(tmp_path, mixed_fleet, workers=2) as gateway, traffic(gateway, clients=6) as ended:
        for name, replica in mixed_fleet.items():
            await more(ended, 2, name)
            done = await asyncio.to_thread(gateway.command, "drain", f"pool/{name}", "--wait", "60")
            drained_at = time.monotonic()
            assert (done.returncode, done.stdout) == (0, f"pool/{name} gets no new work, and is empty\n"), done.stderr
            assert [worker[name]["draining"] for worker in gateway.workers()] == [True, True]
            assert await asyncio.to_thread(replica.busy) == 0
            await more(ended, 8)
            assert name not in {each.replica for each in ended if each.asked_at > drained_at}
            assert await asyncio.to_thread(replica.busy) == 0
            done = await asyncio.to_thread(gateway.command, "undrain", f"pool/{name}")
            assert (done.returncode, done.stdout) == (0, f"pool/{name} gets work again\n"), done.stderr
    assert failures(ended) == []
    assert {each.text for each in ended} == {expected}


async def test_vllm_is_replaced_without_a_failed_request(
    mixed_fleet: dict[str, Replica], fleet: Fleet, tmp_path: Path
) -> None:
    """Drained by admin call, stopped once it is empty, started again, undrained: the engine that cuts its streams."""
    order = "/admin/replicas/pool/vllm"
    async with gateway_for(tmp_path, mixed_fleet, health={}) as gateway, traffic(gateway, clients=3) as ended:
        await more(ended, 2, "vllm")
        drained = await asyncio.to_thread(gateway.admin, "POST", f"{order}/drain")
        assert drained.json()["draining"]
        await eventually(
            lambda: gateway.admin("GET", order).json()["empty"], limit_s=SEEN_WITHIN_S, what="vLLM is empty"
        )
        epoch = gateway.replicas()["vllm"]["epoch"]
        mixed_fleet["vllm"].terminate()
        await asyncio.to_thread(mixed_fleet["vllm"].process.wait, mixed_fleet["vllm"].kind.stop_limit_s)
        fleet.begin("vllm")
        await asyncio.to_thread(fleet.ready, "vllm")
        assert gateway.replicas()["vllm"]["draining"]
        undrained = await asyncio.to_thread(gateway.admin, "POST", f"{order}/undrain")
        assert not undrained.json()["draining"]
        await more(ended, 2, "vllm")
        await eventually(
            lambda: gateway.replicas()["vllm"]["epoch"] not in (None, epoch),
            limit_s=60,  # what an engine is, is asked every half minute
            what="the gateway knows that it began anew",
        )
    assert failures(ended) == []
    assert len({each.text for each in ended}) == 1


async def tap_all(stack: AsyncExitStack, fleet: dict[str, Replica]) -> dict[str, Tap]:
    return {name: await stack.enter_async_context(tapped(replica.url)) for name, replica in fleet.items()}


async def test_one_of_two_workers_asks_each_engine_and_both_know(
    mixed_fleet: dict[str, Replica], tmp_path: Path
) -> None:
    """Counted on the wire: as many questions about its load as one worker asks, and no more."""
    question = {"sglang": "GET /v1/loads", "vllm": "GET /metrics", "llamacpp": "GET /slots"}
    every_s, watched_s = 0.5, 6.0
    async with AsyncExitStack() as stack:
        taps = await tap_all(stack, mixed_fleet)
        gateway = stack.enter_context(
            running_gateway(
                tmp_path,
                engine="openai",
                upstream_model=NAME,
                replicas={name: {**entry(each), "url": taps[name].url} for name, each in mixed_fleet.items()},
                pool={"health": {"load_interval_s": every_s}},
                workers=2,
            )
        )
        await eventually(
            lambda: (
                len(shown := gateway.workers()) == 2
                and all(each["load"] for worker in shown for each in worker.values())
            ),
            limit_s=SEEN_WITHIN_S,
            what="both workers know the load of each replica",
        )
        before = {name: tap.asked(question[mixed_fleet[name].kind.engine]) for name, tap in taps.items()}
        began_at = time.monotonic()
        await asyncio.sleep(watched_s)  # this is the measurement
        asked = {name: tap.asked(question[mixed_fleet[name].kind.engine]) - before[name] for name, tap in taps.items()}
        passed_s = time.monotonic() - began_at
        ages = [each["load"]["age_s"] for worker in gateway.workers() for each in worker.values()]
    most = passed_s / (0.9 * every_s) + 2
    assert all(2 <= count <= most for count in asked.values()), (asked, most)
    assert max(ages) < 5


async def test_llamacpp_gets_every_adapters_scale_from_the_first_request_on(
    mixed_fleet: dict[str, Replica], tmp_path: Path
) -> None:
    """Right after each start of the gateway, also while llama.cpp is busy and another replica is not even there."""
    replica = mixed_fleet["llamacpp"]
    expected = await native.text(replica, SEA, max_tokens=4)
    async with tapped(replica.url) as tap, AsyncExitStack() as stack:
        for busy in (0, 0, 3):
            for place in range(busy):
                begun = await stack.enter_async_context(native.streaming(replica, f"Story {place}"))
                await begun.next()
            with running_gateway(
                tmp_path / str(len(tap.posted(native.CHAT))),
                engine="llamacpp",
                upstream_model=NAME,
                replicas={"llamacpp": tap.url, "away": {"url": "http://127.0.0.1:1", "weight": 0.1}},
            ) as gateway:
                async with gateway.async_sdk() as client:
                    assert await chat(client, SEA, max_tokens=4) == ("llamacpp", expected)
        posted = tap.posted(native.CHAT)
    assert len(posted) == 3
    assert [request["lora"] for request in posted] == [
        [{"id": place, "scale": 0.0} for place in range(len(ADAPTERS) + 1)]
    ] * 3
