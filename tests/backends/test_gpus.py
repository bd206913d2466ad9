"""What is read of a page of NVIDIA's exporter, written in the format that its template has.

https://github.com/NVIDIA/dcgm-exporter/blob/main/internal/pkg/rendermetrics/render_metrics.go
"""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.gpus import MAX_GPUS, Gpu, read_gpus

PAGE = (Path(__file__).parent / "pages" / "dcgm-exporter.txt").read_bytes()
MIB = 1 << 20


def test_each_gpu_is_read_with_its_use_memory_and_power() -> None:
    first, _, third, part = read_gpus(PAGE)
    assert first == Gpu("0", 0.97, 75874 * MIB, 80994 * MIB, 387.512)
    assert third == Gpu("2", 0.0, 0, 80994 * MIB, 61.004)
    assert part == Gpu("3/7", 0.25), "a slice has no utilisation of its own, and no memory on this page"


def test_only_the_gpus_that_are_the_replicas_are_read() -> None:
    assert [gpu.index for gpu in read_gpus(PAGE, (0, 2))] == ["0", "2"]
    assert [gpu.index for gpu in read_gpus(PAGE, None, {"pod": "chat-1"})] == ["1"]
    assert [gpu.index for gpu in read_gpus(PAGE, (1, 9), {"Hostname": "gpu-node-3"})] == ["1"]
    assert read_gpus(PAGE, None, {"Hostname": "another"}) == ()


@pytest.mark.parametrize("blank", ["2147483632", "9223372036854775794", "140737488355328", "-1", "101", "NaN", "x"])
def test_what_stands_for_no_value_is_none(blank: str) -> None:
    page = f'DCGM_FI_DEV_GPU_UTIL{{gpu="0"}} {blank}\nDCGM_FI_DEV_FB_USED{{gpu="0"}} 5\n'.encode()
    assert read_gpus(page) == (Gpu("0", None, 5 * MIB),)


def test_numbers_are_in_their_order_and_bounded() -> None:
    page = "".join(f'DCGM_FI_DEV_GPU_UTIL{{gpu="{number}"}} 1\n' for number in reversed(range(MAX_GPUS))).encode()
    assert [gpu.index for gpu in read_gpus(page)] == list(map(str, range(MAX_GPUS)))
    more = page + b'DCGM_FI_DEV_GPU_UTIL{gpu="999"} 1\n' + b"DCGM_FI_DEV_GPU_UTIL 1\n"
    assert len(read_gpus(more)) == MAX_GPUS


def test_a_page_of_something_else_has_no_gpus() -> None:
    assert read_gpus(b"") == read_gpus(b"<html>not found</html>\n") == ()
