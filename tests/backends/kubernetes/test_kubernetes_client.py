"""Who the client is and where it finds the API server; and what it says where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.kubernetes.client import Access, connect
from backends.kubernetes.errors import NoAccess
from backends.kubernetes.scale import KubernetesScaler
from tests.support.kubernetes_api import kubeconfig, kubernetes_api, workload

IN_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def account(folder: Path) -> Path:
    (folder / "token").write_text("t")
    return folder


async def test_the_namespace_is_that_which_is_asked_for_else_the_contexts(tmp_path: Path) -> None:
    async with kubernetes_api() as api:
        path = kubeconfig(api, tmp_path, namespace="models")
        for access, namespace in (
            (Access(kubeconfig=path), "models"),
            (Access(kubeconfig=path, context="test"), "models"),
            (Access(kubeconfig=path, namespace="other"), "other"),
        ):
            cluster = connect(access, {})
            assert cluster.namespace == namespace
            assert cluster.address == api.url
            cluster.close()


async def test_the_kubeconfig_of_the_environment_is_found(tmp_path: Path) -> None:
    async with kubernetes_api() as api:
        api.tokens = {"good"}
        api.workloads["deployments", "sglang"] = workload("Deployment", "sglang", 3)
        environ = {"KUBECONFIG": kubeconfig(api, tmp_path, token="good", namespace="")}
        one = KubernetesScaler(Access(), "Deployment", "sglang", environ=environ)
        assert await one.current() == (3, 3)
        await one.close()
        assert api.calls[0].namespace == "default"


def test_an_unknown_context_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text('{"current-context": "a", "contexts": [], "clusters": [], "users": []}')
    with pytest.raises(NoAccess, match=r"the kubeconfig .*/kubeconfig is of no use: .*nowhere"):
        connect(Access(kubeconfig=str(path), context="nowhere"), {})


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "contexts: 7", '{"current-context": "a", "contexts": [null]}'])
def test_a_kubeconfig_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(NoAccess, match="/kubeconfig is of no use"):
        connect(Access(kubeconfig=str(path)), {})


def test_a_service_account_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoAccess, match=r"the service account in .* is of no use: Service token file does not exist"):
        connect(Access(service_account=tmp_path), IN_POD)


def test_a_service_account_without_an_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoAccess, match="certification file does not exist"):
        connect(Access(service_account=account(tmp_path)), IN_POD)


def test_where_the_client_is_not_installed_the_extra_is_named() -> None:
    """For who comes as far as this: the configuration looks for it too, without importing it, and says so first
    (tests/gateway/config/test_discovery_checks.py)."""
    program = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from backends.kubernetes.client import Access, connect\n"
        "from backends.kubernetes.errors import ClientMissing\n"
        "try: connect(Access(), {})\n"
        "except ClientMissing as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'tidegate[kubernetes]'" in done.stdout


def test_nothing_is_imported_before_it_is_needed() -> None:
    program = "import sys, backends.discovery.kubernetes, backends.kubernetes.scale; print('kubernetes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
