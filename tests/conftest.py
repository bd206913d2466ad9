"""Fixtures that more than one package's tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.llamacpp import LlamaCpp, running_llamacpp
from tests.support.redis_server import redis_server, shared_redis

__all__ = ["llamacpp_pair", "llamacpp_replica", "redis_server", "shared_redis"]


@pytest.fixture(scope="session")
def llamacpp_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    """One real replica, `smollm2`, shared by the whole run: a test must leave it idle."""
    with running_llamacpp(tmp_path_factory.mktemp("llamacpp") / "replica-1.log") as replica:
        yield replica


@pytest.fixture(scope="session")
def llamacpp_pair(
    llamacpp_replica: LlamaCpp, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LlamaCpp, LlamaCpp]]:
    """Two real replicas of the same model, for what only a choice between two shows."""
    with running_llamacpp(tmp_path_factory.mktemp("llamacpp") / "replica-2.log") as second:
        yield llamacpp_replica, second
