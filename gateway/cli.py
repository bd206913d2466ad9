"""The `tidegate` command.

Exit codes: 0 done, or stopped by a signal; 1 it could not be done (a gateway that is not ready, a file that cannot be
written); 2 the configuration or the command line cannot be used, an address that is taken included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gateway.commands.account_options import add_accounts, add_cost, add_limits
from gateway.commands.audit_options import add_audit
from gateway.commands.fleet_options import add_fleet
from gateway.commands.overview_options import add_overview
from gateway.commands.plan_options import add_plan
from gateway.commands.register_options import add_register
from gateway.commands.request_options import add_requests
from gateway.commands.scaling_options import add_scaling
from gateway.commands.steering_options import add_steering
from gateway.keys.options import add_commands
from gateway.logs import LOG_FORMATS, LOG_LEVELS, configure
from gateway.version import tidegate_version

if TYPE_CHECKING:  # imported where it is used: `health` and `version` are to be quick
    from gateway.config import Settings

FAILED = 1
USAGE_ERROR = 2
MAX_WORKERS = 64

_NOTHING_TO_SERVE = """tidegate serve: no models are configured. Either
  give a configuration file:     tidegate serve --config FILE     (start from configs/minimal.yaml)
  or set them in the environment: TIDEGATE_MODELS='{"chat": {"backend": "pool"}}'
                                  TIDEGATE_BACKENDS='{"pool": {"engine": "sglang", "replicas": [{"url": "http://..."}]}}'
  or see a small real model run:  tidegate demo"""

_OPERATORS = {
    "replicas": "gateway.operate",
    "drain": "gateway.operate",
    "undrain": "gateway.operate",
    "cordon": "gateway.operate",
    "uncordon": "gateway.operate",
    "adapters": "gateway.operate",
    "explain": "gateway.explain_command",
    "overview": "gateway.commands.overview",
    "audit": "gateway.commands.audit",
    "requests": "gateway.commands.requests",
    "limits": "gateway.commands.limits",
    "cost": "gateway.commands.cost",
    "scaling": "gateway.commands.scaling",
    "register": "gateway.commands.register",
    "accounts": "gateway.commands.accounts",
    "weight": "gateway.commands.steering",
    "price": "gateway.commands.steering",
    "policy": "gateway.commands.steering",
    "reload": "gateway.commands.steering",
    "config": "gateway.commands.steering",
    "fleet": "gateway.commands.fleet",
}
"""Commands that ask the admin listener, and the module whose `run` does it; imported when it is needed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        from gateway import demo

        return demo.run(arguments[1:], os.environ, sys.stdout)
    if arguments[:1] == ["simulate"]:
        return _simulate(arguments[1:])
    options = _parser().parse_args(arguments)
    match options.command:
        case "version":
            return _version(options.json)
        case "schema":
            return _schema()
        case "openapi":
            return _openapi(options.admin)
        case "check":
            return _check(options, _settings_environ(os.environ))
        case "health":
            return _health(options, os.environ)
        case "plan":
            from gateway.commands import plan

            return plan.run(options, os.environ)
        case command if command in _OPERATORS:
            module = importlib.import_module(_OPERATORS[command])
            code: int = module.run(options, os.environ)
            return code
        case "keys" | "tenants":
            from gateway.keys import commands

            return commands.run(options, _settings_environ(os.environ))
        case _ if options.worker_fds is not None:
            from gateway.worker_process import serve_supervised

            configure(options.log_format, options.log_level, options.worker_index)
            return serve_supervised(options.worker_index, options.worker_fds)
        case _:
            return _serve(options, os.environ)


class _Parser(argparse.ArgumentParser):
    """argparse repeats what it cannot use: not where that is a key."""

    def error(self, message: str) -> NoReturn:
        from gateway.keys.format import hidden

        super().error(hidden(message))


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="tidegate", description="Gateway and smart router for model servers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _serve_options(commands.add_parser("serve", help="serve the models of a configuration file"))
    check = commands.add_parser("check", help="check a configuration file and say what is wrong with it")
    check.add_argument("file", type=Path)
    check.add_argument("--json", action="store_true", help="report as JSON")
    check.add_argument("--origins", action="store_true", help="say where each value comes from that is no default")
    health = commands.add_parser("health", help="ask a running gateway whether it is ready; exit code 0 or 1")
    where = health.add_mutually_exclusive_group()
    where.add_argument("--url", help="where it is, e.g. http://127.0.0.1:7400 or http+unix://%%2Frun%%2Ftidegate.sock")
    where.add_argument("--config", type=Path, metavar="FILE", help="the file it serves, to learn where it is")
    health.add_argument("--timeout", type=_seconds, default=3.0, metavar="S", help="seconds to wait (default 3)")
    _operators_options(commands)
    add_commands(commands)
    add_plan(commands.add_parser("plan", help="say what a model needs on which GPUs, and how to start it"))
    commands.add_parser("schema", help="print the JSON Schema of the configuration file")
    openapi = commands.add_parser("openapi", help="print the OpenAPI document of the API that clients use")
    openapi.add_argument("--admin", action="store_true", help="of the one that operators use instead")
    shown = commands.add_parser("version", help="print the version")
    shown.add_argument("--json", action="store_true", help="report as JSON")
    # Only listed here: these two read their own options, and `tidegate demo --help` prints them.
    commands.add_parser("demo", help="run two small real models and the gateway in front of them")
    commands.add_parser("simulate", help="compare routing policies on a simulated fleet")
    return parser


def _serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--config", type=Path, metavar="FILE", help="configuration file (YAML)")
    serve.add_argument("--workers", type=_workers, default=1, metavar="N", help="worker processes (default 1)")
    serve.add_argument("--uds", metavar="PATH", help="listen on this Unix socket instead of a port")
    serve.add_argument("--host", help="instead of server.host")
    serve.add_argument("--port", type=int, help="instead of server.port")
    serve.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="auto",
        help="text, json lines, or auto (default): text on a terminal, else JSON",
    )
    serve.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="what is logged (default info)")
    # How the supervisor starts its workers.
    serve.add_argument("--worker-index", type=int, default=0, help=argparse.SUPPRESS)
    serve.add_argument("--worker-fds", type=_descriptors, help=argparse.SUPPRESS)


def _operators_options(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that `gateway.operate` carries out."""
    of_admin = argparse.ArgumentParser(add_help=False)
    where = of_admin.add_mutually_exclusive_group()
    where.add_argument("--url", help="where its admin listener is, e.g. http://127.0.0.1:7401")
    where.add_argument("--config", type=Path, metavar="FILE", help="the file it serves, to learn where that is")
    of_admin.add_argument("--token-file", type=Path, metavar="FILE", help="the owner token, if it is in another file")
    of_admin.add_argument("--json", action="store_true", help="report as JSON")
    commands.add_parser("replicas", parents=[of_admin], help="show the replicas of a running gateway")
    drain = commands.add_parser("drain", parents=[of_admin], help="give a replica no new work")
    drain.add_argument("replica", type=_replica, metavar="POOL/REPLICA")
    drain.add_argument(
        "--wait", nargs="?", type=_seconds, const=float("inf"), metavar="S", help="until it is empty, at most S seconds"
    )
    drain.add_argument("--force", action="store_true", help="also if it is the last of its pool that takes work")
    undrain = commands.add_parser("undrain", parents=[of_admin], help="give a drained replica work again")
    undrain.add_argument("replica", type=_replica, metavar="POOL/REPLICA")
    for name, text in (("cordon", "give a replica no new prompts"), ("uncordon", "give it new prompts again")):
        cordon = commands.add_parser(name, parents=[of_admin], help=text)
        cordon.add_argument("replica", type=_replica, metavar="POOL/REPLICA")
    _explain_options(commands.add_parser("explain", parents=[of_admin], help="show where a request would go, and why"))
    add_overview(commands.add_parser("overview", parents=[of_admin], help="show if all is well, and where it is not"))
    add_limits(commands.add_parser("limits", parents=[of_admin], help="show limits and what is left of them"))
    add_cost(commands.add_parser("cost", parents=[of_admin], help="show what was used and what it cost"))
    scaling = commands.add_parser(
        "scaling", parents=[of_admin], help="show how many replicas pools should have, and why"
    )
    add_scaling(scaling, of_admin)
    add_accounts(commands.add_parser("accounts", help="keys, tenants, budgets of a running gateway"), of_admin)
    add_requests(commands.add_parser("requests", help="show requests under way and past ones, and end one"), of_admin)
    add_steering(commands, of_admin, _replica)
    add_register(commands)
    add_audit(commands.add_parser("audit", parents=[of_admin], help="show who did what, and whether that is all"))
    add_fleet(commands.add_parser("fleet", help="launch model servers on this machine and keep them running"), of_admin)
    adapters = commands.add_parser("adapters", help="show, load and unload LoRA adapters")
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    shown = actions.add_parser("list", parents=[of_admin], help="show what the replicas hold")
    shown.add_argument("--pool", metavar="POOL", help="only of this pool")
    for action, text in (("load", "load one while the engines run"), ("unload", "drop one")):
        changed = actions.add_parser(action, parents=[of_admin], help=text)
        changed.add_argument("pool", metavar="POOL")
        changed.add_argument("name", metavar="NAME")
        if action == "load":
            changed.add_argument("path", metavar="PATH", help="path or hub name that the engines can read")
        changed.add_argument("--replica", metavar="REPLICA", help="only at this one")


def _explain_options(explain: argparse.ArgumentParser) -> None:
    """For `gateway.explain_command`."""
    explain.add_argument("request", nargs="?", metavar="FILE", help="an OpenAI request's body, as JSON; - reads it")
    explain.add_argument("--path", metavar="PATH", help="where it would be sent (default /v1/chat/completions)")
    caller = explain.add_mutually_exclusive_group()
    caller.add_argument("--key", metavar="ID", help="sent with the API key of this id")
    caller.add_argument("--tenant", metavar="NAME", help="sent by this tenant, with a key that forbids nothing")
    explain.add_argument(
        "--header", action="append", default=[], type=_header, metavar="'NAME: VALUE'", help="sent with it; repeatable"
    )
    explain.add_argument("--replay", metavar="FILE", help="decide again from what --json printed; no gateway is asked")
    explain.add_argument("--policy", metavar="NAME", help="with --replay: by this policy")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip() and value.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME: VALUE")
    return name.strip().lower(), value.strip()


def _replica(text: str) -> tuple[str, str]:
    pool, slash, replica = text.partition("/")
    if not (pool and slash and replica) or "/" in replica:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form POOL/REPLICA; tidegate replicas lists them")
    return pool, replica


def _workers(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WORKERS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_WORKERS}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return seconds


def _descriptors(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _settings_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the one `TIDEGATE_` variable that is not a setting."""
    from gateway.owner import STATE_DIR

    return {name: value for name, value in environ.items() if name != STATE_DIR}


def _simulate(arguments: Sequence[str]) -> int:
    """The simulator stands above the gateway and needs nothing of it; only the name of the command is here."""
    try:
        from loadtests.simulator import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "loadtests":
            raise
        print(
            "tidegate simulate: the simulator is not installed here. It is in the wheel and in the source tree, not in"
            " the container image.",
            file=sys.stderr,
        )
        return FAILED
    return command.main(arguments)


def _version(as_json: bool) -> int:
    if as_json:
        print(json.dumps({"version": tidegate_version(), "python": platform.python_version()}))
    else:
        print(f"tidegate {tidegate_version()} (Python {platform.python_version()})")
    return 0


def _schema() -> int:
    from gateway.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _openapi(admin: bool) -> int:
    if admin:
        from gateway.admin.offline import offline_document as document
    else:
        from gateway.openapi import document

    print(json.dumps(document(), indent=2))
    return 0


def _check(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gateway.config import ConfigError, read_all, require_models

    try:
        reading = read_all(options.file, environ)
        require_models(reading.settings, str(options.file))
    except ConfigError as error:
        if options.json:
            problems = [
                {"file": p.file, "line": p.line, "path": p.path, "message": p.message, "hint": p.hint}
                for p in error.problems
            ]
            print(json.dumps({"ok": False, "problems": problems}))
        else:
            print(error, file=sys.stderr)
        return USAGE_ERROR
    settings = reading.settings
    shown: dict[str, Any] = {"models": sorted(settings.models), "backends": sorted(settings.backends)}
    if not options.json:
        print(f"{options.file}: ok: {len(settings.models)} models, {len(settings.backends)} backends")
    if options.origins:
        from gateway.commands.steering import print_settings
        from gateway.config.origins import rows_of

        shown["settings"] = [row.shown() for row in rows_of(reading) if row.origin != "default"]
        if not options.json:
            print_settings(shown["settings"], origins=True)
    if options.json:
        print(json.dumps({"ok": True, **shown}))
    return 0


def _health(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Exit code 1 for everything that is not a yes: a container's health check knows no other."""
    from gateway import health

    try:
        url = options.url or health.configured_url(options.config, environ)
        ready, text = health.check(url, options.timeout)
    except health.AddressError as error:
        ready, text = False, str(error)
    print(text, file=sys.stdout if ready else sys.stderr)
    return 0 if ready else FAILED


def _serve(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gateway import serve
    from gateway.admission.records import AdmissionError
    from gateway.config import ConfigError, load, require_database_folder, require_models, require_shared_store
    from gateway.listener import BindError
    from gateway.owner import kept_state_directory
    from gateway.steering.files import override_file
    from gateway.steering.reading import ConfigReader

    configure(options.log_format, options.log_level)
    settings_environ = _settings_environ(environ)
    overrides = {
        f"server.{name}": str(value)
        for name in ("host", "port", "uds")
        if (value := getattr(options, name)) is not None
    }

    def check(settings: Settings) -> None:
        require_models(settings, str(options.config or "environment"))
        if options.workers > 1:
            require_shared_store(settings, str(options.config or "environment"), options.workers)

    kept = override_file(kept_state_directory(environ), options.config)
    read = ConfigReader(options.config, settings_environ, overrides, check=check, file=kept)
    try:
        if options.config is None and not load(None, settings_environ, overrides).models:
            print(_NOTHING_TO_SERVE, file=sys.stderr)
            return USAGE_ERROR
        worker_options = ["--log-format", options.log_format, "--log-level", options.log_level]
        settings = read()
        require_database_folder(settings, str(options.config or "environment"))
        return serve.run(settings, read, environ, workers=options.workers, worker_options=worker_options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except (BindError, AdmissionError) as error:
        print(f"tidegate serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"tidegate serve: the operating system refused: {error}", file=sys.stderr)
    return FAILED
