"""What is refused of `launch` when the configuration is read, and where it is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import Settings
from gateway.config.load import load
from gateway.config.problems import ConfigError


def loaded(folder: Path, *backends: dict[str, Any], models: dict[str, Any] | None = None) -> Settings:
    file = folder / "tidegate.yaml"
    pools = {f"pool{index or ''}": backend for index, backend in enumerate(backends)}
    file.write_text(yaml.safe_dump({"models": models or {"m": {"backend": "pool"}}, "backends": pools}))
    return load(file, environ={"HUB_TOKEN": "not-a-real-one"})


def problems(folder: Path, *backends: dict[str, Any], models: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, *backends, models=models)
    return [str(problem).partition(": ")[2] for problem in caught.value.problems]


def backend(engine: str = "sglang", /, **launch: Any) -> dict[str, Any]:
    return {"engine": engine, "launch": {"model": "/m", **launch}}


def test_every_way_to_launch_that_is_right_is_taken(tmp_path: Path) -> None:
    settings = loaded(
        tmp_path,
        backend(
            tp=8, nodes=2, node_address="10.0.0.1:20000", node_rank=1, secret_env={"HF_TOKEN": {"env": "HUB_TOKEN"}}
        ),
        backend("vllm", port=31000, count=3, port_step=10),
        backend("openai", port=32000, command=["/opt/run.sh", "{port}"]),
        backend(host="10.0.0.7", port=31000),
        {**backend(port=33000, max_loras=2), "adapters": [{"name": "a", "path": "/a"}]},
    )
    launch = settings.backends["pool"].launch
    assert launch is not None
    assert launch.secret_env["HF_TOKEN"].get_secret_value() == "not-a-real-one"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            backend("openai"),
            "backends.pool.launch: openai is not an engine that can be started; write a command, or one",
        ),
        (backend(tp=2, nodes=2), "backends.pool.launch.nodes: several nodes need node_address"),
        (backend(tp=2, nodes=2, node_address="10.0.0.1"), 'launch.node_address: "10.0.0.1" has no port'),
        (backend(tp=3, nodes=2, node_address="h:1"), "launch.nodes: 3 GPUs (tp x pp x dp) cannot be spread evenly"),
        (backend(tp=2, nodes=2, node_address="h:1", node_rank=2), "launch.node_rank: 2 is not one of 2 nodes"),
        (backend(command=["x"], python="/usr/bin/python3"), "launch.python: `command` is given as well"),
        (backend(command=["x"], flags=["--y"]), "launch.flags: `command` is given as well"),
        (
            backend(env={"A": "b"}, secret_env={"A": {"env": "HUB_TOKEN"}}),
            "launch.env.A: is in secret_env as well",
        ),
        (backend(max_loras=2), "launch.max_loras: there are no adapters"),
        (backend("trtllm", quantization="fp8"), "launch.quantization: TensorRT-LLM takes it from a file only"),
        (
            backend("vllm", speculative={"algorithm": "EAGLE", "topk": 2}),
            "launch.speculative.topk: vLLM drafts one chain of tokens",
        ),
        (
            {**backend("llamacpp"), "adapters": [{"name": "a", "path": "/a"}]},
            "backends.pool.adapters: llama.cpp is started here without adapters",
        ),
        (backend(lora=True), "launch.max_lora_rank: SGLang has to be told it"),
        (backend(port=65000, count=100, port_step=10), "launch.port: the last of its servers would be at port 65990"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    found = problems(tmp_path, wrong)
    assert len(found) == 1
    assert said in found[0]


def test_servers_of_two_pools_at_one_port_are_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, backend(count=4), backend("vllm", port=30003))
    assert len(found) == 1
    assert "backends.pool1.launch.port: port 30003 is also one of backends.pool.launch's" in found[0]


def test_a_pool_that_grows_needs_the_ports_it_may_come_to(tmp_path: Path) -> None:
    growing = {**backend(count=1), "scaling": {"max": 4, "provider": "local"}}
    assert "port 30003" in problems(tmp_path, growing, backend("vllm", port=30003))[0]
    loaded(tmp_path, {**growing, "scaling": {"max": 4}}, backend("vllm", port=30003))


def test_two_names_of_one_vllm_are_refused(tmp_path: Path) -> None:
    models = {"m": {"backend": "pool"}, "n": {"backend": "pool"}}
    found = problems(tmp_path, backend("vllm"), models=models)
    assert "models.n.upstream_model: backends.pool.launch starts servers that answer to" in found[0]
    models["n"]["upstream_model"] = "m"
    loaded(tmp_path, backend("vllm"), models=models)
    loaded(tmp_path, backend("sglang"), models={"m": {"backend": "pool"}, "n": {"backend": "pool"}})
