"""`tidegate replicas`, `drain`, `undrain`, `cordon`, `uncordon` and `adapters`: an operator's commands to a gateway.

They ask its admin listener with the owner token. Exit codes: 0 done; 1 not done (no gateway answers, it refuses, a
replica is not empty in time, an adapter is not loaded everywhere); 2 the command line, the configuration or the token
cannot be used.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
ANSWER_WITHIN_S = 20.0
"""Longer than the gateway takes over a worker that hangs."""
ADAPTER_WITHIN_S = 900.0
"""Engines take minutes over a large adapter, and changes of one pool wait for each other."""
POLL_S = 0.25
UNDRAINED_POLLS = 8
"""Looks at a replica that is not drained (any more) after which somebody must have given it work again."""
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Problem(Exception):
    """Why the command ends; the message is for people."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one command; returns the exit code."""
    try:
        gateway = find(options, environ)
        match options.command:
            case "replicas":
                return _replicas(gateway, options.json)
            case "drain":
                return _drain(gateway, *options.replica, wait_s=options.wait, force=options.force, as_json=options.json)
            case "undrain":
                return _undrain(gateway, *options.replica, as_json=options.json)
            case "cordon" | "uncordon":
                wanted = options.command == "cordon"
                return _cordon(gateway, *options.replica, wanted=wanted, as_json=options.json)
            case _ if options.action == "list":
                return _list_adapters(gateway, options.pool, options.json)
            case _:
                path = options.path if options.action == "load" else None
                return _change_adapter(gateway, options.pool, options.name, path, options.replica, options.json)
    except Problem as problem:
        if options.json:
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate {options.command}: {problem}", file=sys.stderr)
        return problem.exit_code


# -- where the gateway is


@dataclass(frozen=True)
class Gateway:
    """A running gateway's admin listener."""

    url: str
    token: str
    token_from: str
    """Where the token was found, for messages."""

    def ask(
        self,
        method: str,
        target: str,
        content: Any = None,
        timeout_s: float = ANSWER_WITHIN_S,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of an answer that is one. Raises `Problem` for everything else.

        `content` is JSON, as bytes or as what it stands for.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        body = content if content is None or isinstance(content, bytes) else json.dumps(content)
        try:
            connection.request(method, target, body, {"authorization": f"Bearer {self.token}", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise Problem(f"no gateway answers at {self.url}: {reason}. Is it running there?", FAILED) from error
        finally:
            connection.close()
        if response.status == 401:
            hint = "--token-file FILE or TIDEGATE_ADMIN__TOKEN gives another"
            raise Problem(f"{self.url} refuses the owner token from {self.token_from}; {hint}", UNUSABLE)
        try:
            answer = json.loads(text)
            refusal = answer.get("error")
        except (ValueError, AttributeError) as reason:
            raise Problem(f"{self.url} answers, and not as the admin listener of Tidegate", UNUSABLE) from reason
        if refusal is not None and "replicas" not in answer:
            raise _refusal(self.url, response.status, refusal)
        return response.status, answer


def _refusal(url: str, status: int, error: Any) -> Problem:
    said = str(error.get("message", "")) if isinstance(error, dict) else ""
    said = "\n".join(map(plain, said.splitlines()))
    code = error.get("code") if isinstance(error, dict) else None
    if code == "unknown_url":
        return Problem(f"{url} is not an admin listener of this version; its port is 7401 by default", UNUSABLE)
    if code == "last_replica":
        return Problem(said.replace("force=true", "--force"), FAILED)
    usable = status in (409, 412) or status >= 500
    return Problem(said or f"{url} answers {status}", FAILED if usable else UNUSABLE)


def find(options: argparse.Namespace, environ: Mapping[str, str]) -> Gateway:
    """The gateway that the options, the environment or a configuration name. Raises `Problem`.

    Only the `admin` section is looked at: a gateway that refused a bad new file still runs, and runs where it did.
    """
    from pydantic import ValidationError

    from gateway.config import Admin, Settings
    from gateway.config.environment import apply_environment
    from gateway.config.lines import read_document
    from gateway.config.problems import Finding
    from gateway.config.secrets import resolve, secret_places

    document = None if options.config is None else read_document(options.config)
    if document is not None and not document.readable:
        raise Problem("; ".join(str(problem) for problem in document.problems), UNUSABLE)
    data: dict[str, Any] = {} if document is None else {"admin": document.data.get("admin") or {}}
    relevant = {name: text for name, text in environ.items() if name.upper().startswith("TIDEGATE_ADMIN")}
    overrides = apply_environment(Settings, data, relevant, "TIDEGATE_", "__")
    if isinstance(data.get("admin"), dict):  # whoever gives a command need not have the secrets of these
        data["admin"] = {name: value for name, value in data["admin"].items() if name not in ("tokens", "oidc")}
    findings: list[Finding] = []
    if options.token_file is None:
        folder = Path() if options.config is None else options.config.parent
        findings = resolve(list(secret_places(Settings, data)), environ, folder, overrides.from_environment)
    elif isinstance(data.get("admin"), dict):
        data["admin"].pop("token", None)
    try:
        admin = Admin.model_validate(data.get("admin", {}))
    except ValidationError as error:
        raise Problem(f"the admin section cannot be used: {error.error_count()} problems", UNUSABLE) from error
    if findings:
        said = "; ".join(f"{finding.message} ({finding.hint})" for finding in findings)
        raise Problem(f"admin.token: {said}", UNUSABLE)
    url = _checked(options.url) if options.url is not None else _url(admin.enabled, admin.host, admin.port)
    if admin.token is not None:
        return Gateway(url, admin.token.get_secret_value(), "admin.token")
    return Gateway(url, *_token(options.token_file, environ))


def _url(enabled: bool, host: str, port: int) -> str:
    if not enabled:
        raise Problem("admin.enabled is false: this gateway has no admin listener", UNUSABLE)
    if port == 0:
        raise Problem("admin.port is 0, so the port is not known; give --url (the log has it)", UNUSABLE)
    host = _WILDCARDS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _checked(url: str) -> str:
    problem = Problem(f"{url} is not a URL such as http://127.0.0.1:7401", UNUSABLE)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise problem from error
    if not usable or parts.path not in ("", "/") or parts.query or parts.username:
        raise problem
    return url.rstrip("/")


def _token(file: Path | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """The token and where it is from: this file, or the one a gateway of this user has made."""
    from gateway.owner import StateError, kept_token

    if file is not None:
        try:
            text = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise Problem(f"--token-file {file}: {reason}", UNUSABLE) from error
        if not text or not text.isprintable():
            raise Problem(f"--token-file {file}: it does not hold one token", UNUSABLE)
        return text, str(file)
    try:
        token, path = kept_token(environ)
    except StateError as error:
        raise Problem(f"there is no owner token: {error}; give --token-file FILE", UNUSABLE) from error
    if token is None:
        raise Problem(
            f"there is no owner token in {path}: a gateway makes it when it first starts as this user, so start that "
            "first; or give --token-file FILE, TIDEGATE_ADMIN__TOKEN, or --config FILE with admin.token",
            UNUSABLE,
        )
    return token.get_secret_value(), str(path)


# -- replicas


def _replicas(gateway: Gateway, as_json: bool) -> int:
    _, answer = gateway.ask("GET", "/admin/replicas")
    if as_json:
        print(json.dumps(answer))
        return DONE
    rows = [("REPLICA", "STATE", "IN FLIGHT", "ENGINE", "RUNNING", "WAITING", "KV", "ADAPTERS", "URL")]
    for each in answer["replicas"]:
        load = each["load"] or {}
        kv_use = load.get("kv_use")
        rows.append(
            (
                f"{each['pool']}/{each['replica']}",
                state_of(each),
                str(each["in_flight"]),
                each["engine"],
                _or_dash(load.get("running")),
                _or_dash(load.get("waiting")),
                "-" if kv_use is None else f"{kv_use:.0%}",
                ",".join(adapter["name"] for adapter in each["adapters"] if adapter["resident"]) or "-",
                each["url"],
            )
        )
    print_table(rows)
    for index in answer["silent_workers"]:
        print(f"worker {index} does not answer; what it does is not counted here", file=sys.stderr)
    return DONE


def state_of(replica: Mapping[str, Any]) -> str:
    """One or two words on a replica."""
    if replica["draining"]:
        return "drained, empty" if replica["empty"] else "draining"
    if replica["unavailable_reason"] is not None:
        return str(replica["unavailable_reason"]) + (" at some workers" if _available_somewhere(replica) else "")
    return str(replica["health"])


def _available_somewhere(replica: Mapping[str, Any]) -> bool:
    return any(worker["available"] for worker in replica["workers"])


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of one length, the first of them the heads of the columns."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plain(text: str) -> str:
    """On one line; what a terminal would obey is shown instead. Engines and other operators have a say in texts.

    >>> plain("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


# -- drain


def _drain(gateway: Gateway, pool: str, replica: str, *, wait_s: float | None, force: bool, as_json: bool) -> int:
    target = _target(pool, replica)
    _, state = gateway.ask("POST", f"{target}/drain" + ("?force=true" if force else ""))
    exit_code = DONE if state["draining"] else FAILED
    if wait_s is not None:
        try:
            exit_code, state = _wait(gateway, target, state, wait_s)
        except KeyboardInterrupt:
            exit_code = INTERRUPTED
    if as_json:
        names = ("pool", "replica", "draining", "in_flight", "empty", "silent_workers")
        print(json.dumps({name: state[name] for name in names}))
    else:
        late = ""
        if exit_code == FAILED and wait_s is not None and state["draining"]:
            late = f"is not empty after {wait_s:g} s; it "
        print(f"{pool}/{replica} {late}{_drained(state)}", file=sys.stdout if exit_code == DONE else sys.stderr)
    return exit_code


def _drained(state: Mapping[str, Any]) -> str:
    """What has become of a replica that was to be drained, after its name."""
    silent = state["silent_workers"]
    unknown = f", and at workers that do not answer ({', '.join(map(str, silent))})" if silent else ""
    if not state["draining"]:
        return "is not known to be drained at every worker; somebody else may have given it work again"
    if state["empty"]:
        return "gets no new work, and is empty"
    return f"gets no new work; requests under way there: {state['in_flight']}{unknown}"


def _wait(gateway: Gateway, target: str, state: dict[str, Any], wait_s: float) -> tuple[int, dict[str, Any]]:
    """Until the replica is empty, or the time is over, or somebody has given it work again."""
    end = time.monotonic() + wait_s
    undrained = 0
    while not (state["draining"] and state["empty"]):
        # Not at the first sight of it: a worker that was just started has yet to hear of the drain.
        undrained = 0 if state["draining"] else undrained + 1
        if undrained > UNDRAINED_POLLS:
            return FAILED, state
        left_s = end - time.monotonic()
        if left_s <= 0:
            return FAILED, state
        time.sleep(min(POLL_S, left_s))
        _, state = gateway.ask("GET", target, timeout_s=ANSWER_WITHIN_S if math.isinf(left_s) else left_s + 5.0)
    return DONE, state


def _undrain(gateway: Gateway, pool: str, replica: str, *, as_json: bool) -> int:
    _, state = gateway.ask("POST", f"{_target(pool, replica)}/undrain")
    if as_json:
        print(json.dumps(state))
    elif state["draining"]:
        print(f"the order is given, and not all workers have heard of it yet: {pool}/{replica}", file=sys.stderr)
    else:
        print(f"{pool}/{replica} gets work again")
    return FAILED if state["draining"] else DONE


def _cordon(gateway: Gateway, pool: str, replica: str, *, wanted: bool, as_json: bool) -> int:
    _, state = gateway.ask("POST", f"{_target(pool, replica)}/{'cordon' if wanted else 'uncordon'}")
    done = state["cordoned"] == wanted
    if as_json:
        print(json.dumps(state))
    elif not done:
        print(f"the order is given, and not all workers have heard of it yet: {pool}/{replica}", file=sys.stderr)
    elif wanted:
        print(f"{pool}/{replica} gets no new prompts; requests under way there: {state['in_flight']}")
    else:
        print(f"{pool}/{replica} gets new prompts again")
    return DONE if done else FAILED


def _target(pool: str, replica: str) -> str:
    return f"/admin/replicas/{quote(pool, safe='')}/{quote(replica, safe='')}"


# -- adapters


def _list_adapters(gateway: Gateway, pool: str | None, as_json: bool) -> int:
    _, answer = gateway.ask("GET", "/admin/adapters" + ("" if pool is None else "?" + urlencode({"pool": pool})))
    if as_json:
        print(json.dumps(answer))
        return DONE
    rows = [("POOL", "ADAPTER", "REPLICAS", "CONFIGURED", "PATH")]
    rows += [
        (
            each["pool"],
            each["name"],
            ",".join(each["replicas"]) or "-",
            "yes" if each["configured"] else "no",
            each["path"] or "-",
        )
        for each in answer["adapters"]
    ]
    print_table(rows)
    for each in answer["lacking"]:
        print(f"{each['pool']}/{each['replica']} does not list adapters: {plain(each['reason'])}", file=sys.stderr)
    return DONE


def _change_adapter(
    gateway: Gateway, pool: str, name: str, path: str | None, replica: str | None, as_json: bool
) -> int:
    if path is not None:
        content = {"pool": pool, "name": name, "path": path, "replica": replica}
        _, answer = gateway.ask("POST", "/admin/adapters", content, ADAPTER_WITHIN_S)
    else:
        target = f"/admin/adapters/{quote(pool, safe='')}/{quote(name)}"
        target += "" if replica is None else "?" + urlencode({"replica": replica})
        _, answer = gateway.ask("DELETE", target, timeout_s=ADAPTER_WITHIN_S)
    if as_json:
        print(json.dumps(answer))
    else:
        verb = "unloaded" if path is None else "loaded"
        for each in answer["replicas"]:
            what = verb if each["changed"] else f"{'ok' if each['ok'] else f'not {verb}'}: {each['reason']}"
            print(f"{pool}/{each['replica']}  {plain(what)}", file=sys.stdout if each["ok"] else sys.stderr)
        if "note" in answer:
            print(f"note: {answer['note']}", file=sys.stderr)
    return DONE if answer["ok"] else FAILED
