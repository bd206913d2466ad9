"""A primary, its replica and sentinels, as real processes."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from loadtests.ports import free_port
from tests.support.redis_server import WITHIN_S, RedisServer

SERVICE = "tidegate-test"


@dataclass
class Guarded:
    """`primary` and `replica` as they were at the beginning."""

    primary: RedisServer
    replica: RedisServer
    sentinels: list[int]
    """Their ports."""

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/{SERVICE}"


@contextlib.contextmanager
def guarded_redis(sentinels: int = 1, password: str = "", options: tuple[str, ...] = ()) -> Iterator[Guarded]:
    """Sentinels that take a primary for gone after half a second without an answer. `password` is theirs alone,
    `options` are more lines of their configuration."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(RedisServer(("repl-diskless-sync-delay", "0")))
        replica = stack.enter_context(RedisServer(("replicaof", "127.0.0.1", str(primary.port))))
        _until(lambda: b"connected" in replica.command("ROLE"), "the replica did not connect")
        ports = [free_port() for _ in range(sentinels)]
        for port in ports:
            given = (*((f"requirepass {password}",) if password else ()), *options)
            process = _start_sentinel(primary, port, sentinels // 2 + 1, given)
            stack.callback(process.wait)
            stack.callback(process.kill)
        for port in ports:
            _until(functools.partial(_knows_all, port, sentinels, password), "a sentinel does not know all")
        yield Guarded(primary, replica, ports)


def _start_sentinel(primary: RedisServer, port: int, quorum: int, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
    config = Path(primary.folder) / f"sentinel-{port}.conf"
    config.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {primary.folder}\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}\n"
        f"sentinel down-after-milliseconds {SERVICE} 500\n"
        f"sentinel failover-timeout {SERVICE} 5000\n" + "".join(f"{option}\n" for option in options)
    )
    with open(config.with_suffix(".log"), "wb") as log:
        return subprocess.Popen([primary.binary, str(config), "--sentinel"], stdout=log, stderr=log)


def _knows_all(port: int, sentinels: int, password: str) -> bool:
    with contextlib.suppress(OSError, redis.RedisError), redis.Redis(port=port, password=password or None) as client:
        state: Any = client.sentinel_master(SERVICE)
        return int(state["num-slaves"]) >= 1 and int(state["num-other-sentinels"]) >= sentinels - 1
    return False


def _until(holds: Callable[[], bool], failing: str) -> None:
    end = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < end, failing
        time.sleep(0.05)
