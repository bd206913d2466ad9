"""The fit of engine constants finds those that rows were made with, and engines.json is what the recorded rows say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from loadtests.fits.fit import ENGINES, Constants, Served, entry, fitted, load, predicted_ttft
from loadtests.fits.record import Row
from loadtests.fits.replay import PHASES, compare, replayed

RECORDED = sorted((ENGINES.parent / "recorded").glob("*.jsonl.gz"))
TRUE = Constants(prefill_ms=0.2, curve=2e-4, step_ms=5.0, request_ms=1.0, kv_ms=5e-4, rtt_ms=3.0, chunk=2048)
POSITIVE = ("prefill_ms", "step_ms", "request_ms", "kv_ms", "chunk", "kv_tokens", "max_running")


def _engines() -> dict[str, dict[str, Any]]:
    engines: dict[str, dict[str, Any]] = json.loads(ENGINES.read_text())
    return engines


def _made(noise: float) -> list[Served]:
    """What an engine with the constants `TRUE` would have been recorded with."""
    rng, now, served = Random(3), 0.0, []
    for length in (64, 128, 256, 512, 1024, 2048, 3072, 4096) * 6:
        second = TRUE.prefill_ms * TRUE.curve * length * length / 2
        ttft = TRUE.rtt_ms + TRUE.step_ms * (1 + (length - 1) // 2048) + TRUE.prefill_ms * length + second
        first = now + ttft * rng.lognormvariate(0, noise)
        served.append(Served("alone", now, first, first, ttft, length, 0, 1, 0, (first,)))
        now = first + 1
    for count in (1, 2, 4, 8):
        for length in (64, 1024, 3072):
            first = now + 100
            step = TRUE.step_ms + TRUE.request_ms * count + TRUE.kv_ms * count * (length + 48)
            at = tuple(first + place * step * rng.lognormvariate(0, noise / 10) for place in range(96))
            served += [Served("batch", now, first, at[-1], 100, length, 0, 96, others, at) for others in range(count)]
            now = at[-1] + 1
    return served


def test_the_constants_that_made_the_rows_are_found() -> None:
    constants, gap_error, ttft_error = fitted(_made(0.03), TRUE.chunk)
    for name in ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms"):
        assert getattr(constants, name) == pytest.approx(getattr(TRUE, name), rel=0.15), name
    assert gap_error < 0.05
    assert ttft_error < 0.1


def test_the_prediction_counts_what_is_queued_and_running() -> None:
    tokens = (50.0, 60.0)
    running = Served("mixed", 0, 50, 1000, 50, 1000, 0, 2, 0, tokens)
    queued = Served("mixed", 100, 500, 600, 400, 1000, 200, 2, 1, tokens)
    asked = Served("mixed", 100.1, 700, 800, 600, 500, 400, 2, 2, tokens)
    flat = Constants(prefill_ms=0.2, curve=0.0, step_ms=5.0, request_ms=1.0, kv_ms=1e-3, rtt_ms=3.0, chunk=1000)
    step = 5.0 + 1.0 + 1.0
    expected = 3.0 + step + 0.2 * 100 + (0.2 * 800 - 0.1) + step * 900 / 1000
    assert predicted_ttft(asked, [running, queued, asked], flat) == pytest.approx(expected)


def test_a_recorded_row_reads_back(tmp_path: Path) -> None:
    row = Row("batch", 10.0, 30.0, 50.0, 100, 40, 3, 2, [70, 80], 1.0, 11.0, 26.0)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"name": "x"}) + "\n" + row.line() + "\n")
    header, (served,) = load(path)
    assert header == {"name": "x"}
    assert (served.ttft, served.wall_ttft, served.uncached, served.others) == (10.0, 20.0, 60, 2)
    assert served.tokens_at == pytest.approx((11.0, 18.0, 26.0))


@pytest.mark.parametrize("name", sorted(_engines()))
def test_every_engine_has_sensible_constants_and_says_where_they_come_from(name: str) -> None:
    engine = _engines()[name]
    for key in POSITIVE:
        assert engine[key] > 0, key
    assert 0 <= engine["curve"] < 0.01
    assert engine["source"].startswith(("not recorded here: ", "fitted to recorded/"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.split(".")[0])
def test_fitted_constants_are_those_of_the_recorded_rows(path: Path) -> None:
    header, served = load(path)
    assert path.stat().st_size < 300_000
    constants, _, _ = fitted(served, header["chunk"])
    again = entry(header, constants, header["kv_tokens"], header["max_running"])
    written = _engines()[header["name"]]
    assert set(written) == set(again)
    for key, value in again.items():
        assert written[key] == (pytest.approx(value, rel=0.02) if isinstance(value, float) else value), key


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.split(".")[0])
def test_the_simulated_engine_takes_about_as_long_as_the_recorded_one(path: Path) -> None:
    header, served = load(path)
    name = header["name"]
    rows = replayed([each for each in served if each.phase == "batch"], name, _engines()[name]["rtt_ms"])
    ratios = sorted(simulated / (each.last - each.sent) for each, _, simulated in rows)
    assert 0.8 < ratios[len(ratios) // 2] < 1.25
    assert len(compare(name, served, 0.0)) == len(PHASES)
