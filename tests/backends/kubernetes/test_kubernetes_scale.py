"""`KubernetesScaler` against an API server on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backends.kubernetes.client import Access
from backends.kubernetes.errors import ApiAway, Conflict, Forbidden, NoAccess, NotThere, Unauthorized
from backends.kubernetes.scale import RESOURCES, Kind, KubernetesScaler, leaving
from tests.support.kubernetes_api import Answer, Call, KubernetesApi, kubeconfig, kubernetes_api, workload

COST = "controller.kubernetes.io/pod-deletion-cost"


@pytest.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    async with kubernetes_api() as api:
        for kind, resource in RESOURCES.items():
            api.workloads[resource.plural, "sglang"] = workload(kind, "sglang", 2)
        api.pods = {name: {"metadata": {"name": name, "annotations": {"kept": "yes"}}} for name in ("a", "b", "c")}
        yield api


def scaler(api: KubernetesApi, folder: Path, kind: Kind = "Deployment", timeout_s: float = 10.0) -> KubernetesScaler:
    return KubernetesScaler(
        Access(kubeconfig=kubeconfig(api, folder)),
        kind,
        "sglang",
        timeout_s=timeout_s,
        now=lambda: datetime(2026, 11, 22, 21, 30, tzinfo=UTC),
    )


@pytest.mark.parametrize("kind", RESOURCES)
async def test_a_workload_is_counted_and_scaled(api: KubernetesApi, tmp_path: Path, kind: Kind) -> None:
    one = scaler(api, tmp_path, kind)
    assert await one.current() == (2, 2)
    assert await one.scale(5) == (5, 2)
    assert api.workloads[RESOURCES[kind].plural, "sglang"]["spec"]["replicas"] == 5
    assert await one.scale(0) == (0, 2)
    await one.close()
    assert api.media == {"application/merge-patch+json"}
    resource = RESOURCES[kind]
    assert api.calls == [
        Call(verb, resource.group, f"{resource.plural}/scale", "models", "sglang") for verb in ("get", "patch", "patch")
    ]


async def test_fewer_than_none_are_refused_before_anything_is_sent(api: KubernetesApi, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="-1 replicas of Deployment sglang"):
        await scaler(api, tmp_path).scale(-1)
    assert api.calls == []


async def test_pods_that_should_go_are_marked_and_others_no_longer(api: KubernetesApi, tmp_path: Path) -> None:
    one = scaler(api, tmp_path)
    assert await one.prefer_to_remove(["a", "b", "gone"])
    assert [api.pods[name]["metadata"]["annotations"].get(COST) for name in "abc"] == ["-100", "-100", None]
    assert await one.prefer_to_remove(["b"])
    assert [api.pods[name]["metadata"]["annotations"].get(COST) for name in "abc"] == [None, "-100", None]
    assert api.pods["a"]["metadata"]["annotations"] == {"kept": "yes"}
    await one.close()


@pytest.mark.parametrize("kind", ["StatefulSet", "LeaderWorkerSet"])
async def test_where_nobody_can_choose_pods_are_left_alone(api: KubernetesApi, tmp_path: Path, kind: Kind) -> None:
    assert not await scaler(api, tmp_path, kind).prefer_to_remove(["a"])
    assert api.calls == []


def test_the_highest_numbers_leave_first() -> None:
    pods = ["sglang-0", "sglang-10", "sglang-9", "sglang-2"]
    assert leaving("StatefulSet", pods, 2) == ("sglang-10", "sglang-9")
    assert leaving("LeaderWorkerSet", pods, 4) == ()
    assert leaving("Deployment", pods, 2) is None


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ["template"]),
        ("StatefulSet", ["template"]),
        ("LeaderWorkerSet", ["leaderWorkerTemplate", "workerTemplate"]),
    ],
)
async def test_a_restart_is_a_new_template(api: KubernetesApi, tmp_path: Path, kind: Kind, path: list[str]) -> None:
    one = scaler(api, tmp_path, kind)
    await one.restart()
    await one.close()
    found = api.workloads[RESOURCES[kind].plural, "sglang"]["spec"]
    assert found["replicas"] == 2
    for key in path:
        found = found[key]
    assert found["metadata"]["annotations"] == {"kubectl.kubernetes.io/restartedAt": "2026-11-22T21:30:00+00:00"}


async def test_a_conflict_is_tried_again(api: KubernetesApi, tmp_path: Path) -> None:
    api.conflicts = 3
    one = scaler(api, tmp_path)
    assert await one.scale(4) == (4, 2)
    api.conflicts = 100
    with pytest.raises(Conflict, match=r"cannot patch deployments/scale \(apps\) sglang"):
        await one.scale(5)
    assert api.conflicts == 96
    await one.close()


async def test_a_missing_right_is_named(api: KubernetesApi, tmp_path: Path) -> None:
    api.allow = {("get", "apps", "deployments/scale")}
    one = scaler(api, tmp_path)
    assert await one.current() == (2, 2)
    with pytest.raises(Forbidden) as caught:
        await one.scale(3)
    assert "the right to patch deployments/scale (apps) in namespace models" in str(caught.value)
    with pytest.raises(Forbidden, match="the right to patch pods in namespace models"):
        await one.prefer_to_remove(["a"])
    await one.close()


async def test_an_object_that_is_not_there_is_named(api: KubernetesApi, tmp_path: Path) -> None:
    api.workloads.clear()
    one = scaler(api, tmp_path, "StatefulSet")
    with pytest.raises(NotThere, match=r"there is no statefulsets/scale \(apps\) sglang in namespace models"):
        await one.current()
    await one.close()


async def test_an_answer_that_does_not_come_is_not_waited_for(api: KubernetesApi, tmp_path: Path) -> None:
    api.silent = True
    one = scaler(api, tmp_path, timeout_s=0.3)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApiAway):
        await one.current()
    assert loop.time() - began < 5
    api.silent = False
    await asyncio.sleep(0)
    one = scaler(api, tmp_path)
    assert await one.current() == (2, 2)
    await one.close()


async def test_cancelling_ends_a_call(api: KubernetesApi, tmp_path: Path) -> None:
    api.silent = True
    one = scaler(api, tmp_path, timeout_s=60.0)
    task = asyncio.create_task(one.current())
    async with asyncio.timeout(20):
        while not api.calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    began = asyncio.get_running_loop().time()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert asyncio.get_running_loop().time() - began < 1.5


async def test_a_scaler_finds_its_way_back_to_a_server_that_restarted(api: KubernetesApi, tmp_path: Path) -> None:
    one = scaler(api, tmp_path)
    assert await one.current() == (2, 2)
    await api.stop()
    with pytest.raises(ApiAway, match=f"127.0.0.1:{api.port}"):
        await one.current()
    await api.start()
    assert await one.current() == (2, 2)
    await one.close()


async def test_other_answers_are_told_as_they_are(api: KubernetesApi, tmp_path: Path) -> None:
    one = scaler(api, tmp_path)
    api.fails = [Answer(401, "Unauthorized", "Unauthorized"), Answer(500, "InternalError", "etcdserver: no leader")]
    with pytest.raises(Unauthorized, match="does not accept the token"):
        await one.current()
    with pytest.raises(Exception, match="etcdserver: no leader") as caught:
        await one.current()
    assert getattr(caught.value, "status", 0) == 500
    await one.close()


async def test_no_way_to_a_server_is_said_with_all_that_was_tried(tmp_path: Path) -> None:
    environ = {"KUBECONFIG": str(tmp_path / "nothing")}
    one = KubernetesScaler(Access(), "Deployment", "sglang", environ=environ)
    with pytest.raises(NoAccess) as caught:
        await one.current()
    assert "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT not set" in str(caught.value)
    assert str(tmp_path / "nothing") in str(caught.value)
