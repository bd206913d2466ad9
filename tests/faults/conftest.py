"""What every experiment needs: the hammer's processes, a Redis, and a place where findings are kept.

The short form runs in `make test`. `make faults` runs the long one and writes the table in docs/reliability.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

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


# -- what is kept for docs/reliability.md


_REPORTED = pytest.StashKey[bool]()


def _keep(line: dict[str, Any]) -> None:
    if path := os.environ.get("FAULTS_RESULTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Keep what an experiment found, print it, and fail if it did not hold. May be called more than once."""
    item = request.node

    def keep(number: str, finding: Finding) -> None:
        line = {"experiment": number, "test": item.originalname, **dataclasses.asdict(finding)}
        print(json.dumps(line, indent=1))
        _keep(line)
        item.stash[_REPORTED] = True
        assert finding.good, f"experiment {number}, {finding.name}: {finding.bound}; measured: {finding.measured}"

    return keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that was skipped, or failed before it had a finding, is told of as well: skipped is not held."""
    outcome = yield
    number = re.match(r"test_(\d+)_", item.name)
    if number is None or item.stash.get(_REPORTED, False):
        return outcome
    line = {"experiment": number[1], "test": getattr(item, "originalname", item.name)}
    if outcome.skipped:
        assert isinstance(outcome.longrepr, tuple)
        _keep({**line, "not_run": str(outcome.longrepr[2]).removeprefix("Skipped: ")})
    elif outcome.failed:
        said = str(call.excinfo.value).splitlines() if call.excinfo is not None else []
        kind = call.excinfo.typename if call.excinfo is not None else "error"
        _keep({**line, "failed": f"{kind} in the {outcome.when} phase: {said[0] if said else ''}"[:200]})
    return outcome
