"""Turns what the benchmark measured into a table: medians and ranges over the rounds, and what went wrong."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtests.processes import ROOT

Measured = dict[str, Any]
BEGIN, END = "<!-- results: written by loadtests.bench -->", "<!-- /results -->"
PLAIN = ("plain_1k_c32", "plain_32k_c32", "plain_1k_c1")


def errors(found: Measured) -> Iterator[str]:
    """What makes the figures of one round worthless."""
    for name in PLAIN:
        if found[name]["errors"] or not found[name]["requests"]:
            yield f"{name}: {found[name]['requests']} good answers, {found[name]['errors']} errors"
    streams = found["streams"]
    if streams["good"] != streams["streams"]:
        yield f"streams: only {streams['good']} of {streams['streams']} were complete"


def machine() -> Measured:
    """Where and on what the figures were measured."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit} with local changes" if git("status", "--porcelain", "--untracked-files=no") else commit


Pick = Callable[[Measured], float]


class _Rounds:
    """Figures of one peer over the rounds, with those of another peer in the same round at hand."""

    def __init__(self, measured: list[Measured], peer: str) -> None:
        self._own = {found["round"]: found for found in measured if found["peer"] == peer}
        self._all = {(found["peer"], found["round"]): found for found in measured}

    def values(self, pick: Pick) -> list[float]:
        return [pick(found) for found in self._own.values()]

    def against(self, other: str, pick: Pick, combine: Callable[[float, float], float]) -> list[float]:
        found = []
        for number, own in self._own.items():
            base = self._all.get((other, number))
            if base is not None and pick(base):
                found.append(combine(pick(own), pick(base)))
        return found

    def added(self, pick: Pick) -> list[float]:
        """How much more than on the direct path in the same round."""
        return self.against("direct", pick, lambda own, direct: own - direct)


def spread(values: list[float], digits: int) -> str:
    """``median (lowest-highest)``."""
    if not values:
        return "-"
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _median(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


COLUMNS = (
    "peer",
    "1 KB c32: req/s",
    "CPU µs/req",
    "x nginx",
    "32 KB c32: req/s",
    "CPU µs/req",
    "c1: p50 added ms",
    "streams: CPU µs/chunk",
    "delay added p50 / p99 ms",
    "TTFT added p50 / p99 ms",
    "RSS MB",
    "1 KB c32: µs above tidegate-protocol",
    "Redis µs/req",
    "errors",
)


def _row(measured: list[Measured], peer: str) -> list[str]:
    rounds = _Rounds(measured, peer)

    def of(workload: str, field: str) -> Pick:
        return lambda found: float(found[workload][field])

    def added(workload: str, *fields: str) -> str:
        if peer == "direct":
            return "-"
        return " / ".join(_median(rounds.added(of(workload, field)), 2) for field in fields)

    small = of("plain_1k_c32", "cpu_us")
    limited = peer.startswith("keys+limits")
    redis_us = [found["plain_1k_c32"].get("redis_us") for found in measured if found["peer"] == peer]
    bad = sum(1 for found in measured if found["peer"] == peer for _ in errors(found))
    return [
        peer,
        spread(rounds.values(of("plain_1k_c32", "per_second")), 0),
        spread(rounds.values(small), 1),
        _median(rounds.against("nginx", small, lambda own, nginx: own / nginx), 2),
        spread(rounds.values(of("plain_32k_c32", "per_second")), 0),
        spread(rounds.values(of("plain_32k_c32", "cpu_us")), 1),
        added("plain_1k_c1", "p50_ms"),
        spread(rounds.values(of("streams", "cpu_us")), 1),
        added("streams", "delay_p50_ms", "delay_p99_ms"),
        added("streams", "ttft_p50_ms", "ttft_p99_ms"),
        _median(rounds.values(lambda found: float(found["rss_mb"])), 0),
        spread(rounds.against("tidegate-protocol", small, lambda own, plain: own - plain), 1) if limited else "-",
        spread([each for each in redis_us if each is not None], 1),
        str(bad),
    ]


def markdown(record: Measured) -> str:
    """The table, and above it what a reader needs to judge it."""
    plan = record["plan"]
    paced = f"{plan['streams']} streams of {plan['chunks']} chunks at {plan['rate']:g} chunks/s"
    lines = [
        f"{record['date']}, commit {record['commit']}. {record['cpu']}, {record['cores']} cores, "
        f"Linux {record['kernel']}, Python {record['python']}.",
        f"`{record['command']}`: {plan['rounds']} round(s), load from {plan['load']}, "
        f"at least {plan['requests']} requests a workload with 32 connections, {paced}.",
        "Median over the rounds, in brackets the range.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" + "--:|" * (len(COLUMNS) - 1),
    ]
    measured = record["measured"]
    peers = sorted({found["peer"] for found in measured}, key=lambda peer: (peer != "direct", peer != "nginx", peer))
    lines += ["| " + " | ".join(_row(measured, peer)) + " |" for peer in peers]
    return "\n".join(lines)


def insert(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the table between the page's markers; a page without them gets it at the end."""
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    before, found, rest = old.partition(begin)
    _, _, after = rest.partition(end) if found else ("", "", "\n")
    if not found:
        before = before.rstrip() + "\n\n"
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
