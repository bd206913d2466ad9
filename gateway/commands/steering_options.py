"""Options of `tidegate weight`, `price`, `policy`, `reload` and `config`, without what carries them out."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Subparsers = argparse._SubParsersAction
RESET = "reset"
"""In place of a value: what file and environment say."""


def add_steering(
    commands: Subparsers[argparse.ArgumentParser],
    of_admin: argparse.ArgumentParser,
    replica: Callable[[str], tuple[str, str]],
) -> None:
    """The commands; each takes the options of `of_admin`, which say where the gateway is."""
    writes = argparse.ArgumentParser(add_help=False, parents=[of_admin])
    writes.add_argument("--if-version", type=int, metavar="N", help="only if nothing was changed since this version")
    weight = commands.add_parser("weight", parents=[writes], help="give a replica another share of the load")
    weight.add_argument("replica", type=replica, metavar="POOL/REPLICA")
    weight.add_argument("weight", type=_weight, metavar="WEIGHT", help=f"above 0, or {RESET}: as configured")
    price = commands.add_parser("price", parents=[writes], help="say what a model's tokens cost")
    price.add_argument("model", metavar="MODEL")
    for name in ("input", "cached-input", "cache-write", "output"):
        price.add_argument(f"--{name}", type=float, metavar="USD", help="per million tokens")
    price.add_argument("--reset", action="store_true", help="as configured")
    _policy(commands, of_admin, writes)
    commands.add_parser("reload", parents=[of_admin], help="have a running gateway read its configuration again")
    _config(commands, of_admin, writes)


def _policy(
    commands: Subparsers[argparse.ArgumentParser], of_admin: argparse.ArgumentParser, writes: argparse.ArgumentParser
) -> None:
    policy = commands.add_parser("policy", help="how replicas are chosen: show, try in the shadow, compare, switch")
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=[of_admin], help="each model's policy, and what its shadow has shown")
    switch = actions.add_parser("switch", parents=[writes], help="have another policy choose")
    switch.add_argument("model", metavar="MODEL")
    switch.add_argument("policy", metavar="POLICY", help=f"its name, or {RESET}: as configured")
    shadow = actions.add_parser("shadow", parents=[writes], help="have a second policy decide and send nothing")
    shadow.add_argument("model", metavar="MODEL")
    shadow.add_argument("policy", metavar="POLICY", help=f"its name; none; or {RESET}: as configured")
    shadow.add_argument("--per-s", type=float, metavar="N", help="requests a second that it is asked about, at most")
    compare = actions.add_parser("compare", parents=[of_admin], help="simulate policies on the last requests")
    compare.add_argument("model", metavar="MODEL")
    compare.add_argument("policies", nargs="*", metavar="POLICY")
    compare.add_argument("--requests", type=int, default=1000, metavar="N", help="how many (default 1000)")


def _config(
    commands: Subparsers[argparse.ArgumentParser], of_admin: argparse.ArgumentParser, writes: argparse.ArgumentParser
) -> None:
    config = commands.add_parser("config", help="what a running gateway runs with, and what was changed meanwhile")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", parents=[of_admin], help="the effective configuration, without secrets")
    show.add_argument("--origins", action="store_true", help="say where each value comes from")
    show.add_argument("--all", action="store_true", help="defaults too")
    show.add_argument("--search", default="", metavar="TEXT", help="only settings with this in their name")
    actions.add_parser("overrides", parents=[of_admin], help="what was changed while it runs, and former versions")
    put = actions.add_parser("set", parents=[writes], help="change a setting that may be changed while it runs")
    put.add_argument("path", metavar="PATH", help="such as backends.pool.replicas.pool-0.weight")
    put.add_argument("value", metavar="VALUE", help="as JSON; a word stands for itself")
    unset = actions.add_parser("unset", parents=[writes], help="take such a change back")
    unset.add_argument("path", metavar="PATH")
    restore = actions.add_parser("restore", parents=[writes], help="put a former version of the changes into force")
    restore.add_argument("version", type=int, metavar="VERSION")


def _weight(text: str) -> float | None:
    if text == RESET:
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {RESET}") from None
