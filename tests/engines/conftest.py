"""Real engines behind real gateways, for the tests of this folder. Each is started when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.engines.fleet import KINDS, Fleet
from tests.engines.gateway_process import GatewayProcess, running_gateway
from tests.engines.llamacpp.replica import LlamaCpp as LlamaCppKind
from tests.engines.replica import NAME, Replica, started
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
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The run's replicas of the tiny model. A test leaves those it uses idle, or ends them."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        # Where all are needed sooner or later, their starts had better overlap.
        if any(
            "mixed_fleet" in item.fixturenames for item in request.session.items if isinstance(item, pytest.Function)
        ):
            fleet.begin(*KINDS)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def mixed_fleet(fleet: Fleet) -> dict[str, Replica]:
    """Two SGLang, a vLLM and a llama.cpp, by name."""
    return dict(zip(KINDS, fleet.ready(*KINDS), strict=True))


@pytest.fixture(params=["sglang-1", "vllm", "llamacpp"])
def replica(request: pytest.FixtureRequest, fleet: Fleet) -> Replica:
    """Each engine in turn."""
    (found,) = fleet.ready(request.param)
    return found


@pytest.fixture
def sglang_replica(fleet: Fleet) -> Replica:
    (found,) = fleet.ready("sglang-1")
    return found


@pytest.fixture
def sglang_pair(fleet: Fleet) -> tuple[Replica, Replica]:
    one, two = fleet.ready("sglang-1", "sglang-2")
    return one, two


@pytest.fixture
def vllm_replica(fleet: Fleet) -> Replica:
    (found,) = fleet.ready("vllm")
    return found


@pytest.fixture
def llamacpp_tiny(fleet: Fleet) -> Replica:
    """A llama.cpp with the model and the adapters that the other engines have."""
    (found,) = fleet.ready("llamacpp")
    return found


@pytest.fixture
def llamacpp_with_prompt_cache(tmp_path: Path) -> Iterator[Replica]:
    """Another one, which keeps the caches of finished prompts in memory, as llama.cpp does by default."""
    replica = started("llamacpp-cached", LlamaCppKind(prompt_cache_mib=64), tmp_path, tmp_path)
    try:
        replica.wait_ready()
        yield replica
    finally:
        replica.kill()


@pytest.fixture
def served_sglang(sglang_replica: Replica, sglang_gateway: GatewayProcess) -> Served:
    return Served("sglang", sglang_replica.url, sglang_gateway, sglang_replica.busy)


@pytest.fixture(scope="session")
def sglang_gateway(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    (replica,) = fleet.ready("sglang-1")
    folder = tmp_path_factory.mktemp("sglang-gateway")
    # Without a queue of the gateway's: these tests want to see what the engine's own does.
    pool = {"queue": {"enabled": False}}
    with running_gateway(
        folder, engine="sglang", upstream_model=NAME, replicas={"shared": replica.url}, pool=pool
    ) as gateway:
        yield gateway


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
