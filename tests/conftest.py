"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.llamacpp import LlamaCpp, running_llamacpp
from tests.support.effort import LONG
from tests.support.redis_server import redis_server, shared_redis

__all__ = ["llamacpp_pair", "llamacpp_replica", "redis_server", "shared_redis"]

# Every run looks at other examples, so that fewer in each find the same over the runs of some days. No deadline: by
# the clock on the wall, it says more about what else a machine does than about the code.
settings.register_profile("short", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None)
settings.load_profile("long" if LONG else "short")


ALONE = ("tests/faults/", "tests/loadtests/", "tests/gateway/test_sidecar.py", "tests/gateway/test_cancellation.py")
"""Faults are timed, and loads fill the machine."""
IN_COMPANY = (
    "tests/faults/test_bodies.py",
    "tests/faults/test_broken_answers.py",
    "tests/faults/test_clocks.py",
    "tests/faults/test_fault_report.py",
    "tests/faults/test_names.py",
    "tests/faults/test_parsers_json.py",
    "tests/faults/test_scripts_and_replies.py",
    "tests/faults/test_parsers_http.py",
    "tests/faults/test_parsers_sse.py",
    "tests/faults/test_security_canaries.py",
    "tests/faults/test_security_ssrf.py",
    "tests/loadtests/simulator/",
    "tests/loadtests/test_behaviour.py",
    "tests/loadtests/test_bench.py",
    "tests/loadtests/test_choices.py",
    "tests/loadtests/test_counting.py",
    "tests/loadtests/test_decide.py",
    "tests/loadtests/test_decide_router.py",
    "tests/loadtests/test_hammer_bounds.py",
    "tests/loadtests/test_load.py",
    "tests/loadtests/test_real_chats.py",
    "tests/loadtests/test_recent.py",
    "tests/loadtests/test_soak_books.py",
    "tests/loadtests/fits/",
)
"""Of those, the ones that look at no clock, or only show that a measurement can be made, and disturb nobody for
long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(item.config.rootpath).as_posix()
        if path.startswith(ALONE) and not path.startswith(IN_COMPANY):
            item.add_marker(pytest.mark.alone)


def pytest_collection_finish() -> None:
    """Ten thousand tests are objects by the million, which stay: a look through all of them takes half a second, in the
    middle of whatever is being measured."""
    gc.collect()
    gc.freeze()


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
