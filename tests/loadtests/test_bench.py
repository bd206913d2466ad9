"""The benchmark's own arithmetic, and one small run of all of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import bench, report, syscalls
from loadtests.peers import PEERS, serving
from loadtests.ports import free_port
from loadtests.processes import StartFailed, cpu_seconds, rss_mb, running, session_pids

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def figures(peer: str, number: int, cpu_us: float, p50_ms: float, *, bad: int = 0) -> dict[str, Any]:
    plain = {
        "requests": 100,
        "errors": bad,
        "per_second": 1000.0,
        "p50_ms": p50_ms,
        "p99_ms": 2.0,
        "cpu_us": cpu_us,
    }
    stream = {"streams": 5, "good": 5, "chunks": 50, "cpu_us": 30.0}
    times = {"ttft_p50_ms": p50_ms, "ttft_p99_ms": 1.0, "delay_p50_ms": p50_ms, "delay_p99_ms": 1.0}
    return {
        "peer": peer,
        "round": number,
        "plain_1k_c32": plain,
        "plain_32k_c32": plain,
        "plain_1k_c1": plain,
        "streams": {**stream, **times},
        "rss_mb": 40.0,
    }


def record(measured: list[dict[str, Any]]) -> dict[str, Any]:
    plan = {"streams": 5, "rate": 50.0, "chunks": 10, "rounds": 3, "load": "own", "requests": 100}
    return {**report.machine(), "command": "x", "plan": plan, "measured": measured}


def cells(table: str, peer: str) -> list[str]:
    row = next(line for line in table.splitlines() if line.startswith(f"| {peer} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_table_gives_medians_ranges_and_comparisons_within_a_round() -> None:
    measured = [figures("direct", n, 6, 0.1) for n in (1, 2, 3)]
    measured += [figures("nginx", n, cpu, 0.2) for n, cpu in ((1, 20), (2, 40), (3, 30))]
    measured += [figures("tidegate", n, cpu, 0.4) for n, cpu in ((1, 40), (2, 60), (3, 90))]
    row = cells(report.markdown(record(measured)), "tidegate")
    assert row[2] == "60.0 (40.0-90.0)"
    assert row[3] == "2.00"  # 40/20, 60/40, 90/30
    assert row[6] == "0.30"
    assert row[8] == "0.30 / 0.00"
    assert row[-1] == "0"
    assert cells(report.markdown(record(measured)), "direct")[6] == "-"


def test_missing_rounds_and_errors_show() -> None:
    row = cells(report.markdown(record([figures("tidegate", 1, 40, 0.4, bad=1)])), "tidegate")
    assert (row[3], row[6], row[-1]) == ("-", "-", "3")


def test_table_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\nMethod.\n")
    report.insert(page, "one")
    page.write_text(page.read_text() + "\nMore.\n")
    report.insert(page, "two")
    text = page.read_text()
    assert "one" not in text
    assert text.startswith("# Benchmarks\n\nMethod.\n\n<!--")
    assert text.count("two") == 1
    assert text.endswith("\nMore.\n")


def test_strace_summary_is_read() -> None:
    summary = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 55.13    0.042900           4     10000           write
 40.02    0.031100           3     10050        50 read
  4.85    0.003800           9       400           epoll_pwait
  0.00    0.000001           1         1           brk
------ ----------- ----------- --------- --------- ----------------
100.00    0.077801           3     20451        50 total
"""
    found = syscalls.parse(summary, 5000)
    assert found.per_request == 4.09
    assert found.by_name == {"read": 2.01, "write": 2.0, "epoll_pwait": 0.08}


def test_own_process_is_measured() -> None:
    log = Path(os.devnull)
    port = free_port()
    command = [sys.executable, "-m", "loadtests.engine", f"--port={port}"]
    with running(command, log=log, core=1, port=port, ready="/health") as pid:
        assert session_pids(pid) == [pid]
        assert cpu_seconds(pid) > 0.01
        assert 5 < rss_mb(pid) < 200
    assert session_pids(pid) == []


def test_a_process_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    with (
        pytest.raises(StartFailed, match=r"ended with 3:\nno such thing"),
        running(command, log=tmp_path / "log", core=0, port=free_port(), ready="/"),
    ):
        pass


def test_tidegate_config_names_everything_the_bench_relies_on(tmp_path: Path) -> None:
    prepare = PEERS["tidegate-asgi"].prepare
    assert prepare is not None
    command = prepare(tmp_path, 7400, [1, 2])
    settings = json.loads(Path(command[-1]).read_text())
    assert settings["server"] == {"host": "127.0.0.1", "port": 7400, "edge": "asgi"}
    assert settings["models"]["fake"]["aliases"] == ["bench"]
    assert len(settings["backends"]["pool"]["replicas"]) == 2
    assert settings["usage_log"]["path"]


def test_keys_and_limits_are_compared_with_the_plain_gateway_in_the_same_round() -> None:
    measured = [figures("tidegate-protocol", n, cpu, 0.4) for n, cpu in ((1, 40), (2, 90))]
    measured += [figures("keys+limits-redis", n, cpu, 0.4) for n, cpu in ((1, 60), (2, 100))]
    for found in measured[2:]:
        found["plain_1k_c32"] = {**found["plain_1k_c32"], "redis_us": 12.5}
    table = report.markdown(record(measured))
    assert cells(table, "keys+limits-redis")[-3:-1] == ["15.0 (10.0-20.0)", "12.5 (12.5-12.5)"]
    assert cells(table, "tidegate-protocol")[-3:-1] == ["-", "-"]


@pytest.mark.parametrize("name", ["keys+limits-memory", "keys+limits-redis"])
def test_a_gateway_with_limits_knows_the_key_of_the_load(tmp_path: Path, name: str) -> None:
    if reason := PEERS[name].missing:
        pytest.skip(reason)
    with serving(PEERS[name], tmp_path) as target:
        found = bench._plain(target, bench.QUICK, tmp_path, 1024, 4, 200)
        assert (found["requests"], found["errors"]) == (200, 0)
        assert (target.redis_cpu_seconds() > 0) == (target.redis_port is not None) == ("redis_us" in found)


def test_a_small_run_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    arguments = [
        "--quick",
        "--peers",
        "direct",
        "--requests",
        "200",
        "--out",
        str(out),
        "--table",
        str(table),
    ]
    assert bench.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["plan"]["load"] == "own"
    (measured,) = found["measured"]
    assert measured["plain_1k_c32"]["requests"] == 200
    assert measured["streams"]["good"] == 20
    assert cells(table.read_text(), "direct")[-1] == "0"
    assert "| direct |" in capsys.readouterr().out


def test_syscalls_are_counted_where_tracing_is_possible() -> None:
    reason = syscalls.unavailable() or PEERS["nginx"].missing
    if reason:
        pytest.skip(reason)
    found = syscalls.measure(PEERS["nginx"], requests=500)
    assert 4 < found.per_request < 12
    assert found.by_name["recvfrom"] >= 2
