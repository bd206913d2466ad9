"""`tidegate limits`: what limits are in force at a running gateway, and what is left of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from gateway.operate import DONE, Problem, find, print_table


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Show them, those nearest to their end first; returns the exit code."""
    asked = {name: getattr(options, name) for name in ("tenant", "key", "model", "limit", "offset")}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    try:
        _, answer = find(options, environ).ask("GET", f"/admin/limits?{query}")
    except Problem as problem:
        print(f"tidegate limits: {problem}", file=sys.stderr)
        return problem.exit_code
    if options.json:
        print(json.dumps(answer))
        return DONE
    rows: list[tuple[str, ...]] = [("HOLDER", "LIMIT", "TAKEN", "USED", "RESERVED", "OF", "LEFT", "RESETS", "REFUSED")]
    for row in answer["data"]:
        rows += [_line(row, gauge) for gauge in sorted(row["limits"], key=lambda each: -each["share"])]
    print_table(rows)
    if not answer["complete"]:
        print(
            f"{answer['total']} holders were looked at, those active lately first; name one to see others",
            file=sys.stderr,
        )
    return DONE


def _line(row: dict[str, Any], gauge: dict[str, Any]) -> tuple[str, ...]:
    money = gauge["limit"].startswith("usd_")

    def shown(value: float) -> str:
        return f"${value:.6f}" if money else f"{value:.15g}"

    refused = f"{gauge['would_refuse']} (shadow)" if row["shadow"] else str(gauge["refused"])
    return (
        holder(row),
        gauge["limit"] + (" (raised)" if gauge["limit"] in row["raised"] else ""),
        f"{gauge['share']:.1%}",
        shown(gauge["used"]),
        shown(gauge["reserved"]) if money else "-",
        shown(gauge["capacity"]),
        shown(gauge["remaining"]),
        f"{gauge['resets_s']:.1f} s" if gauge["resets_s"] else "-",
        refused,
    )


def holder(row: dict[str, Any]) -> str:
    """Whose limits they are, in a few words."""
    match row["kind"]:
        case "key":
            return f"key {row['key']}" + (f" ({row['name']})" if row["name"] else "")
        case "tenant":
            return f"tenant {row['tenant']}"
        case "user":
            return f"user {row['user']} of {row['tenant']}"
        case "tenant_model":
            return f"{row['model']} for {row['tenant']}"
    return f"model {row['model']}"
