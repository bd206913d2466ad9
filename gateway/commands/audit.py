"""`tidegate audit`: who did what and when, and whether somebody has taken entries out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from gateway.operate import DONE, FAILED, Gateway, Problem, find, print_table

PAGE = 1000


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry it out; returns the exit code."""
    try:
        return _run(find(options, environ), options)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate audit: {problem}", file=sys.stderr)
        return problem.exit_code


def _run(gateway: Gateway, options: argparse.Namespace) -> int:
    wanted = {name: getattr(options, name) for name in ("actor", "action", "object") if getattr(options, name)}
    answer: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for answer in _pages(gateway, wanted, 1 if options.verify else options.limit):
        entries += answer["data"]
    missing, unwritten = answer["missing"], answer["unwritten"]
    sound = not missing and not unwritten
    if options.json:
        said = {"missing": missing, "unwritten": unwritten}
        print(json.dumps({"ok": sound, **said} if options.verify else {"data": entries, **said}))
    elif options.verify and sound:
        print(f"no entry is missing, from the first to {entries[0]['id']}" if entries else "the audit has no entries")
    elif not options.verify:
        _print(entries)
    if not options.json:
        for first, last in missing:
            which = f"entry {first} was" if first == last else f"entries {first} to {last} were"
            print(
                f"{which} there and no longer {'is' if first == last else 'are'}: somebody took them out of the "
                "database",
                file=sys.stderr,
            )
        if unwritten:
            print(f"{unwritten} entries are not in the database; the gateway's log says why", file=sys.stderr)
    return FAILED if options.verify and not sound else DONE


def _pages(gateway: Gateway, wanted: Mapping[str, str], limit: int) -> Iterator[dict[str, Any]]:
    """Answers until there are as many entries, or no more."""
    query: dict[str, Any] = dict(wanted)
    while True:
        _, answer = gateway.ask("GET", f"/admin/audit?{urlencode({**query, 'limit': min(limit, PAGE)})}")
        yield answer
        limit -= len(answer["data"])
        if not answer["has_more"] or limit <= 0:
            return
        query["before"] = answer["data"][-1]["id"]


def _print(entries: list[dict[str, Any]]) -> None:
    rows = [("ID", "TIME", "ACTOR", "ACTION", "OBJECT", "CHANGE")]
    rows += [
        (str(each["id"]), each["time"], each["actor"], each["action"], each["object"], _change(each["diff"]))
        for each in entries
    ]
    print_table(rows)


def _change(diff: Mapping[str, Any]) -> str:
    parts = []
    for name, value in diff.items():
        both = isinstance(value, list) and len(value) == 2
        parts.append(
            f"{name}: {json.dumps(value[0])} -> {json.dumps(value[1])}" if both else f"{name}: {json.dumps(value)}"
        )
    text = ", ".join(parts)
    return text if len(text) <= 200 else text[:199] + "…"
