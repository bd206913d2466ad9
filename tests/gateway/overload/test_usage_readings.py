"""What the kernel says of memory and descriptors, in the forms that it has for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.overload.descriptors import Descriptors, Plan, open_now, plan
from gateway.overload.memory import Memory, MemoryUse, bytes_for_bodies

MIB = 1 << 20


def machine(root: Path, cgroup: str, *, resident_pages: int = 1000, total_kib: int = 8 << 20) -> Path:
    self = root / "proc/self"
    self.mkdir(parents=True)
    (self / "cgroup").write_text(cgroup)
    (self / "statm").write_text(f"90000 {resident_pages} 500 1 0 20000 0\n")
    (root / "proc/meminfo").write_text(f"MemTotal: {total_kib:>12} kB\nMemFree: 1 kB\n")
    return root


def unified(folder: Path, limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\nactive_file 7\ninactive_file {idle}\nslab 3\n")


def legacy(folder: Path, limit: int, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 5\ntotal_cache 2\ntotal_inactive_file {idle}\n")


def share(root: Path, configured: int | None = None) -> tuple[float, str]:
    memory = Memory(configured, root)
    try:
        return memory.read().share, memory.source
    finally:
        memory.close()


def test_a_containers_own_cgroup_counts_without_the_file_cache_that_nobody_uses(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    unified(root / "sys/fs/cgroup", str(256 * MIB), 200 * MIB, 72 * MIB)
    assert share(root) == (0.5, "cgroup")


def test_the_fullest_of_nested_cgroups_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/system.slice/tidegate.service\n")
    unified(root / "sys/fs/cgroup/system.slice", str(100 * MIB), 90 * MIB, 0)
    unified(root / "sys/fs/cgroup/system.slice/tidegate.service", str(60 * MIB), 30 * MIB, 0)
    assert share(root) == (0.9, "cgroup")


def test_a_cgroup_without_a_limit_is_none(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", total_kib=resident_kib(1000) * 4)
    unified(root / "sys/fs/cgroup/a", "max", 200 * MIB, 0)
    assert share(root) == (0.25, "the machine's memory")


def test_the_older_kind_of_cgroup_is_read_as_well(tmp_path: Path) -> None:
    root = machine(tmp_path, "5:cpu:/x\n4:memory:/box\n0::/\n")
    legacy(root / "sys/fs/cgroup/memory/box", 64 * MIB, 48 * MIB, 16 * MIB)
    legacy(root / "sys/fs/cgroup/memory", 9223372036854771712, 4096 * MIB, 0)
    assert share(root) == (0.5, "cgroup")


def test_in_a_container_that_shows_the_hosts_path_the_top_is_its_own(tmp_path: Path) -> None:
    root = machine(tmp_path, "4:memory:/docker/0123456789abcdef\n")
    legacy(root / "sys/fs/cgroup/memory", 64 * MIB, 32 * MIB, 0)
    assert share(root) == (0.5, "cgroup")


def resident_kib(pages: int) -> int:
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def test_a_configured_limit_comes_before_a_cgroup_and_is_against_the_resident_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", resident_pages=1000)
    unified(root / "sys/fs/cgroup", str(256 * MIB), 255 * MIB, 0)
    assert share(root, resident_kib(1000) * 1024 * 2) == (0.5, "overload.max_memory_bytes")


def test_a_limit_that_is_changed_while_it_runs_holds_from_then_on(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n")
    unified(root / "sys/fs/cgroup", str(100 * MIB), 50 * MIB, 0)
    memory = Memory(None, root)
    assert memory.read().share == 0.5
    (root / "sys/fs/cgroup/memory.max").write_text(f"{200 * MIB}\n")
    assert memory.read().share == 0.25
    (root / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory.read().share == 0.0
    memory.close()


def test_where_nothing_can_be_read_nothing_is_known_and_nothing_breaks(tmp_path: Path) -> None:
    assert share(tmp_path) == (0.0, "unknown")
    root = machine(tmp_path, "nonsense without colons\n" * 0 + "0::/\n")
    (root / "proc/self/statm").write_text("")
    assert share(root)[0] == 0.0


def test_this_very_process_is_read() -> None:
    memory = Memory(1 << 40)
    use = memory.read()
    memory.close()
    assert 5 * MIB < use.used < 4096 * MIB


@pytest.mark.parametrize(
    ("used", "limit", "workers", "expected"),
    [
        (80, 256, 1, 61),
        (80, 256, 4, 10),  # one of the largest at least
        (250, 256, 1, 10),
        (100, 4096, 1, 1875),
        (100, 4096, 4, 453),
    ],
)
def test_request_bytes_have_to_fit_into_the_memory_that_is_left(
    used: int, limit: int, workers: int, expected: int
) -> None:
    use = MemoryUse(used * MIB, limit * MIB)
    assert bytes_for_bodies(use, 0.95, 10 * MIB, workers) // MIB == expected


# Descriptors.


def test_open_files_are_counted() -> None:
    before = open_now()
    assert before > 0
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
    try:
        assert 50 <= open_now() - before <= 52
    finally:
        for each in opened:
            os.close(each)


def test_an_older_kernel_has_them_listed_and_seldom(tmp_path: Path) -> None:
    """A folder of `tmpfs` or of `/proc` before Linux 6.2 has no size."""
    times = iter([0.0, 0.01, 0.5, 1.02, 1.03])
    folder = Path("/proc/self/fdinfo")  # as many entries, and a size of 0 to this day
    if folder.stat().st_size:
        pytest.skip("this kernel gives every folder below /proc a size")
    counted = Descriptors(100, lambda: next(times), str(folder))
    first = counted.count()
    assert first > 0
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    try:
        assert counted.count() == first  # 10 ms of listing allow the next one after a second
        assert counted.count() >= first + 5
    finally:
        for each in opened:
            os.close(each)


@pytest.mark.parametrize(
    ("soft", "hard", "upstream", "expected"),
    [
        (1024, 524_288, 4096, Plan(14_156, 10_000)),  # raised as far as needed
        (65_536, 65_536, 4096, Plan(65_536, 10_000)),  # enough as it is
        (20_000, 20_000, 60_000, Plan(20_000, 9970)),  # half for clients, half for replicas
        (1024, 4096, 100, Plan(4096, 3936)),  # few upstream connections leave more to clients
        (128, 128, 1024, Plan(128, 34)),
        (16, 16, 1024, Plan(16, 1)),
    ],
)
def test_clients_get_what_upstream_connections_and_the_rest_leave(
    soft: int, hard: int, upstream: int, expected: Plan
) -> None:
    found = plan(soft=soft, hard=hard, wanted=10_000, upstream=upstream, other=60)
    assert found == expected
    if found.max_connections > 1:
        assert found.max_connections + min(found.max_connections, upstream) + 60 <= found.limit
