"""The processes of a soak: fake engines that die and come back, a Redis that does, and the gateway in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from loadtests.ports import free_port
from loadtests.processes import ROOT, StartFailed, python, status

UP_WITHIN_S = 30.0
LEASE_S = 30.0
"""How long a lease in Redis holds after its last renewal (`gateway.admission.carrier`)."""
Sample = dict[tuple[str, str], float]
"""Metrics by name and labels as text, the worker's left out; workers added up."""


class Process:
    """A command in a session of its own, that can be killed and started again."""

    ready = ""
    """A path that answers 200 once it serves; empty: it serves as soon as it listens."""

    def __init__(self, command: list[str], port: int, log: Path, **environ: str) -> None:
        self.command, self.port, self.log_path = command, port, log
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}, **environ
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Returns once it serves. Raises `StartFailed`."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220 - its end is waited for in plain code
                self.command, cwd=ROOT, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + UP_WITHIN_S
        while True:
            if await asyncio.to_thread(self._serves):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise StartFailed(f"{self.command}:\n{self.log_path.read_text(errors='replace')[-1500:]}")
            await asyncio.sleep(0.05)

    def _serves(self) -> bool:
        if self.ready:
            return status(self.port, self.ready) == http.HTTPStatus.OK
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def kill(self) -> None:
        """`kill -9` for all of its session, and gone."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def engine(folder: Path, name: str) -> Process:
    """A fake engine, whose log of what it served outlives it (`loadtests.served_log`)."""
    port = free_port()
    command = python("-m", "loadtests.engine", f"--port={port}", f"--log={folder / f'{name}.served'}")
    return Process(command, port, folder / f"{name}.log")


class Redis(Process):
    """A Redis without a disk: killed, it forgets everything."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise StartFailed("redis-server is not installed")
        port = free_port()
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
        super().__init__([binary, *options], port, folder / "redis.log")

    async def leases(self) -> list[float]:
        """Every lease that holds, of limits and of places in a pool: for how many more seconds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            seconds, micros = await _command(reader, writer, "TIME")
            now_us = int(seconds) * 1_000_000 + int(micros)
            found: list[float] = []
            for name in await _command(reader, writer, "KEYS", "tidegate:*"):
                if name.endswith(":leases") or (":{pool:" in name and name.endswith(":ends")):
                    scored = await _command(reader, writer, "ZRANGE", name, "0", "-1", "WITHSCORES")
                    found += [(float(score) - now_us) / 1e6 for score in scored[1::2]]
            return [left_s for left_s in found if left_s > 0]
        finally:
            writer.close()


async def _command(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *words: str) -> Any:
    """One command in Redis' protocol; strings and arrays of them come back."""
    parts = [f"*{len(words)}\r\n", *(f"${len(word.encode())}\r\n{word}\r\n" for word in words)]
    writer.write("".join(parts).encode())
    return await _answer(reader)


async def _answer(reader: asyncio.StreamReader) -> Any:
    line = (await reader.readline()).decode().strip()
    match line[:1]:
        case "*":
            return [await _answer(reader) for _ in range(int(line[1:]))]
        case "$":
            return (await reader.readexactly(int(line[1:]) + 2))[:-2].decode()
        case "-":
            raise OSError(line)
    return line[1:]


class Gateway(Process):
    """`tidegate serve` with keys, Redis, limits and queue, and what can be seen of it from outside."""

    ready = "/readyz"

    def __init__(self, folder: Path, engines: list[Process], redis: Redis, workers: int) -> None:
        self.folder = folder
        self.keys = {name: f"soak-{name}-{secrets.token_hex(16)}" for name in ("open", "tight")}
        port = free_port()
        self.admin = f"http://127.0.0.1:{free_port()}"
        self.config = folder / "tidegate.yaml"
        self.settings = settings(folder, port, self.admin, engines, redis)
        self.write_config()
        command = python(
            "-m", "gateway", "serve", "--log-format=text", "--config", str(self.config), f"--workers={workers}"
        )
        keys = {f"SOAK_{name.upper()}": key for name, key in self.keys.items()}
        state = folder / "state"
        super().__init__(
            command, port, folder / "gateway.log",
            PYTHONPATH=str(ROOT), TIDEGATE_STATE_DIR=str(state), TMPDIR=str(folder), **keys,
        )  # fmt: skip
        self._token = state / "admin-token"

    def write_config(self) -> None:
        self.config.write_text(json.dumps(self.settings))  # JSON is YAML

    def reload(self, first_token_s: float) -> None:
        """SIGHUP, with something to read that differs."""
        self.settings["models"]["m"]["timeouts"] = {"first_token_s": first_token_s}
        self.write_config()
        os.kill(self.pid, signal.SIGHUP)

    async def ask_admin(self, path: str) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self._token.read_text().strip()}"}
        async with httpx2.AsyncClient(trust_env=False, timeout=20.0) as client:
            return await client.get(self.admin + path, headers=headers)

    async def metrics(self) -> Sample:
        """Raises `httpx2.HTTPError` while the gateway is away."""
        found: Sample = {}
        text = (await self.ask_admin("/metrics")).text
        for name, labels, value in re.findall(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            key = name, ",".join(part for part in labels.split(",") if not part.startswith("worker="))
            found[key] = found.get(key, 0.0) + float(value)
        return found

    async def worker_pids(self) -> list[int]:
        """The one with the most requests under way first."""
        workers = (await self.ask_admin("/admin/fleet")).json()["workers"]
        return [worker["pid"] for worker in sorted(workers, key=lambda worker: -int(worker["in_flight"]))]

    def rss_mb(self) -> float:
        """Resident memory of all its processes."""
        return sum(_resident_mb(pid) for pid in descendants(self.pid))

    def descriptors(self) -> int:
        """Open ones of all its processes: sockets, files, pipes."""
        return sum(_entries(f"/proc/{pid}/fd") for pid in descendants(self.pid))

    def threads(self) -> int:
        return sum(_entries(f"/proc/{pid}/task") for pid in descendants(self.pid))


def descendants(pid: int) -> Iterator[int]:
    """A process and its children, and theirs."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield from descendants(int(child))


def _resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def _entries(path: str) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(path))
    return 0


def settings(folder: Path, port: int, admin: str, engines: list[Process], redis: Redis) -> dict[str, Any]:
    """Everything that holds something on, with limits in seconds instead of minutes."""
    open_limits = {"concurrent_requests": 500, "requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000}
    tight_limits = {"requests_per_minute": 60, "concurrent_requests": 2}
    return {
        "server": {"port": port, "write_stall_timeout_s": 1.0, "body_timeout_s": 2.0, "header_timeout_s": 2.0},
        "admin": {"port": int(admin.rpartition(":")[2])},
        "auth": "keys",
        "store": f"redis://127.0.0.1:{redis.port}",
        "database": f"sqlite:///{folder}/tidegate.db",
        "usage_log": {"path": str(folder / "usage.jsonl")},
        "keys": {
            "static": [
                {"name": "open", "key": {"env": "SOAK_OPEN"}, "tenant": "soak", "limits": open_limits},
                {"name": "tight", "key": {"env": "SOAK_TIGHT"}, "tenant": "soak", "limits": tight_limits},
            ]
        },
        "tenants": {"soak": {"limits": {"concurrent_requests": 500}}},
        "shutdown": {"grace_s": 0, "drain_s": 5},
        "stream": {"hold_s": 0.5, "heartbeat_s": 0.5},
        "models": {"m": {"backend": "pool", "price": {"input": 1.0, "output": 2.0}}},
        "backends": {
            "pool": {
                "engine": "openai",
                "replicas": [
                    {"url": f"http://127.0.0.1:{each.port}", "name": f"r{number}", "max_in_flight": 8}
                    for number, each in enumerate(engines)
                ],
                "timeouts": {"connect_s": 1, "first_token_s": 2, "idle_s": 2, "total_s": 20},
                "queue": {"max_wait_s": 5},
                "health": {"probe_interval_s": 0.5, "ejection_s": 1, "slow_start_s": 0},
            }
        },
    }


@contextlib.contextmanager
def killed_at_the_end(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
