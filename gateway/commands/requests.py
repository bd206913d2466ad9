"""`tidegate requests`: what is under way at a running gateway and what was, one request opened, or ended."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from gateway.commands.request_options import FILTERS
from gateway.operate import DONE, Gateway, Problem, find, print_table

SHOWN_CANDIDATES = 10


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one action; returns the exit code."""
    try:
        gateway = find(options, environ)
        match options.action:
            case "list":
                return _list(gateway, options)
            case "show":
                return _show(gateway, options.id, options.json)
            case _:
                return _kill(gateway, options.id, options.json)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate requests: {problem}", file=sys.stderr)
        return problem.exit_code


def _list(gateway: Gateway, options: argparse.Namespace) -> int:
    names = [name.replace("-", "_") for name in FILTERS]
    asked = {name: getattr(options, name) for name in ("live", *names, "limit")}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    _, page = gateway.ask("GET", f"/admin/requests?{query}")
    if options.json:
        print(json.dumps(page))
        return DONE
    rows: list[tuple[str, ...]] = [
        ("REQUEST", "STATE", "TOOK", "TENANT", "MODEL", "REPLICA", "TRIES", "FIRST TOKEN", "TOKENS")
    ]
    rows += [_live(row) for row in page["live"]]
    rows += [_settled(row) for row in page["settled"]]
    print_table(rows)
    if page["next"] is not None:
        print(f"older ones: --before {page['next']}", file=sys.stderr)
    for index in page["silent_workers"]:
        print(f"worker {index} does not answer; its requests are missing here", file=sys.stderr)
    return DONE


def _live(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["id"],
        row["phase"],
        _ms(row["age_ms"]),
        row["tenant"],
        row["model"] or "-",
        row["replica"] or "-",
        str(row["attempts"]),
        "-",
        str(row["content_events"]),
    )


def _settled(row: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = "-" if row["prompt_tokens"] is None else f"{row['prompt_tokens']}+{row['completion_tokens']}"
    return (
        row["id"],
        f"{row['outcome']} {row['status'] or ''}".rstrip(),
        _ms(row["duration_ms"]),
        row["tenant"],
        row["model"] or "-",
        row["replica"] or "-",
        str(row["attempts"]),
        _ms(row["ttft_ms"]),
        tokens,
    )


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


def _show(gateway: Gateway, id: str, as_json: bool) -> int:
    _, found = gateway.ask("GET", f"/admin/requests/{quote(id, safe='')}")
    if as_json:
        print(json.dumps(found))
        return DONE
    row = found["live"] or found["record"]
    state = row["phase"] if found["live"] else f"{row['outcome']} {row['status'] or ''}".rstrip()
    error = f" ({row['error_code']})" if row.get("error_code") else ""
    print(f"{row['id']}: {state}{error}; tenant {row['tenant']}, model {row['model'] or '-'}")
    print()
    _print_timeline(found["timeline"])
    for decision in found["decisions"]:
        print()
        _print_decision(decision)
    if not found["decisions"] and found["timeline"]["attempts"]:
        print("\nwhy it went there was not kept (admin.explained_per_s)")
    return DONE


def _print_timeline(timeline: Mapping[str, Any]) -> None:
    rows = [("PHASE", "FROM", "TOOK", "REPLICA", "")]
    for phase in timeline["phases"]:
        end = timeline["duration_ms"] if phase["end_ms"] is None else phase["end_ms"]
        attempt = {} if phase["attempt"] is None else timeline["attempts"][phase["attempt"]]
        last = phase["end_ms"] is None or phase["end_ms"] == attempt.get("ended_ms")
        note = "under way" if phase["end_ms"] is None else (attempt.get("code") or "") if last else ""
        rows.append(
            (phase["name"], f"{phase['start_ms']:.1f} ms", f"{end - phase['start_ms']:.1f} ms", _place(attempt), note)
        )
    print_table(rows)


def _place(attempt: Mapping[str, Any]) -> str:
    return f"{attempt['pool']}/{attempt['replica']}" if attempt else ""


def _print_decision(decision: Mapping[str, Any]) -> None:
    print(f"{decision['replica'] or 'nobody'}: {decision['reason']}, by {decision['policy']}")
    candidates: Sequence[Mapping[str, Any]] = decision["candidates"]
    terms = [name for name in _terms(candidates) if any(abs(each["terms_ms"][name]) >= 0.05 for each in candidates)]
    if candidates:
        rows: list[tuple[str, ...]] = [("CANDIDATE", "COST", "CACHED", *(name.upper() for name in terms))]
        for each in candidates[:SHOWN_CANDIDATES]:
            cost = "-" if each["cost_ms"] is None else f"{each['cost_ms']:.1f}"
            shown = (f"{each['terms_ms'][name]:.1f}" for name in terms)
            rows.append((each["replica"], cost, str(each["cached_tokens"]), *shown))
        print_table(rows)
        if len(candidates) > SHOWN_CANDIDATES:
            print(f"and {len(candidates) - SHOWN_CANDIDATES} more, which cost more")
    for each in decision["excluded"]:
        print(f"not {each['replica']}: {each['reason']}")


def _terms(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(candidates[0]["terms_ms"]) if candidates else []


def _kill(gateway: Gateway, id: str, as_json: bool) -> int:
    _, answer = gateway.ask("DELETE", f"/admin/requests/{quote(id, safe='')}")
    print(json.dumps(answer) if as_json else f"{id} is ended")
    return DONE
