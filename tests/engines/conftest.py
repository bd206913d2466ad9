"""Real engines behind real gateways, for the tests of this folder. Each is started once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.engines.gateway_process import GatewayProcess, running_gateway
from tests.engines.sglang import replica as sglang
from tests.engines.sglang.replica import SGLang
from tests.llamacpp import LlamaCpp


@dataclass(frozen=True, slots=True)
class Served:
    """One engine replica behind a gateway."""

    engine: str
    engine_url: str
    gateway: GatewayProcess
    running: Callable[[], int]
    """Requests the engine is working on, or has queued, by its own count."""


@pytest.fixture(scope="session")
def sglang_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLang]:
    """One SGLang, shared by the whole run: a test must leave it idle."""
    with sglang.started_sglang(tmp_path_factory.mktemp("sglang") / "shared.log") as replica:
        yield sglang.wait_ready(replica)


@pytest.fixture
def expendable_sglang(tmp_path: Path) -> Iterator[SGLang]:
    """An SGLang of the test's own, which it may stop or kill."""
    with sglang.started_sglang(tmp_path / "expendable.log") as replica:
        yield sglang.wait_ready(replica)


@pytest.fixture(scope="session")
def served_sglang(sglang_replica: SGLang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sglang-gateway")
    with running_gateway(
        folder, engine="sglang", upstream_model=sglang.NAME, replicas={"shared": sglang_replica.url}
    ) as gateway:
        yield Served("sglang", sglang_replica.url, gateway, sglang_replica.running_requests)


@pytest.fixture(scope="session")
def served_llamacpp(llamacpp_replica: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    def running() -> int:
        text = httpx2.get(f"{llamacpp_replica.url}/metrics", trust_env=False, timeout=30).text
        counts = ("llamacpp:requests_processing ", "llamacpp:requests_deferred ")
        return sum(int(float(line.split()[1])) for line in text.splitlines() if line.startswith(counts))

    folder = tmp_path_factory.mktemp("llamacpp-gateway")
    with running_gateway(
        folder, engine="llamacpp", upstream_model="smollm2", replicas={"shared": llamacpp_replica.url}
    ) as gateway:
        yield Served("llamacpp", llamacpp_replica.url, gateway, running)


@pytest.fixture(params=["llamacpp", pytest.param("sglang", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest) -> Served:
    """Each engine in turn, for what has to hold for all of them."""
    found = request.getfixturevalue(f"served_{request.param}")
    assert isinstance(found, Served)
    return found
