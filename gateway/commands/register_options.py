"""The options of `tidegate register`; apart, so that parsing a command line imports nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

Subparsers = argparse._SubParsersAction
DRAIN_S = 600.0
STOP_S = 30.0
_EXAMPLES = """examples:
  beside an engine, as a sidecar or a unit of its own:
    tidegate register --gateway http://10.0.0.1:7401 --pool chat --replica-url http://10.0.0.5:30000
  in its place, so that one signal drains the replica and then ends the engine:
    tidegate register --gateway http://10.0.0.1:7401 --pool chat --replica-url http://10.0.0.5:30000 --engine sglang \\
      -- python -m sglang.launch_server --model-path MODEL --host 0.0.0.0 --port 30000"""


def add_register(commands: Subparsers[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "register",
        help="tell gateways of a replica for as long as it answers, and take it out without loss",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gateway",
        action="append",
        default=[],
        metavar="URL",
        help="an admin listener, e.g. http://127.0.0.1:7401; repeatable, each is told. Default: as of --config",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the file a gateway here serves, to learn that")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="token of role registrar (or above), if it is in another file"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates (PEM) to trust, for https")
    parser.add_argument("--pool", required=True, metavar="POOL", help="the backend that it is a replica of")
    parser.add_argument(
        "--replica-url", required=True, metavar="URL", help="where gateways reach it, e.g. http://10.0.0.5:30000"
    )
    parser.add_argument("--name", default="", metavar="NAME", help="in the pool; default: made from the address")
    parser.add_argument("--region", metavar="REGION", help="where it runs, e.g. eu-west")
    parser.add_argument("--weight", type=_weight, metavar="WEIGHT", help="share of the load; others have 1")
    parser.add_argument("--engine", metavar="ENGINE", help="what it runs, e.g. sglang; default: the backend's engine")
    parser.add_argument("--upstream-model", metavar="MODEL", help="the name it knows the model by")
    parser.add_argument("--max-in-flight", type=int, metavar="N", help="requests it may work on at once")
    parser.add_argument("--kv-events", metavar="ADDRESS", help="where it publishes KV-cache events (ZeroMQ), or auto")
    parser.add_argument(
        "--ready-path",
        metavar="PATH",
        help="asked whether it is ready (200); default: as --engine is asked, or /health",
    )
    parser.add_argument(
        "--drain-s",
        type=_seconds,
        default=DRAIN_S,
        metavar="S",
        help=f"seconds for its requests before it is taken out (default {DRAIN_S:g})",
    )
    parser.add_argument(
        "--stop-s",
        type=_seconds,
        default=STOP_S,
        metavar="S",
        help=f"seconds for COMMAND to end after SIGTERM, before it is killed (default {STOP_S:g})",
    )
    parser.add_argument("--leave", action="store_true", help="take it out now: drain, remove, and no more")
    parser.add_argument("engine_command", nargs="*", metavar="-- COMMAND", help="the engine, to be run by this one")


def _weight(text: str) -> float:
    return _number(text, 1000, "weight")


def _seconds(text: str) -> float:
    return _number(text, 86400, "number of seconds")


def _number(text: str, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} above 0 and at most {most:g}")
    return number
