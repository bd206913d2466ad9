"""Fake engines with caches of their own and the real gateway in front of them, as processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from loadtests.pacing import Speed
from loadtests.ports import free_port
from loadtests.processes import GATEWAY_CORE, LOAD_CORE, python, running

MODEL = "replayed"


@contextmanager
def fleet(policy: str, replicas: int, speed: Speed, folder: Path) -> Iterator[str]:
    """Yields the URL of a gateway that chooses by this policy. The engines' caches are empty. Raises `StartFailed`."""
    folder.mkdir(parents=True)
    ports = [free_port() for _ in range(replicas)]
    engines = python("-m", "loadtests.pacing", *(f"--port={port}" for port in ports))
    engines += [f"--{field.name.replace('_', '-')}={getattr(speed, field.name)}" for field in fields(speed)]
    with running(engines, log=folder / "engines.log", core=LOAD_CORE, port=ports[-1], ready="/health"):
        port = free_port()
        config = _config(policy, ports, port, folder)
        command = python("-m", "gateway", "serve", "--log-format=text", "--config", str(config))
        with running(command, log=folder / "gateway.log", core=GATEWAY_CORE, port=port, ready="/readyz"):
            yield f"http://127.0.0.1:{port}"


def _config(policy: str, engines: list[int], port: int, folder: Path) -> Path:
    settings = {
        "server": {"host": "127.0.0.1", "port": port},
        "admin": {"host": "127.0.0.1", "port": free_port()},
        "usage_log": {"path": str(folder / "usage.jsonl")},
        "models": {MODEL: {"backend": "pool", "upstream_model": "fake-model", "policy": policy}},
        "backends": {
            "pool": {"engine": "sglang", "replicas": [{"url": f"http://127.0.0.1:{engine}"} for engine in engines]}
        },
    }
    path = folder / "tidegate.yaml"
    path.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    return path
