"""The short and the long form of an experiment."""

from __future__ import annotations

import os

from loadtests.hammer_runs import Shape

LONG = os.environ.get("FAULTS_LONG", "") not in ("", "0")


def seconds(short: float, long: float) -> float:
    return long if LONG else short


def shape(short_s: float, long_s: float, processes: int = 8, tasks: int = 32) -> Shape:
    return Shape(processes, tasks, seconds(short_s, long_s))
