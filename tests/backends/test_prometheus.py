"""The reader of Prometheus pages: what it finds, what it skips, and that a broken line costs only itself."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from backends import prometheus
from backends.prometheus import read_page, total

RECORDED = Path(__file__).parent / "dialects" / "recorded"
PREFIXES = ("sglang:", "sglang_")


@pytest.mark.parametrize("line", [b"sglang:tokens_total 5", b"sglang_tokens_total 5", b"sglang:tokens 5.0"])
def test_a_metric_is_found_under_either_prefix_and_with_or_without_total(line: bytes) -> None:
    assert read_page(line, ["tokens"], PREFIXES) == {"tokens": [({}, 5.0)]}


def test_a_name_that_itself_ends_in_total_is_found_as_it_is() -> None:
    assert read_page(b"sglang:slots_total 2\n", ["slots_total"], PREFIXES) == {"slots_total": [({}, 2.0)]}


def test_labels_are_read_with_their_escapes_and_in_either_spacing() -> None:
    page = rb'a{x="1",y="with \"quotes\", } and \\ and \n", } 3 1700000000' + b'\na{ z = "" } 4 # {id="7"} 1\n'
    labels = {"x": "1", "y": 'with "quotes", } and \\ and \n'}
    assert read_page(page, ["a"]) == {"a": [(labels, 3.0), ({"z": ""}, 4.0)]}


@pytest.mark.parametrize(
    "line",
    [
        b"a",
        b"a ",
        b"a{",
        b"a{} ",
        b'a{x="1} 2',
        b'a{x="1",y5 7',
        b"a{x=1} 2",
        b'a{x="1" y="2"} 2',
        b"a one",
        b"a 1_000",
        b"a NaN",
        b"a +Inf",
        b"a -Inf",
        b"a 1e999",
        b"a\xff 1",
        b"{a} 1",
        b"ab 1",
        b"# a 1",
    ],
)
def test_one_line_without_a_value_does_not_lose_the_others(line: bytes) -> None:
    assert read_page(b"a 1\n" + line + b"\r\na 2\r\n", ["a"]) == {"a": [({}, 1.0), ({}, 2.0)]}


def test_the_total_of_no_sample_is_not_zero() -> None:
    assert total([]) is None
    assert total([({"a": "1"}, 0.5), ({"a": "2"}, 0.25)]) == 0.75


@pytest.mark.parametrize("page", ["sglang/metrics_busy.txt", "vllm/metrics_busy.txt", "sglang/dp_metrics_busy.txt"])
def test_recorded_pages_read_as_prometheus_clients_own_parser_reads_them(page: str) -> None:
    text = (RECORDED / page).read_text()
    expected: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if math.isfinite(sample.value):
                expected.setdefault(sample.name, []).append((sample.labels, sample.value))
    assert len(expected) > 80
    assert read_page(text.encode(), list(expected)) == expected


def test_a_busy_engines_page_does_not_hold_up_the_event_loop() -> None:
    page = (RECORDED / "sglang/metrics_busy.txt").read_bytes()
    assert len(page) > 150_000
    took_s = []
    for _ in range(5):
        began = time.perf_counter()
        read_page(page, ["num_running_reqs", "num_queue_reqs", "generation_tokens"], PREFIXES)
        took_s.append(time.perf_counter() - began)
    # 1 ms here; prometheus_client's parser takes 50.
    assert min(took_s) < 0.02


@given(st.lists(st.sampled_from([b"a", b"{", b'x="', b'"', b",", b"}", b"\\", b" ", b"1", b"-", b"\n", b"\xe2\x80"])))
def test_no_page_raises_and_all_values_are_finite(parts: list[bytes]) -> None:
    for samples in read_page(b"".join(parts), ["a", "aa"]).values():
        assert all(math.isfinite(value) for _, value in samples)


def test_numbers_whose_sum_would_overflow_are_left_out() -> None:
    page = b'a{e="0"} 1e308\na{e="1"} 1e308\na{e="2"} -1e308\na{e="3"} 7\n'
    assert read_page(page, ["a"]) == {"a": [({"e": "3"}, 7.0)]}


def test_a_page_of_countless_lines_is_not_read() -> None:
    page = b"a 1" + b"\n" * prometheus.MAX_LINES
    assert read_page(page, ["a"]) == {"a": [({}, 1.0)]}
    assert read_page(page + b"\n", ["a"]) == {}
