"""A process without descriptors: that is its own fault, never the server's."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest
import uvloop

from backends.errors import ConnectFailed, OutOfSockets
from backends.origin import Origin
from backends.pool import ConnectionPool
from gateway.upstream_errors import from_connection
from loadtests.engine import FakeEngine


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """In the block the process has none left; what it has stays open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    try:
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_connection_that_finds_no_descriptor_is_not_a_server_that_fails() -> None:
    async def fail() -> None:
        async with FakeEngine() as engine:
            pool = ConnectionPool(Origin("http", "127.0.0.1", engine.ports[0]))
            with no_descriptors(), pytest.raises(OutOfSockets) as raised:
                await pool.acquire(1.0)
            assert raised.value.fault == "gateway"
            assert not isinstance(raised.value, ConnectFailed)
            shown = from_connection(raised.value)
            assert (shown.status, shown.code, shown.retry_after_s) == (503, "overloaded_descriptors", 1.0)
            connection = await pool.acquire(1.0)  # it recovers by itself
            connection.detach()
            await pool.aclose(force=True)

    uvloop.run(fail())
