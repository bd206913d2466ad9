"""What the benchmark compares: the direct path, nginx, and Tidegate with either edge and with keys and limits.

To add a peer, write a function that puts its configuration into a folder and returns its command.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.ports import free_port
from loadtests.processes import (
    GATEWAY_CORE,
    LOAD_CORE,
    ROOT,
    START_S,
    StartFailed,
    pinned,
    python,
    running,
    stop,
)

Prepare = Callable[[Path, int, list[int]], list[str]]
MODEL = "bench"
KEY = "sk-bench-not-a-secret"
"""The API key that the load generators send, to whoever asks for one."""
REDIS_PORT_FILE = "redis-port"
COMPILED = ROOT / ".compiled"
"""Where scripts/compiled.py puts the same sources with the routing compiled to C."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    prepare: Prepare | None
    """(folder, its port, the engine's ports) → its command; None for the direct path."""
    ready: str
    """GET on this path gives 200 once it serves."""
    program: str | None = None
    """A program that must be installed."""
    redis: bool = False
    """It needs a Redis, which gets a port that stands in the folder's `redis-port` and the load's core."""
    cwd: Path = ROOT
    """Where it starts, which is where Python finds the gateway."""

    @property
    def missing(self) -> str | None:
        """Why this peer cannot run here."""
        if self.program is not None and shutil.which(self.program) is None:
            return f"{self.program} is not installed"
        if self.cwd == COMPILED:
            command = python(str(ROOT / "scripts" / "compiled.py"), "--check")
            if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
                return "these sources are not compiled; python scripts/compiled.py does that"
        return None


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that serves, with a fresh engine behind it."""

    url: str
    pid: int
    """Whose CPU and memory count: the gateway's, or the engine's on the direct path."""
    redis_port: int | None = None
    """Its own Redis."""

    def redis_cpu_seconds(self) -> float:
        """User and system time of its Redis so far, by that one's own account; 0 without one."""
        if self.redis_port is None:
            return 0.0
        with socket.create_connection(("127.0.0.1", self.redis_port), 5) as talk:
            talk.sendall(b"INFO cpu\r\nQUIT\r\n")
            said = b"".join(iter(lambda: talk.recv(4096), b"")).decode()
        lines = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
        return float(lines["used_cpu_sys"]) + float(lines["used_cpu_user"])


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
        with _redis(folder) if peer.redis else contextlib.nullcontext() as redis_port:
            port = free_port()
            command = peer.prepare(folder, port, ports)
            log = folder / f"{peer.name}.log"
            with running(command, log=log, core=GATEWAY_CORE, port=port, ready=peer.ready, cwd=peer.cwd) as pid:
                yield Running(f"http://127.0.0.1:{port}", pid, redis_port)


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[int]:
    """A Redis of its own on the load's core, without a disk; yields its port."""
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with (folder / "redis.log").open("wb") as log, pinned(LOAD_CORE):
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise StartFailed(f"redis-server did not start:\n{(folder / 'redis.log').read_text()[-1500:]}")
            time.sleep(0.02)
        (folder / REDIS_PORT_FILE).write_text(str(port))
        yield port
    finally:
        stop(process)


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


def tidegate(edge: str, folder: Path, port: int, engines: list[int], **sections: Any) -> list[str]:
    settings: dict[str, Any] = {
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
        **sections,
    }
    config = folder / f"tidegate-{edge}.yaml"
    config.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    return python("-m", "gateway", "serve", "--log-format=json", "--config", str(config))


def _limited(store: str, folder: Path, port: int, engines: list[int]) -> list[str]:
    """One known key, and limits that nobody reaches: three scopes with five rates, and concurrent requests."""
    secret = folder / "bench-key"
    secret.write_text(KEY)
    secret.chmod(0o600)
    each_minute, tokens = 100_000_000, 1_000_000_000
    rates = {"requests_per_minute": each_minute, "tokens_per_minute": tokens}
    model = {"backend": "pool", "upstream_model": "fake-model", "aliases": [MODEL]}
    sections: dict[str, Any] = {
        "auth": "keys",
        "database": f"sqlite:///{folder}/tidegate.db",
        "keys": {"static": [{"name": "bench", "key": {"file": str(secret)}, "tenant": "bench"}]},
        "tenants": {"bench": {}},
        "limits": {"key": {**rates, "concurrent_requests": 10_000}, "tenant": rates},
        "models": {"fake": {**model, "limits": {"requests_per_minute": each_minute}}},
    }
    if store == "redis":
        sections["store"] = f"redis://127.0.0.1:{(folder / REDIS_PORT_FILE).read_text()}"
    return tidegate("protocol", folder, port, engines, **sections)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("direct", None, "/health"),
        Peer("nginx", _nginx, "/health", "nginx"),
        Peer("tidegate-protocol", functools.partial(tidegate, "protocol"), "/readyz"),
        Peer("tidegate-compiled", functools.partial(tidegate, "protocol"), "/readyz", cwd=COMPILED),
        Peer("tidegate-asgi", functools.partial(tidegate, "asgi"), "/readyz"),
        Peer("keys+limits-memory", functools.partial(_limited, "memory"), "/readyz"),
        Peer("keys+limits-redis", functools.partial(_limited, "redis"), "/readyz", "redis-server", redis=True),
    )
}
