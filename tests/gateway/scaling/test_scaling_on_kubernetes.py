"""A pool on Kubernetes, at a running gateway: its pods are found, counted, scaled, chosen to go and restarted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2

from backends.kubernetes.scale import RESOURCES
from loadtests.engine import FakeEngine
from tests.support.command import PATIENCE_S, serve_process
from tests.support.kubernetes_api import endpoint, endpoint_slice, kubeconfig, kubernetes_api, workload

CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
COST = "controller.kubernetes.io/pod-deletion-cost"


def slice_of(pod: str, engine: FakeEngine, *, leaving: bool = False) -> dict[str, Any]:
    """A slice of its own for each pod, since they have one address here and a port each."""
    ports = [("http", engine.ports[0])]
    return endpoint_slice(
        f"sglang-{pod}", [endpoint("127.0.0.1", pod, ready=not leaving, terminating=leaving)], ports=ports
    )


async def test_pods_are_found_added_and_taken_away_under_load_and_no_request_is_lost(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        engines = {
            pod: await stack.enter_async_context(FakeEngine(interval_s=0.01, chunks=8))
            for pod in ("sglang-a", "sglang-b")
        }
        api = await stack.enter_async_context(kubernetes_api())
        deployment = api.workloads[RESOURCES["Deployment"].plural, "sglang"] = workload("Deployment", "sglang", 1)
        api.pods = {pod: {"metadata": {"name": pod, "annotations": {}}} for pod in engines}
        await api.put(slice_of("sglang-a", engines["sglang-a"]))
        cluster = {"kubeconfig": kubeconfig(api, tmp_path)}
        pool = {
            "engine": "openai",
            "discovery": {"kubernetes": {"service": "sglang", **cluster}},
            "scaling": {"max": 4, "provider": "kubernetes", "kubernetes": {"name": "sglang", **cluster}, "drain_s": 20},
        }
        gateway = await stack.enter_async_context(serve_process(tmp_path, [], backends={"pool": pool}))
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=30))
        url, admin = await gateway.url(), await gateway.admin_url()
        owner = {"authorization": f"Bearer {gateway.token}"}

        async def order(method: str, path: str, body: Any = None) -> None:
            answer = await client.request(method, admin + path, json=body, headers=owner)
            assert answer.status_code == 200, answer.text

        async def until(what: str, holds: Callable[[], Awaitable[bool]]) -> None:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        if await holds():
                            return
                        await asyncio.sleep(0.1)
            except TimeoutError:
                raise AssertionError(f"not so: {what}") from None

        async def at_work(pods: set[str]) -> bool:
            (worker,) = await gateway.fleet(client)
            replicas = worker["pools"][0]["replicas"]
            return {each["name"] for each in replicas if each["available"]} == pods

        async def asked_for(count: int) -> bool:
            return bool(deployment["spec"]["replicas"] == count)

        statuses: list[int] = []
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                answer = await client.post(f"{url}/v1/chat/completions", json=CHAT)
                assert answer.status_code != 200 or "[DONE]" in answer.text
                statuses.append(answer.status_code)

        await until("the first pod is found", lambda: at_work({"sglang-a"}))
        crowd = [asyncio.create_task(load()) for _ in range(3)]
        await order("PUT", "/admin/scaling/pool", {"count": 2, "for_s": 600})
        await until("the deployment is told", lambda: asked_for(2))
        await api.put(slice_of("sglang-b", engines["sglang-b"]))
        await until("the second pod is found", lambda: at_work({"sglang-a", "sglang-b"}))
        await order("PUT", "/admin/scaling/pool", {"count": 1, "for_s": 600})
        await until("one was drained, and the deployment is told", lambda: asked_for(1))
        (going,) = [pod for pod, found in api.pods.items() if found["metadata"]["annotations"].get(COST) == "-100"]
        (staying,) = engines.keys() - {going}
        assert await at_work({staying})
        await api.put(slice_of(going, engines[going], leaving=True))
        await api.remove(f"sglang-{going}")
        await until("it is gone", lambda: at_work({staying}))
        await order("POST", "/admin/pools/pool/roll")
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        assert "kubectl.kubernetes.io/restartedAt" in annotations
        stop.set()
        await asyncio.gather(*crowd)
        assert set(statuses) == {200}
        assert all(engine.served for engine in engines.values())
