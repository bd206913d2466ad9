"""`tidegate cost`: what was used and what it cost, at a running gateway."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from gateway.accounts.cost_table import csv_of
from gateway.commands.account_options import COST_BY
from gateway.operate import DONE, Problem, find, print_table


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Show it, what cost most first; returns the exit code."""
    asked = {name: getattr(options, name) for name in ("by", "window", "limit", *COST_BY)}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    try:
        _, answer = find(options, environ).ask("GET", f"/admin/cost?{query}")
    except Problem as problem:
        print(f"tidegate cost: {problem}", file=sys.stderr)
        return problem.exit_code
    if options.json:
        print(json.dumps(answer))
    elif options.csv:
        sys.stdout.write(csv_of(answer))
    else:
        _show(answer)
    return DONE


def _show(answer: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        (answer["by"].upper(), "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "OWN", "RENTED", "TOTAL", "TOKENS PER $")
    ]
    rows += [_line(row["name"], row) for row in answer["rows"]]
    rows.append(_line("all", answer["totals"]))
    print_table(rows)
    if answer["names"] > len(answer["rows"]):
        print(f"{answer['names'] - len(answer['rows'])} more are in the sum alone; --limit shows more", file=sys.stderr)
    if answer["totals"]["unpriced_tokens"]:
        print(f"{answer['totals']['unpriced_tokens']} tokens have no price: see models.<name>.price", file=sys.stderr)


def _line(name: str, amounts: dict[str, Any]) -> tuple[str, ...]:
    worth = amounts["tokens_per_usd"]
    return (
        name,
        *(str(amounts[each]) for each in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")),
        *(f"${value:.6f}" for value in (amounts["own"]["usd"], amounts["rented"]["usd"], amounts["usd"])),
        "-" if worth is None else f"{worth:.0f}",
    )
