"""A report of costs as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

CSV_COLUMNS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "completion_tokens",
    "unpriced_tokens",
    "usd",
    "own_usd",
    "rented_usd",
    "spilled_requests",
    "spilled_usd",
    "tokens_per_usd",
)


def csv_of(report: dict[str, Any]) -> str:
    """The rows of a report as CSV (RFC 4180). A cell that a spreadsheet would take for a formula begins with `'`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([report["by"], *CSV_COLUMNS])
    for row in report["rows"]:
        values = {**row, "own_usd": row["own"]["usd"], "rented_usd": row["rented"]["usd"]}
        writer.writerow([_cell(row["name"]), *(_number(values[name]) for name in CSV_COLUMNS)])
    return text.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value)
