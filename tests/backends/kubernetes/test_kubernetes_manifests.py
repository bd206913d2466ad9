"""The manifests in `configs/kubernetes` hold together, fit this gateway, and give exactly the rights that it uses."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.discovery.kubernetes import KubernetesSource
from backends.kubernetes.client import Access
from backends.kubernetes.scale import KubernetesScaler
from backends.kubernetes.slices import Wanted
from gateway.cli import _parser
from gateway.config import Settings, load
from tests.support.kubernetes_api import KubernetesApi, kubeconfig, kubernetes_api, workload

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
API_VERSIONS = {
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "Deployment": "apps/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
SECRETS = ("GATEWAY_ADMIN_TOKEN", "GATEWAY_REGISTRAR_TOKEN", "GATEWAY_METRICS_TOKEN", "DATABASE_PASSWORD", "KEY_PEPPER")
"""What the Secret `tidegate` has, as the README says."""
Json = dict[str, Any]
Rights = set[tuple[str, str, str]]


def documents(path: Path) -> list[Json]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def only(file: str, kind: str, name: str = "") -> Json:
    found = [one for one in documents(FOLDER / file) if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    assert len(found) == 1
    return found[0]


def rights(role: Json) -> Rights:
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "tidegate.yaml"
    path.write_text(only("gateway.yaml", "ConfigMap")["data"]["tidegate.yaml"])
    return load(path, {name: f"{number:064x}" for number, name in enumerate(SECRETS)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_object_is_of_a_known_kind_and_in_the_one_namespace(path: Path) -> None:
    objects = documents(path)
    assert objects
    for one in objects:
        assert one["apiVersion"] == API_VERSIONS[one["kind"]]
        assert one["metadata"]["name"]
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "models"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_roles_are_bound_to_the_gateways_account(path: Path) -> None:
    objects = documents(path)
    roles = {one["metadata"]["name"] for one in objects if one["kind"] == "Role"}
    bound = {one["roleRef"]["name"] for one in objects if one["kind"] == "RoleBinding"}
    assert roles == bound
    for one in objects:
        if one["kind"] == "RoleBinding":
            assert one["subjects"] == [{"kind": "ServiceAccount", "name": "tidegate", "namespace": "models"}]


def test_the_gateways_configuration_and_arguments_are_ones_that_it_takes(settings: Settings) -> None:
    deployment = only("gateway.yaml", "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = _parser().parse_args(container["args"])
    assert str(options.config) == "/etc/tidegate/tidegate.yaml"
    assert pod["serviceAccountName"] == only("gateway.yaml", "ServiceAccount")["metadata"]["name"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": settings.server.port, "admin": settings.admin.port}
    assert only("gateway.yaml", "Service", "tidegate-admin")["spec"]["ports"][0]["port"] == settings.admin.port


def test_services_select_the_pods_that_discovery_looks_for(settings: Settings) -> None:
    discovery = settings.backends["chat"].discovery
    assert discovery is not None
    assert discovery.kubernetes is not None
    service = only("sglang.yaml", "Service")
    assert service["metadata"]["name"] == discovery.kubernetes.service
    assert [one["name"] for one in service["spec"]["ports"]] == [discovery.kubernetes.port]
    template = only("sglang.yaml", "Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()


def test_a_pod_that_stops_takes_itself_out_and_has_the_time_for_it(settings: Settings) -> None:
    pod = only("sglang.yaml", "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    shell, flag, line = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    variables = {one["name"] for one in container["env"]}
    assert variables == {"POD_IP", "POD_NAME"}
    filled = line.replace("$POD_IP", "10.0.0.1").replace("$POD_NAME", "sglang-x")
    assert "$" not in filled
    executed, program, *arguments = shlex.split(filled)
    assert (executed, program) == ("exec", "tidegate")
    options = _parser().parse_args(arguments)
    assert options.leave
    assert options.pool in settings.backends
    assert (options.name, options.replica_url) == ("sglang-x", "http://10.0.0.1:30000")
    assert pod["terminationGracePeriodSeconds"] > options.drain_s + options.stop_s
    port = container["ports"][0]["containerPort"]
    assert f"--port={port}" in container["args"]


def test_the_two_node_group_is_one_replica_of_sixteen_gpus() -> None:
    found = only("deepseek-two-nodes.yaml", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    gpus = 0
    for template in ("leaderTemplate", "workerTemplate"):
        (container,) = found[template]["spec"]["containers"]
        assert "--tp-size=16" in container["args"]
        gpus += container["resources"]["limits"]["nvidia.com/gpu"]
        assert bool(container["readinessProbe"]) == (template == "leaderTemplate")
    assert (found["size"], gpus) == (2, 16)


def test_keda_asks_for_a_metric_that_is_documented() -> None:
    (trigger,) = only("keda.yaml", "ScaledObject")["spec"]["triggers"]
    assert "tidegate_scaling_wanted_replicas" in trigger["metadata"]["query"]
    assert "tidegate_scaling_wanted_replicas" in (ROOT / "docs" / "metrics.md").read_text()


async def used(api: KubernetesApi, folder: Path) -> Mapping[str, Rights]:
    """What each Role has to allow, as a server hears it."""
    access = Access(kubeconfig=kubeconfig(api, folder))
    found: dict[str, Rights] = {}

    def note(role: str) -> None:
        found[role] = {(one.verb, one.group, one.resource) for one in api.calls}
        api.calls.clear()

    source = KubernetesSource(access, Wanted(service="sglang", labels={}))
    task = asyncio.create_task(source.run(lambda members: None, pytest.fail))
    await api.until_watches()
    task.cancel()
    await asyncio.wait({task})
    note("tidegate-discovery")
    scaler = KubernetesScaler(access, "Deployment", "sglang")
    await scaler.current()
    await scaler.scale(3)
    await scaler.prefer_to_remove(["a"])
    note("tidegate-scaling")
    await scaler.restart()
    note("tidegate-restart")
    await scaler.close()
    groups = KubernetesScaler(access, "LeaderWorkerSet", "deepseek")
    await groups.current()
    await groups.scale(2)
    await groups.close()
    note("tidegate-scaling-deepseek")
    return found


async def test_the_rights_are_those_that_are_used_and_no_others(tmp_path: Path) -> None:
    roles = {one["metadata"]["name"]: one for path in FILES for one in documents(path) if one["kind"] == "Role"}
    async with kubernetes_api() as api:
        api.workloads["deployments", "sglang"] = workload("Deployment", "sglang", 2)
        api.workloads["leaderworkersets", "deepseek"] = workload("LeaderWorkerSet", "deepseek", 1)
        api.pods["a"] = {"metadata": {"name": "a"}}
        assert await used(api, tmp_path) == {name: rights(role) for name, role in roles.items()}


def test_kubectl_reads_them_all(tmp_path: Path) -> None:
    """By `kubectl kustomize`, which alone needs no server; `apply --dry-run=client` asks one for the kinds."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl")
    for path in FILES:
        shutil.copy(path, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [path.name for path in FILES]}))
    done = subprocess.run([kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = [one["kind"] for one in yaml.safe_load_all(done.stdout)]
    assert sorted(read) == sorted(one["kind"] for path in FILES for one in documents(path))
