"""The reading of engines' logs: recorded starts, written bars, arbitrary text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.launch.progress import DETAIL_CHARS, PHASES, StartProgress, why_it_ended

RECORDED = Path(__file__).with_name("recorded")


def lines_of(name: str) -> list[str]:
    """As a reader of a pipe has them: carriage returns are within lines."""
    return (RECORDED / f"{name}.log").read_bytes().decode().split("\n")


def phases(engine: str, name: str) -> list[tuple[str, float | None]]:
    """The changes of phase and progress that a log shows."""
    start = StartProgress(engine)
    seen: list[tuple[str, float | None]] = []
    for line in lines_of(name):
        if start.read(line) and (not seen or seen[-1] != (start.phase, start.progress)):
            seen.append((start.phase, start.progress))
    return seen


@pytest.mark.parametrize(
    ("engine", "name", "expected"),
    [
        ("sglang", "sglang-start", [("loading", 0.0), ("loading", 1.0), ("warming", None), ("ready", None)]),
        ("vllm", "vllm-start", [("loading", 0.0), ("loading", 1.0), ("warming", None), ("ready", None)]),
        (
            "vllm",
            "vllm-compile-start",
            [("loading", 0.0), ("loading", 1.0), ("compiling", None), ("warming", None), ("ready", None)],
        ),
        ("llamacpp", "llamacpp-start", [("loading", None), ("warming", None), ("ready", None)]),
    ],
)
def test_a_recorded_start_is_read(engine: str, name: str, expected: list[tuple[str, float | None]]) -> None:
    assert phases(engine, name) == expected


def test_bars_of_a_large_model_are_read() -> None:
    """Weights are announced before they are downloaded; the bar of all files counts, not those of single ones."""
    start = StartProgress("sglang")
    seen = []
    assert start.read(lines_of("sglang-gpu-written")[0])
    assert (start.phase, start.progress) == ("loading", 0.0)
    for line in lines_of("sglang-gpu-written")[1:]:
        start.read(line)
        seen.append((start.phase, start.progress, start.detail))
    assert seen[0] == ("downloading", 0.4, "Fetching 163 files: 66 of 163")
    assert seen[1] == ("downloading", 0.4, "model-00067-of-000163.safetensors: 2.15G of 4.30G")
    assert seen[2][:2] == ("downloading", 1.0)
    assert seen[3] == ("loading", 1.0, "Loading safetensors checkpoint shards: 163 of 163")
    assert seen[6][:2] == ("compiling", 0.0)
    assert seen[7] == ("compiling", 1.0, "Capturing batches (bs=1 avail_mem=19.77 GB): 23 of 23")
    assert seen[8] == ("compiling", 0.55, "DeepGEMM warmup: 9011 of 16384")
    assert seen[-1][0] == "ready"


def test_colours_and_names_of_processes_are_taken_off() -> None:
    start = StartProgress("vllm")
    told = [(start.phase, start.progress, start.detail) for line in lines_of("vllm-gpu-written") if start.read(line)]
    assert told[0] == ("loading", 0.0, "Starting to load model meta-llama/Llama-3.3-70B-Instruct...")
    assert told[1] == ("loading", 1.0, "Loading safetensors checkpoint shards: 4 of 4")
    assert ("compiling", 1.0, "torch.compile took 33.31 s in total") in told
    assert told[-1][0] == "ready"


def test_a_start_does_not_go_back() -> None:
    start = StartProgress("sglang")
    assert start.read("Capturing batches (bs=1):  50%|█████     | 5/10 [00:01<00:01]")
    assert not start.read("Loading safetensors checkpoint shards:  10% Completed | 1/10 [00:01<00:09]")
    assert (start.phase, start.progress) == ("compiling", 0.5)


def test_nothing_is_read_once_it_is_ready() -> None:
    start = StartProgress("vllm")
    assert start.read("INFO:     Application startup complete.")
    assert not start.read("Fetching 4 files:  25%|██        | 1/4 [00:01<00:03]")
    assert start.phase == "ready"


def test_a_taken_port_dooms_a_start() -> None:
    """SGLang's process stays, without a listener and without a word."""
    start = StartProgress("sglang")
    for line in lines_of("sglang-port")[:-5]:
        start.read(line)
    assert start.doomed
    assert "address already in use" in start.detail
    other = StartProgress("sglang")
    other.read(
        "[W socket.cpp:464] The server socket failed to bind to [::]:29500 (errno: 98 - Address already in use)."
    )
    assert not other.doomed


def test_an_unknown_engine_has_its_bars_read() -> None:
    start = StartProgress("mine")
    assert start.read("Downloading shards:  50%|█████     | 1/2 [00:01<00:01]")
    assert not start.read("The server is fired up and ready to roll!")


def test_percentages_that_are_no_bars_of_a_start_are_left_alone() -> None:
    start = StartProgress("sglang")
    assert not start.read("requests:  50%|█████     | 1/2 [00:01<00:01]")
    assert not start.read("token usage 50% | fine")
    assert start.phase == "starting"


def test_a_line_of_a_megabyte_costs_nothing() -> None:
    start = StartProgress("sglang")
    began = time.process_time()
    for text in (
        "x" * 1_000_000,
        "9" * 1_000_000,
        "\x1b[" * 500_000,
        "%|" * 500_000,
        " " * 1_000_000,
        "\r" * 1_000_000,
    ):
        start.read(text)
        why_it_ended([text])
    assert time.process_time() - began < 2
    assert start.read("9" * 1_000_000 + "\rLoading safetensors checkpoint shards:  10% Completed | 1/10 [00:01<00:09]")
    assert start.progress == 0.1


@given(
    st.sampled_from(["sglang", "vllm", "trtllm", "lmdeploy", "llamacpp", "mine"]),
    st.lists(
        st.text(max_size=80)
        | st.builds(
            "{}{:>4}%{}|{}".format,
            st.sampled_from(["Fetching 4 files:", "a.json:", "shards", "Capturing", "warm", "\x1b[0m"]),
            st.integers(0, 9999),
            st.sampled_from(["", " Completed "]),
            st.text(max_size=20),
        )
        | st.sampled_from(["Load weight begin", "CUDA graph begin", "loading model", "Application startup complete"]),
        max_size=20,
    ),
)
def test_whatever_is_read_makes_sense(engine: str, lines: list[str]) -> None:
    start = StartProgress(engine)
    for line in lines:
        before = (start.phase, start.progress, start.detail, start.doomed)
        changed = start.read(line)
        assert changed == (before != (start.phase, start.progress, start.detail, start.doomed))
        forward = PHASES.index(start.phase) >= PHASES.index(before[0])
        assert forward or ((before[0], start.phase) == ("loading", "downloading") and not before[1])
        assert start.progress is None or 0 <= start.progress <= 1
        assert len(start.detail) <= DETAIL_CHARS
        assert start.detail.isprintable()
    reason = why_it_ended(lines)
    assert reason.isprintable()
    assert len(reason) <= DETAIL_CHARS + 60


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sglang-port", "the port is in use: ERROR: [Errno 98] error while attempting to bind"),
        ("sglang-model", "the model was not found: OSError: Repo id must be in the form"),
        ("sglang-usage", "the engine does not take a flag: sglang serve: error: argument --quantization: invalid"),
        ("vllm-port", "the port is in use: OSError: [Errno 98] Address already in use"),
        ("vllm-model", "the model was not found: huggingface_hub.errors.HFValidationError: Repo id must be"),
        ("vllm-length", "Value error, User-specified max_model_len (99999999) is greater than"),
        ("llamacpp-model", "the model was not found: llamacpp: README.md is not a GGUF file"),
    ],
)
def test_why_a_recorded_start_ended(name: str, reason: str) -> None:
    assert why_it_ended(lines_of(name)).startswith(reason)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            [
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
                "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "out of memory: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (["Traceback (most recent call last):", "KeyError: 'x'", "bye"], "KeyError: 'x'"),
        (["one", "two", ""], "two"),
        (
            ["No module named 'sglang'", "x"],
            "not installed: No module named 'sglang'",
        ),
        (["Ignore import error when loading a: No module named 'cutlass'", "Killed"], "Killed"),
        ([], ""),
    ],
)
def test_why_a_start_ended(lines: list[str], reason: str) -> None:
    assert why_it_ended(lines) == reason
