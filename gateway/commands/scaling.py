"""`tidegate scaling`: how many replicas pools should have, and why; holding a number for a while.

Exit codes as in `gateway.operate`: 0 done; 1 not done; 2 the command line, the value or the token cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from gateway.operate import DONE, FAILED, Gateway, Problem, find, plain, print_table

CHANGES = 5
"""Shown of one pool."""


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out the command; returns the exit code."""
    try:
        gateway = find(options, environ)
        match options.action:
            case "hold":
                return _hold(gateway, options)
            case "release":
                return _release(gateway, options)
            case _:
                return _show(gateway, getattr(options, "pool", None), options.json)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate scaling: {problem}", file=sys.stderr)
        return problem.exit_code


def _show(gateway: Gateway, pool: str | None, as_json: bool) -> int:
    """Exit code 1 where what is wanted is not acted on."""
    if pool is None:
        _, told = gateway.ask("GET", "/admin/scaling")
        rows: list[dict[str, Any]] = told["pools"]
    else:
        _, told = gateway.ask("GET", _target(pool))
        rows = [told]
    if as_json:
        print(json.dumps(told))
    elif not rows:
        print("no pool has a scaling: nobody says how many replicas there should be")
    else:
        _table(rows)
        for row in rows:
            _more(row, CHANGES if pool is not None else 0)
    return FAILED if any(row["problem"] for row in rows) else DONE


def _table(rows: list[dict[str, Any]]) -> None:
    titles = ("POOL", "WANTED", "READY", "STARTING", "MIN", "MAX", "PROVIDER", "USD/H", "LIMITED BY", "WHY")
    cells = []
    for row in rows:
        first = row["reasons"][0] if row["reasons"] else None
        wanted = "-" if row["wanted"] is None else str(row["wanted"])  # nothing was decided yet
        numbers = [wanted, *(str(row[name]) for name in ("ready", "starting", "min", "max"))]
        usd = f"{row['usd_per_hour']:.2f}" if row["usd_per_hour"] else "-"
        why = "-" if first is None else plain(f"{first['kind']}: {first['text']}")
        cells.append([row["pool"], *numbers, row["provider"], usd, row["limited_by"] or "-", why])
    print_table([list(titles), *cells])


def _more(row: dict[str, Any], changes: int) -> None:
    name = row["pool"]
    if row["held"]:
        left_s = max(0.0, row["held"]["until_unix_s"] - time.time())
        print(f"{name}: {plain(row['held']['by'])} holds it at {row['held']['count']} for another {left_s:.0f} s")
    for each in row["leaving"]:
        print(f"{name}: {each['replica']} is {'going' if each['told'] else 'drained, to go when it is empty'}")
    if row["problem"]:
        print(f"{name}: {plain(row['problem'])}", file=sys.stderr)
    for reason in row["reasons"] if changes else ():
        print(f"{name}: {reason['kind']} asks for {reason['wanted']}: {plain(reason['text'])}")
    for change in row["history"][:changes]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(change["unix_s"]))
        print(f"{name}: {at} {change['wanted']} wanted, {change['current']} there: {plain(change['why'])}")


def _hold(gateway: Gateway, options: argparse.Namespace) -> int:
    body = {"count": options.count, "for_s": options.for_s}
    _, told = gateway.ask("PUT", _target(options.pool), body)
    if options.json:
        print(json.dumps(told))
    else:
        until = time.strftime("%H:%M:%S", time.localtime(told["held"]["until_unix_s"]))
        print(f"{options.pool} is held at {options.count} replicas until {until}; tidegate scaling release ends it")
    return DONE


def _release(gateway: Gateway, options: argparse.Namespace) -> int:
    _, told = gateway.ask("DELETE", _target(options.pool))
    if options.json:
        print(json.dumps(told))
    else:
        print(f"{options.pool} follows what is asked for" + ("" if told["released"] else "; it did so already"))
    return DONE


def _target(pool: str) -> str:
    return f"/admin/scaling/{quote(pool, safe='')}"
