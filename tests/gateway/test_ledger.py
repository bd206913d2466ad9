"""Usage records, in memory and in a file."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.usage import Usage
from gateway import ledger as ledger_module
from gateway.ledger import KEPT_IN_MEMORY, Ledger, as_record
from gateway.record import Exchange, Outcome
from gateway.request_log import line_of


def exchange(number: int = 1) -> Exchange:
    return Exchange(f"req_{number}", "/v1/chat/completions", 10.0, 1_700_000_000.0, model="m")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_record_is_flat_and_says_how_it_went() -> None:
    one = exchange()
    one.outcome, one.finished_at, one.first_content_at = Outcome.COMPLETED, 12.5, 10.25
    one.usage, one.cost_usd = Usage(7, 3, 4), 0.5
    record = as_record(one)
    assert record["outcome"] == "completed"
    assert (record["prompt_tokens"], record["completion_tokens"], record["cached_tokens"]) == (7, 3, 4)
    assert (record["ttft_ms"], record["duration_ms"], record["cost_usd"]) == (250.0, 2500.0, 0.5)
    assert all(value is None or isinstance(value, str | int | float) for value in record.values())


def test_each_field_has_what_the_exchange_has_under_its_name() -> None:
    one = exchange()
    one.outcome, one.attempts = Outcome.TIMEOUT, 2
    texts = ["tenant", "key_id", "route", "model", "fallback_from", "pool", "replica", "region", "route_reason"]
    numbers = ["predicted_cached_tokens", "attempts", "continuations", "status", "request_bytes", "response_bytes"]
    expected: dict[str, Any] = {name: name for name in (*texts, "error_code")}
    expected |= {name: number for number, name in enumerate(numbers, 2)}
    for name, value in expected.items():
        setattr(one, name, value)
    for flag in ("stream", "hedged", "usage_estimated"):
        setattr(one, flag, True)
        record, line = as_record(one), msgspec.to_builtins(line_of(one))
        setattr(one, flag, False)
        found = [[name for name, value in said.items() if value is True] for said in (record, line)]
        assert found == [[flag], [flag]]
        assert {name: record[name] for name in expected} == expected
        assert {name: line[name] for name in expected if name in line} == {
            name: value for name, value in expected.items() if name != "predicted_cached_tokens"
        }


def test_a_record_without_usage_says_so_instead_of_zero() -> None:
    record = as_record(exchange())
    assert record["prompt_tokens"] is None
    assert record["ttft_ms"] is None
    assert record["cost_usd"] is None


def test_the_newest_records_are_kept_in_memory() -> None:
    ledger = Ledger(None)
    for number in range(KEPT_IN_MEMORY + 10):
        ledger.record(exchange(number))
    assert [each.request_id for each in ledger.recent][:1] == ["req_10"]
    assert len(ledger.recent) == KEPT_IN_MEMORY


async def test_without_a_file_nothing_waits() -> None:
    ledger = Ledger(None)
    ledger.start()
    for number in range(ledger_module.MAX_WAITING + 1):
        ledger.record(exchange(number))
    assert ledger.lost == 0
    await ledger.aclose()


async def test_records_are_appended_in_order_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text('{"id":"before"}\n')
    ledger = Ledger(path)
    ledger.start()
    for number in range(500):
        ledger.record(exchange(number))
    await ledger.aclose()
    assert [each["id"] for each in lines(path)] == ["before", *(f"req_{number}" for number in range(500))]


async def test_records_are_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_EVERY_S", 0.01)
    path = tmp_path / "usage.jsonl"
    ledger = Ledger(path)
    ledger.start()
    ledger.record(exchange())
    async with asyncio.timeout(5):
        while not path.read_bytes():  # noqa: ASYNC110 -- a file gives no event
            await asyncio.sleep(0.01)
    assert [each["id"] for each in lines(path)] == ["req_1"]
    await ledger.aclose()


async def test_a_file_that_cannot_be_opened_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Ledger(tmp_path / "missing" / "usage.jsonl").start()


async def test_a_file_that_cannot_be_written_is_reported_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_EVERY_S", 0.01)
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "usage.jsonl"
    ledger = Ledger(path)
    ledger.start()
    path.unlink()
    folder.rmdir()
    with caplog.at_level(logging.ERROR):
        ledger.record(exchange(1))
        async with asyncio.timeout(5):
            while not caplog.records:  # noqa: ASYNC110 -- the log gives no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # several more tries
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    folder.mkdir()
    ledger.record(exchange(2))
    await ledger.aclose()
    assert [each["id"] for each in lines(path)] == ["req_1", "req_2"]
    assert ledger.lost == 0


async def test_records_beyond_the_bound_are_counted_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 10)
    path = tmp_path / "usage.jsonl"
    ledger = Ledger(path)
    for number in range(15):
        ledger.record(exchange(number))
    assert ledger.lost == 5
    await ledger.aclose()
    assert len(lines(path)) == 10


async def test_what_cannot_be_written_at_the_end_is_counted_as_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "missing" / "usage.jsonl")
    for number in range(3):
        ledger.record(exchange(number))
    with caplog.at_level(logging.ERROR):
        await ledger.aclose()
    assert ledger.lost == 3


async def test_closing_waits_for_a_write_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads stands for a slow disk: the write is under way when the ledger is closed."""
    monkeypatch.setattr(ledger_module, "FLUSH_EVERY_S", 0.01)
    path = tmp_path / "slow"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ledger = Ledger(path)
        ledger.start()
        for number in range(1000):  # some 400 KB; a pipe holds 64
            ledger.record(exchange(number))
        received = bytearray()
        async with asyncio.timeout(10):
            while not received:
                await asyncio.sleep(0.01)
                received += _read(reading)
            closing = asyncio.create_task(ledger.aclose())
            while not closing.done():
                await asyncio.sleep(0.001)
                received += _read(reading)
        while piece := _read(reading):
            received += piece
    finally:
        os.close(reading)
    ids = [json.loads(line)["id"] for line in received.splitlines()]
    assert ids == [f"req_{number}" for number in range(1000)]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
