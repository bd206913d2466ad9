"""`tidegate explain`: where a request would go, and why; asked of a running gateway, or replayed from what was kept.

Exit codes as in `gateway.operate`: 0 explained, also when no replica could take the request; 1 no gateway answers;
2 the command line, a file, the configuration, the token or the request itself cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.operate import DONE, UNUSABLE, Problem, find, print_table

STDIN = "-"


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out the command; returns the exit code."""
    try:
        if options.replay is not None:
            kept = _replayable(options)
            told, before = _replayed(kept, options.policy), kept
        else:
            content = _question(options)
            _, told = find(options, environ).ask("POST", "/admin/explain", content)
            before = None
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate explain: {problem}", file=sys.stderr)
        return problem.exit_code
    if options.json:
        print(json.dumps(told))
    else:
        _show(told, before)
    return DONE


# -- what is asked


def _question(options: argparse.Namespace) -> bytes:
    if options.request is None:
        raise Problem("a FILE with the request is needed, or - for standard input", UNUSABLE)
    if options.policy is not None:
        raise Problem("--policy goes with --replay: a running gateway has its policy", UNUSABLE)
    raw = _read(options.request)
    given: dict[str, Any] = {
        name: value for name in ("path", "key", "tenant") if (value := getattr(options, name)) is not None
    }
    if options.header:
        given["headers"] = dict(options.header)
    request = _parsed(raw, options.request)
    if "body" in request and "model" not in request:
        request["headers"] = {**(request.get("headers") or {}), **given.pop("headers", {})}
        return json.dumps({**request, **given}).encode()
    if not given:
        return raw
    # The request's own bytes are left as they are: their number counts.
    return b'{"body":' + raw + b"," + json.dumps(given).encode()[1:]


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise Problem(f"{name}: {error.strerror or error}", UNUSABLE) from error


def _parsed(raw: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        # Its words, without what it quotes: that would be the request.
        raise Problem(f"{name}: not JSON ({type(error).__name__})", UNUSABLE) from error
    if not isinstance(content, dict):
        raise Problem(f"{name}: not a JSON object", UNUSABLE)
    return content


# -- replay


def _replayable(options: argparse.Namespace) -> dict[str, Any]:
    others = [options.request, options.path, options.key, options.tenant, *options.header]
    if any(each is not None for each in others):
        raise Problem("--replay takes all from its own FILE; only --policy and --json go with it", UNUSABLE)
    return _parsed(_read(options.replay), options.replay)


def _replayed(kept: dict[str, Any], policy: str | None) -> dict[str, Any]:
    """Only the decision among the model's own replicas: what the spill would do depends on the gateway's queue."""
    from routing.explain import replay
    from routing.policies import PolicyError, make_policy

    try:
        return {**replay(kept, make_policy, policy), "spill": None}
    except PolicyError as error:
        raise Problem(f"policy {error}", UNUSABLE) from error
    except ValueError as error:
        raise Problem(f"it cannot be replayed: {error}", UNUSABLE) from error


# -- what is shown


def _show(told: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    away = (told.get("spill") or {}).get("explanation")
    _show_candidates(told)
    if away is not None:
        print(f"\nrented, pool {away['pool']}:")
        _show_candidates(away)
    print(_decision(told, before))


def _show_candidates(told: Mapping[str, Any]) -> None:
    candidates: Sequence[Mapping[str, Any]] = told["candidates"]
    # What is nothing for all says nothing; most of the terms are.
    terms = [name for name in _terms(candidates) if any(each["terms_ms"].get(name) for each in candidates)]
    rows = [("REPLICA", "REGION", "CACHED", "COST", "TTFT", *(name.upper().replace("_", " ") for name in terms))]
    rows += [
        (
            each["replica"],
            each["region"] or "-",
            str(each["cached_tokens"]),
            _ms(each["cost_ms"]),
            _ms(each["ttft_ms"]),
            *(_ms(each["terms_ms"].get(name)) for name in terms),
        )
        for each in candidates
    ]
    if candidates:
        print_table(rows)
    for each in candidates:
        if each["despite"]:
            print(f"{each['replica']}  considered, though {each['despite']}")
    for each in told["excluded"]:
        print(f"{each['replica']}  excluded: {each['reason']}")


def _terms(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(candidates[0]["terms_ms"]) if candidates else []


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _decision(told: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """One line."""
    spill = told.get("spill") or {}
    away = spill.get("explanation")
    if away is not None:
        return f"{away['replica']} (spill, {spill['reason']}): {_expectation(away)}"
    was = "" if before is None else f"; it was {before['replica'] or 'nobody'} by {before['policy']}"
    kept = f"; no spill: {spill['reason']}" if spill else ""
    if told["replica"] is None:
        refusal = told.get("refusal")
        answer = "" if refusal is None else f": {refusal['status']} {refusal['code']}"
        return f"nobody ({told['reason']}){answer}{kept}{was}"
    equals = len(told["near_ties"])
    drawn = f", drawn from {equals} that are about equal" if told["replica"] in told["near_ties"] else ""
    return f"{told['replica']} ({told['policy']}, {told['reason']}{drawn}): {_expectation(told)}{kept}{was}"


def _expectation(told: Mapping[str, Any]) -> str:
    ttft_ms = told["predicted_ttft_ms"]
    first = "" if ttft_ms is None else f", first token in {ttft_ms:.1f} ms"
    return f"{told['predicted_cached_tokens']} of {told['request']['prompt_tokens']} prompt tokens cached{first}"
