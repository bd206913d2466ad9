"""`tidegate accounts`: keys, tenants, limits and budgets of a running gateway, through its admin API.

`tidegate keys` and `tidegate tenants` do the same on the database itself, where its configuration is; this one needs an
address and a token, and is told of changes that somebody else has made in the meantime (`--if-version`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from gateway.keys.format import hidden
from gateway.operate import DONE, UNUSABLE, Gateway, Problem, find, print_table


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one action; returns the exit code."""
    try:
        method, target, content = order_of(options)
        version = getattr(options, "if_version", None)
        headers = {} if version is None else {"if-match": f'"{version}"'}
        gateway: Gateway = find(options, environ)
        _, answer = gateway.ask(method, target, content, headers=headers)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate accounts: {problem}", file=sys.stderr)
        return problem.exit_code
    if options.json:
        print(json.dumps(answer))
    elif "data" in answer:
        _show(options.kind, answer)
    else:
        for name, value in answer.items():
            print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return DONE


def order_of(options: argparse.Namespace) -> tuple[str, str, dict[str, Any] | None]:
    """Method, target and content of the call. Raises `Problem`."""
    if options.kind == "undo":
        return "POST", f"/admin/undo/{quote(options.entry, safe='')}", {}
    base = f"/admin/{options.kind}"
    if options.action == "list":
        names = ("q", "limit", "after", "tenant", "state")
        asked = {name: value for name in names if (value := getattr(options, name, ""))}
        return "GET", f"{base}?{urlencode(asked)}", None
    if options.action == "create":
        return "POST", base, {**fields_of(options.set), "tenant": options.tenant}
    target = f"{base}/{quote(options.name, safe='')}"
    change = "PATCH" if options.kind == "keys" else "PUT"
    match options.action:
        case "show":
            return "GET", target, None
        case "update" | "put":
            return change, target, fields_of(options.set)
        case "disable" | "enable":
            return change, target, {"disabled": options.action == "disable"}
        case "rotate":
            return "POST", f"{target}/rotate", {} if options.overlap is None else {"overlap": options.overlap}
    return "DELETE", target, None


def fields_of(settings: list[str]) -> dict[str, Any]:
    """`["limits.usd_per_day=5", "name=ci"]` as `{"limits": {"usd_per_day": 5}, "name": "ci"}`. Raises `Problem`."""
    found: dict[str, Any] = {}
    for setting in settings:
        path, said, text = setting.partition("=")
        if not said or not path:
            raise Problem(f"--set {hidden(setting)[:80]}: write FIELD=VALUE", UNUSABLE)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *above, last = path.split(".", 1)
        place = found.setdefault(above[0], {}) if above else found
        if not isinstance(place, dict):
            raise Problem(f"--set {hidden(setting)[:80]}: {above[0]} is set as a whole already", UNUSABLE)
        place[last] = value
    return found


def _show(kind: str, answer: dict[str, Any]) -> None:
    if kind == "keys":
        names = ["id", "tenant", "name", "hint", "state", "class", "expires", "version"]
    else:
        names = ["name", "keys", "weight", "disabled", "version"]
    rows = [["-" if each[name] in (None, "") else str(each[name]) for name in names] for each in answer["data"]]
    print_table([[name.upper() for name in names], *rows])
    if answer["has_more"]:
        last = answer["data"][-1]
        print(f"there are more: --after {last.get('id', last['name'])}", file=sys.stderr)
