"""Experiments 15, 16 and 28: nothing is broken, many processes ask at once, and every count must be right."""

from __future__ import annotations

import pytest

from loadtests import hammer_runs as runs
from loadtests.hammer_runs import Target
from tests.faults.conftest import Report
from tests.faults.forms import shape


def test_15_requests_per_minute_are_exact_over_eight_processes(target: Target, report: Report) -> None:
    report("15", runs.requests(target, shape(1.5, 10.0)))


def test_15_concurrency_is_exact_over_eight_processes(target: Target, report: Report) -> None:
    report("15", runs.concurrency(target, shape(1.5, 10.0)))


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_16_tokens_per_minute_with_answers_of_unknown_length(target: Target, report: Report, hard: bool) -> None:
    report("16", runs.tokens(target, shape(2.0, 15.0), hard=hard))


def test_28_served_tokens_follow_the_weights(target: Target, report: Report) -> None:
    report("28", runs.shares(target, shape(5.0, 20.0, processes=4)))


def test_28_a_light_tenant_does_not_wait_for_a_heavy_one(target: Target, report: Report) -> None:
    report("28", runs.mouse(target, shape(4.0, 20.0, processes=4)))
