from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.agent.logs import KEPT, LogReader, moved_aside
from gateway.agent.places import NoRoom, Room, agent_name, rooms, visible_gpus
from gateway.agent.times import AlreadyRunning, StartTimes, StateFile, put_order, take_orders
from gateway.config import Settings

GPUS = tuple(range(8))


def shared_out(gpus: tuple[int, ...] | None, **launches: dict[str, Any]) -> dict[str, Room]:
    backends = {}
    for index, (name, launch) in enumerate(launches.items()):
        scaling = launch.pop("scaling", None)
        settings = {"model": "m", "port": 30000 + 1000 * index, **launch}
        backends[name] = {"engine": "sglang", "launch": settings, "scaling": scaling}
    return rooms(Settings(backends=backends), "gpu1", gpus)  # type: ignore[arg-type]


def test_servers_get_the_next_gpus_ports_and_names() -> None:
    room = shared_out(GPUS, pool={"count": 2, "tp": 4})["pool"]
    assert [(room.name(i), room.url(i), room.gpus_of(i)) for i in range(room.capacity)] == [
        ("gpu1-pool-0", "http://127.0.0.1:30000", (0, 1, 2, 3)),
        ("gpu1-pool-1", "http://127.0.0.1:30001", (4, 5, 6, 7)),
    ]


def test_numbers_of_visible_gpus_are_kept() -> None:
    room = shared_out((3, 5, 7), pool={"count": 2})["pool"]
    assert [room.gpus_of(i) for i in range(room.capacity)] == [(3,), (5,), (7,)]


def test_pools_share_the_gpus_in_their_order_and_the_last_has_what_is_left() -> None:
    found = shared_out(GPUS, large={"count": 2, "tp": 2}, small={"count": 2})
    assert [found["large"].gpus_of(i) for i in range(found["large"].capacity)] == [(0, 1), (2, 3)]
    assert [found["small"].gpus_of(i) for i in range(found["small"].capacity)] == [(4,), (5,), (6,), (7,)]


def test_longest_names_are_still_names_of_replicas() -> None:
    room = Room("a" * 40, "p" * 63, "::1", 30000, 1, 256, None, ())
    assert len(room.name(255)) == 79
    assert room.url(3) == "http://[::1]:30003"


def test_single_server_gets_all_gpus_and_nothing_is_set() -> None:
    room = shared_out(GPUS, pool={"count": 1, "tp": 8})["pool"]
    assert (room.capacity, room.gpus_of(0)) == (1, None)


def test_pool_that_is_scaled_here_has_room_for_its_most() -> None:
    scaling = {"max": 3, "provider": "local"}
    assert shared_out(None, pool={"scaling": dict(scaling)})["pool"].capacity == 3
    room = shared_out(GPUS, pool={"scaling": dict(scaling), "tp": 2})["pool"]
    assert (room.capacity, room.gpus_of(0)) == (4, (0, 1))


def test_too_few_gpus_are_named() -> None:
    with pytest.raises(NoRoom, match="3 servers with 4 GPUs each need 12, and 8 of this machine's 8 are left"):
        shared_out(GPUS, pool={"count": 3, "tp": 4})


def test_visible_gpus_come_from_the_environment_or_the_driver() -> None:
    answer = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)"
    asked = (sys.executable, "-c", f"print({answer!r})")
    assert visible_gpus({}, ask=asked) == (0, 1)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}, ask=asked) == (2, 3)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, ask=asked) == ()
    assert visible_gpus({}, ask=("no-such-program",)) is None
    with pytest.raises(NoRoom, match="otherwise than by number"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8f2c"}, ask=asked)


def test_agent_is_called_as_its_machine() -> None:
    assert agent_name(None, "gpu-node_3.example.org") == "gpu-node-3"
    assert agent_name("a.b", "x") == "a.b"
    with pytest.raises(NoRoom, match="cannot be called"):
        agent_name("a/b", "x")


# -- logs


def test_log_is_read_as_it_grows_and_progress_bars_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    reader = LogReader(path)
    assert reader.read() == []
    path.write_bytes(b"one\ntw")
    assert reader.read() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n 10%\r 20%\r")
    assert reader.read() == ["two", " 10%", " 20%"]
    with path.open("ab") as file:
        file.write(b"unfinished \xff")
    assert reader.last() == ["one", "two", " 10%", " 20%", "unfinished \ufffd"]


def test_log_that_grows_too_long_is_moved_aside_while_the_server_writes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    reader = LogReader(path, max_bytes=1000)
    with path.open("ab", buffering=0) as server:
        for number in range(200):
            server.write(b"line %4d, and a little more\n" % number)
            assert reader.read() == [f"line {number:4d}, and a little more"]
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 1 + KEPT
    assert max(sizes) < 1100


def test_each_start_has_a_log_of_its_own_and_some_older_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    for number in range(6):
        moved_aside(path)
        path.write_text(str(number))
    moved_aside(path)
    assert [(tmp_path / f"x.log.{number}").read_text() for number in (1, 2, 3)] == ["5", "4", "3"]
    assert not (tmp_path / "x.log.4").exists()


# -- what is written down


def test_usual_start_is_the_middle_one_of_the_last() -> None:
    times = StartTimes({"pool": [10.0, 300.0, "x"], "broken": 5})
    times.took("pool", 12)
    assert times.usual_s("pool") == 12
    assert times.usual_s("broken") is None


def test_one_agent_of_a_name_runs_at_a_time(tmp_path: Path) -> None:
    first, second = StateFile(tmp_path, "gpu1"), StateFile(tmp_path, "gpu1")
    assert not second.locked()
    first.lock()
    first.write({"pid": 4711})
    assert second.locked()
    with pytest.raises(AlreadyRunning, match="process 4711"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_state_file_that_cannot_be_read_is_as_none(tmp_path: Path) -> None:
    file = StateFile(tmp_path, "gpu1")
    assert file.read() == {}
    file.path.write_text("{half")
    assert (file.read(), file.pid()) == ({}, None)


def test_orders_are_taken_once(tmp_path: Path) -> None:
    put_order(tmp_path, "gpu1", "pool/gpu1-pool-0")
    put_order(tmp_path, "gpu1", "other")
    assert take_orders(tmp_path, "gpu1") == ["pool/gpu1-pool-0", "other"]
    assert take_orders(tmp_path, "gpu1") == []
