"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from tests.llamacpp import LlamaCpp, running_llamacpp
from tests.support.effort import LONG
from tests.support.redis_server import redis_server, shared_redis

__all__ = ["llamacpp_pair", "llamacpp_replica", "redis_server", "shared_redis"]

# Every run looks at other examples, so that fewer in each find the same over the runs of some days. No deadline: by
# the clock on the wall, it says more about what else a machine does than about the code.
settings.register_profile("short", max_examples=50, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None)
settings.load_profile("long" if LONG else "short")


ALONE = ("tests/faults/", "tests/loadtests/", "tests/gateway/test_cancellation.py")
"""Faults are timed, and loads fill the machine."""
QUIET = (
    "tests/faults/test_admin_in_a_browser.py",
    "tests/faults/test_all_down.py",
    "tests/faults/test_bad_network.py",
    "tests/faults/test_ceilings.py",
    "tests/faults/test_dead_process.py",
    "tests/faults/test_frozen_replica.py",
    "tests/faults/test_gateway_stops.py",
    "tests/faults/test_killed_replicas.py",
    "tests/faults/test_rate_limits.py",
    "tests/faults/test_slow_clients.py",
    "tests/faults/test_soak_short.py",
    "tests/faults/test_stale_connections.py",
    "tests/gateway/test_sidecar.py",
    "tests/loadtests/test_replay.py",
)
"""Of those, the ones that wait most of the time, for something that is a second or more away."""
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


IN_ONE = ("tests/dashboard/", "tests/engines/")
"""The tests of each of these run in one process, after each other: they share a browser and a gateway with traffic, or
real model servers, which others would start once more."""
FIRST = (*IN_ONE, "tests/faults/test_soak_short.py", "tests/gateway/scaling/")
"""What takes longest begins first, or it would be waited for at the end."""
LAST = ("tests/backends/", "tests/routing/")
"""Thousands of short ones, which fill up what is left at the end."""


def _turn(item: pytest.Item) -> int:
    path = _path(item)
    return 0 if path.startswith(FIRST) else 2 if path.startswith(LAST) else 1


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = _path(item)
        if item.get_closest_marker("alone") or item.get_closest_marker("quiet"):
            continue  # it says so itself
        if path.startswith(QUIET):
            item.add_marker(pytest.mark.quiet)
        elif path.startswith(ALONE) and not path.startswith(IN_COMPANY):
            item.add_marker(pytest.mark.alone)
    items.sort(key=_turn)


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """Files in the order they were collected in, and those of a folder in `IN_ONE` as one."""

    def _split_scope(self, nodeid: str) -> str:
        folder = next((folder for folder in IN_ONE if nodeid.startswith(folder)), None)
        return folder or str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # the files with the most tests first would leave the longest to the end
    return _ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is collected goes away again: to look for it takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


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
