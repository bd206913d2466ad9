"""What every experiment needs: the hammer's processes, a Redis, and a place where findings are kept.

The short form runs in `make test`. `make faults` runs the long one and writes the table in docs/limits.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import Reach
from loadtests.hammer_runs import Finding, Target, clock_of
from tests.support.redis_server import RedisServer

Report = Callable[[str, Finding], None]


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """Processes that go from test to test; a test that kills some leaves the others."""
    with Crew() as crew:
        yield crew


@pytest.fixture
def redis_alone() -> Iterator[RedisServer]:
    """A Redis that this test may kill, freeze and configure."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def control(redis_alone: RedisServer) -> Iterator[redis.Redis]:
    """A connection to it that is not the hammer's."""
    with redis_alone.client() as client:
        yield client


@pytest.fixture
def target(crew: Crew, redis_alone: RedisServer, control: redis.Redis) -> Target:
    """With a timeout that a busy machine does not reach: these are about counts."""
    return Target(crew, Reach(redis_alone.url, timeout_s=5.0), clock_of(control))


@pytest.fixture
def report() -> Report:
    """Keep what an experiment found, print it, and fail if it did not hold."""

    def keep(number: str, finding: Finding) -> None:
        line = {"experiment": number, **dataclasses.asdict(finding)}
        print(json.dumps(line, indent=1))
        if path := os.environ.get("FAULTS_RESULTS"):
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert finding.good, f"experiment {number}, {finding.name}: {finding.bound}; measured: {finding.measured}"

    return keep
