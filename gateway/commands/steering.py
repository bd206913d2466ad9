"""`tidegate weight`, `price`, `policy`, `reload` and `config`: steering a running gateway.

Each change names the version that it changes: the one that is now, or `--if-version`. Exit codes as in
`gateway.operate`: 0 done; 1 not done; 2 the command line, the value, the configuration or the token cannot be used.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from gateway.commands.steering_options import RESET
from gateway.operate import DONE, FAILED, UNUSABLE, Gateway, Problem, find, print_table

POLL_S = 0.5
COMPARED_WITHIN_S = 180.0
WRITE_WITHIN_S = 60.0
"""Longer than a change waits for all workers to have it."""
NONE = "none"
_PART = re.compile(r'"([^"]+)"|([^."]+)')


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one command; returns the exit code."""
    try:
        gateway = find(options, environ)
        match options.command:
            case "weight":
                return _weight(gateway, options)
            case "price":
                return _price(gateway, options)
            case "reload":
                return _reload(gateway, options.json)
            case "policy":
                return _policy(gateway, options)
            case _:
                return _config(gateway, options)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate {options.command}: {problem}", file=sys.stderr)
        return problem.exit_code


# -- changes


def _write(gateway: Gateway, options: argparse.Namespace, method: str, target: str, content: Any = None) -> int:
    version = options.if_version
    if version is None:
        version = gateway.ask("GET", "/admin/overrides")[1]["version"]
    _, told = gateway.ask(method, target, content, WRITE_WITHIN_S, {"if-match": f'"{version}"'})
    if options.json:
        print(json.dumps(told))
    elif not told["changed"]:
        print("it was so already")
    else:
        for each in told["changed"]:
            print(f"{each['name']}: {_text(each['before'])} -> {_text(each['after'])}")
        print(f"version {told['version']}; tidegate config restore {version} takes it back")
    for index in told["silent_workers"]:
        print(f"worker {index} has not said yet that it has the change", file=sys.stderr)
    return FAILED if told["silent_workers"] else DONE


def _weight(gateway: Gateway, options: argparse.Namespace) -> int:
    pool, replica = options.replica
    target = f"/admin/replicas/{quote(pool, safe='')}/{quote(replica, safe='')}/weight"
    if options.weight is None:
        return _write(gateway, options, "DELETE", target)
    return _write(gateway, options, "PUT", target, {"weight": options.weight})


def _price(gateway: Gateway, options: argparse.Namespace) -> int:
    names = ("input", "cached_input", "cache_write", "output")
    price = {name: value for name in names if (value := getattr(options, name)) is not None}
    if bool(price) == options.reset:
        raise Problem("give --input, --output or others in US dollars per million tokens; or --reset", UNUSABLE)
    target = f"/admin/models/{quote(options.model)}/price"
    return _write(gateway, options, "DELETE" if options.reset else "PUT", target, price or None)


def _config_change(gateway: Gateway, options: argparse.Namespace) -> int:
    path = [first or second for first, second in _PART.findall(options.path)]
    if not path:
        raise Problem(f"{options.path!r} is not the path of a setting", UNUSABLE)
    if options.action == "unset":
        return _write(gateway, options, "PATCH", "/admin/overrides", {"drop": [path]})
    try:
        value = json.loads(options.value)
    except ValueError:
        value = options.value
    return _write(gateway, options, "PATCH", "/admin/overrides", {"set": [{"path": path, "value": value}]})


# -- policies


def _policy(gateway: Gateway, options: argparse.Namespace) -> int:
    if options.action == "list":
        return _policies(gateway, options.json)
    if options.action == "compare":
        return _compare(gateway, options)
    target = f"/admin/models/{quote(options.model)}/{'policy' if options.action == 'switch' else 'shadow'}"
    if options.policy == RESET:
        return _write(gateway, options, "DELETE", target)
    content: dict[str, Any] = {"policy": options.policy}
    if options.action == "shadow":
        content["policy"] = None if options.policy == NONE else options.policy
        if options.per_s is not None:
            content["per_s"] = options.per_s
    return _write(gateway, options, "PUT", target, content)


def _policies(gateway: Gateway, as_json: bool) -> int:
    _, answer = gateway.ask("GET", "/admin/policies")
    if as_json:
        print(json.dumps(answer))
        return DONE
    rows = [("MODEL", "POLICY", "CHANGED", "SHADOW", "COMPARED", "SAME", "TTFT MS", "IN SHADOW", "CACHED", "IN SHADOW")]
    for each in answer["models"]:
        shadow = each["shadow"]
        changed = "yes" if each["overridden"] else "no"
        if shadow is None:
            rows.append((each["name"], each["policy"], changed, *["-"] * 7))
            continue
        ttft, cached = shadow["ttft_ms"], shadow["cached_share"]
        rows.append(
            (
                each["name"],
                each["policy"],
                changed,
                shadow["policy"],
                str(shadow["numbers"]["compared"]),
                _percent(shadow["agreement"]),
                _ms(ttft["real"]),
                _ms(ttft["shadow"]),
                _percent(cached["real"]),
                _percent(cached["shadow"]),
            )
        )
    print_table(rows)
    return DONE


def _compare(gateway: Gateway, options: argparse.Namespace) -> int:
    order = {"model": options.model, "policies": options.policies, "requests": options.requests}
    _, job = gateway.ask("POST", "/admin/policies/compare", order)
    end = time.monotonic() + COMPARED_WITHIN_S
    asked = job["id"]
    while job["state"] == "running":
        if time.monotonic() >= end:
            raise Problem("the comparison takes too long; GET /admin/policies/compare tells of it", FAILED)
        time.sleep(POLL_S)
        _, job = gateway.ask("GET", "/admin/policies/compare")
        if job["id"] != asked:
            raise Problem("somebody else has begun another comparison meanwhile", FAILED)
    if options.json:
        print(json.dumps(job))
    elif job["state"] == "done":
        _show_comparison(job)
    if job["state"] != "done":
        raise Problem(job["error"] or f"the comparison was {job['state']}", FAILED)
    return DONE


def _show_comparison(job: Mapping[str, Any]) -> None:
    print(f"{job['model']}: simulated on {job['requests']} requests of {job['span_s']:g} s")
    rows = [("POLICY", "TTFT MS", "P99", "CACHED", "TOTAL MS", "P99")]
    for policy in job["policies"]:
        figures = {name: value["mean"] for name, value in job["result"][policy].items()}
        rows.append(
            (
                policy + (" (in force)" if policy == job["in_force"] else ""),
                _ms(figures["ttft_ms"]),
                _ms(figures["ttft_p99_ms"]),
                _percent(figures["hit_rate"]),
                _ms(figures["total_ms"]),
                _ms(figures["total_p99_ms"]),
            )
        )
    found = job["measured"]
    measured = ("measured", _ms(found["ttft_ms"]), _ms(found["ttft_p99_ms"]), _percent(found["hit_rate"]), "-", "-")
    print_table([*rows, measured])
    for each in job["caveats"]:
        print(f"note: {each}")


# -- the configuration


def _reload(gateway: Gateway, as_json: bool) -> int:
    _, told = gateway.ask("POST", "/admin/reload", timeout_s=WRITE_WITHIN_S)
    if as_json:
        print(json.dumps(told))
        return DONE
    for each in told["changed"]:
        where = f"  ({each['where'] or each['origin']})" if each["origin"] else ""
        print(f"{each['path']}: {_text(each['before'])} -> {_text(each['after'])}{where}")
    if told["more_changed"]:
        print(f"and {told['more_changed']} more")
    if not told["changed"]:
        print("nothing has changed")
    for name in told["needs_restart"]:
        print(f"{name} needs a restart, and stays as it was", file=sys.stderr)
    for each in told["overrides_left_out"]:
        print(f"the override of {each['name']} is left out: {each['problem']}", file=sys.stderr)
    return DONE


def _config(gateway: Gateway, options: argparse.Namespace) -> int:
    match options.action:
        case "show":
            return _show(gateway, options)
        case "overrides":
            return _overrides(gateway, options.json)
        case "restore":
            return _write(gateway, options, "POST", "/admin/overrides/restore", {"version": options.version})
        case _:
            return _config_change(gateway, options)


def _show(gateway: Gateway, options: argparse.Namespace) -> int:
    _, answer = gateway.ask("GET", "/admin/settings")
    rows = [
        row
        for row in answer["settings"]
        if options.search in row["path"] and (options.all or row["origin"] != "default" or row["waits_for_restart"])
    ]
    if options.json:
        print(json.dumps({**answer, "settings": rows}))
    else:
        print_settings(rows, origins=options.origins)
    return DONE


def print_settings(rows: list[dict[str, Any]], *, origins: bool) -> None:
    """Settings as a table."""
    heads = ("SETTING", "VALUE", *(("FROM", "WHERE") if origins else ()))
    shown = [
        (
            row["path"],
            _text(row["value"]) + (" (waits for a restart)" if row["waits_for_restart"] else ""),
            *((row["origin"], row["where"] or "-") if origins else ()),
        )
        for row in rows
    ]
    print_table([heads, *shown])


def _overrides(gateway: Gateway, as_json: bool) -> int:
    _, answer = gateway.ask("GET", "/admin/overrides")
    if as_json:
        print(json.dumps(answer))
        return DONE
    rows = [("SETTING", "NOW", "WITHOUT IT", "BY")]
    rows += [(each["name"], _text(each["value"]), _text(each["base"]), each["by"]) for each in answer["overrides"]]
    print_table(rows)
    for each in answer["overrides"]:
        if not each["in_force"]:
            print(f"{each['name']} is not in force: {each['problem']}", file=sys.stderr)
    print(f"version {answer['version']}; kept: {', '.join(str(old['version']) for old in answer['history']) or 'none'}")
    return DONE


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
