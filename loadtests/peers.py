"""What the benchmark compares: the direct path, nginx, and Tidegate with either edge, each before one engine.

To add a peer, write a function that puts its configuration into a folder and returns its command.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtests.processes import GATEWAY_CORE, LOAD_CORE, free_port, python, running

Prepare = Callable[[Path, int, list[int]], list[str]]
MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    prepare: Prepare | None
    """(folder, its port, the engine's ports) → its command; None for the direct path."""
    ready: str
    """GET on this path gives 200 once it serves."""
    program: str | None = None
    """A program that must be installed."""

    @property
    def missing(self) -> str | None:
        """Why this peer cannot run here."""
        if self.program is not None and shutil.which(self.program) is None:
            return f"{self.program} is not installed"
        return None


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that serves, with a fresh engine behind it."""

    url: str
    pid: int
    """Whose CPU and memory count: the gateway's, or the engine's on the direct path."""


@contextlib.contextmanager
def serving(peer: Peer, folder: Path) -> Iterator[Running]:
    """Start an engine with two ports and the peer in front of it."""
    ports = [free_port(), free_port()]
    command = python("-m", "loadtests.engine", *(f"--port={port}" for port in ports))
    engine_log = folder / "engine.log"
    with running(command, log=engine_log, core=LOAD_CORE, port=ports[0], ready="/health") as engine_pid:
        if peer.prepare is None:
            yield Running(f"http://127.0.0.1:{ports[0]}", engine_pid)
            return
        port = free_port()
        command = peer.prepare(folder, port, ports)
        log = folder / f"{peer.name}.log"
        with running(command, log=log, core=GATEWAY_CORE, port=port, ready=peer.ready) as pid:
            yield Running(f"http://127.0.0.1:{port}", pid)


NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    client_max_body_size 10m;
    client_body_buffer_size 1m;  # the default spills bodies above 16 KB to disk
    upstream engines {{
        {servers}
        keepalive 512;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engines;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


def _nginx(folder: Path, port: int, engines: list[int]) -> list[str]:
    folder.chmod(0o755)  # nginx drops to another user and wants its temporary folders below this one
    servers = " ".join(f"server 127.0.0.1:{engine};" for engine in engines)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, servers=servers))
    return ["nginx", "-c", str(config), "-e", "stderr"]


def _tidegate(edge: str, folder: Path, port: int, engines: list[int]) -> list[str]:
    settings = {
        "server": {"host": "127.0.0.1", "port": port, "edge": edge},
        "admin": {"host": "127.0.0.1", "port": free_port()},
        "usage_log": {"path": str(folder / f"usage-{edge}.jsonl")},
        "models": {"fake": {"backend": "pool", "upstream_model": "fake-model", "aliases": [MODEL]}},
        "backends": {
            "pool": {
                "engine": "sglang",
                "replicas": [{"url": f"http://127.0.0.1:{engine}"} for engine in engines],
            }
        },
    }
    config = folder / f"tidegate-{edge}.yaml"
    config.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    return python("-m", "gateway", "serve", "--config", str(config))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("direct", None, "/health"),
        Peer("nginx", _nginx, "/health", "nginx"),
        Peer("tidegate-protocol", functools.partial(_tidegate, "protocol"), "/readyz"),
        Peer("tidegate-asgi", functools.partial(_tidegate, "asgi"), "/readyz"),
    )
}
