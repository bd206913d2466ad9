"""What `tidegate keys` and `tidegate tenants` take on the command line. `gateway.keys.commands` carries them out.

Imports nothing of the gateway: the parser is built for every command. Values are checked where they are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NONE = "none"
"""As an option's value: as if it had never been set."""
_TIMES = "30d, 12h, 2026-12-31 (its beginning, UTC) or 2026-12-31T18:00:00Z"

Commands = argparse._SubParsersAction  # which argparse has no public name for


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Both commands with their actions."""
    of_database = argparse.ArgumentParser(add_help=False)
    of_database.add_argument(
        "--config", type=Path, metavar="FILE", help="the file that names the database; default: environment, defaults"
    )
    of_database.add_argument("--json", action="store_true", help="report as JSON")
    _keys(commands.add_parser("keys", help="issue, show, rotate and end API keys"), of_database)
    _tenants(commands.add_parser("tenants", help="show tenants, and change their weights and limits"), of_database)


def _keys(parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[shared], help="issue a key, and print it: once")
    create.add_argument("--tenant", required=True, metavar="TENANT", help="whose it is")
    _rights(create)
    shown = actions.add_parser("list", parents=[shared], help="show all keys, without the keys themselves")
    shown.add_argument("--tenant", metavar="TENANT", help="only of this one")
    for action, text in (
        ("show", "show one key, without the key itself"),
        ("disable", "refuse a key from now on; enable takes that back"),
        ("enable", "let a disabled key in again"),
        ("revoke", "end a key for good"),
    ):
        actions.add_parser(action, parents=[shared], help=text).add_argument("id", metavar="ID")
    rotate = actions.add_parser(
        "rotate", parents=[shared], help="issue a new key with the same rights, end the old one"
    )
    rotate.add_argument("id", metavar="ID")
    rotate.add_argument(
        "--overlap", default="24h", metavar="SPAN", help="the old one's time left (default 24h; 0: none)"
    )
    expire = actions.add_parser("expire", parents=[shared], help="have a key end at some time")
    expire.add_argument("id", metavar="ID")
    expire.add_argument("--at", required=True, metavar="TIME", help=f"now, never, {_TIMES}")
    update = actions.add_parser("update", parents=[shared], help="change what a key may do; what is not named stays")
    update.add_argument("id", metavar="ID")
    _rights(update)
    _raise(actions.add_parser("raise", parents=[shared], help="change a key's limits for some time"), "id", "ID")


def _rights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", metavar="TEXT", help="your own word for it")
    parser.add_argument("--models", metavar="A,B", help="the only models it may use; '*' (default): all")
    parser.add_argument("--adapters", metavar="A,B", help="the only LoRA adapters it may use; '*' (default): all")
    parser.add_argument("--regions", metavar="A,B", help="the only regions it may be served in; '*' (default): any")
    parser.add_argument(
        "--class", dest="priority_class", metavar="CLASS", help="critical, standard, batch or sheddable"
    )
    parser.add_argument(
        "--deadline-ms", type=_whole_or_none, metavar="MS", help="its requests' deadline where they name none; or none"
    )
    parser.add_argument(
        "--max-output-tokens", type=_whole_or_none, metavar="N", help="the most that a request may ask for; or none"
    )
    parser.add_argument("--expires", metavar="TIME", help=f"never (default), {_TIMES}")
    parser.add_argument(
        "--capture-content",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the texts of its requests and answers into their traces; default: no",
    )
    _limit(parser, "--limit", "limits", "its own limit, such as requests_per_minute=60; none takes it away")
    parser.add_argument("--metadata", action="append", metavar="NAME=TEXT", help="your own notes, all of them")


def _tenants(parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", parents=[shared], help="show the tenants on record")
    shown = actions.add_parser("show", parents=[shared], help="show one tenant")
    shown.add_argument("tenant", metavar="TENANT")
    change = actions.add_parser("set", parents=[shared], help="change a tenant, or make it; what is not named stays")
    change.add_argument("tenant", metavar="TENANT")
    change.add_argument("--weight", type=float, metavar="N", help="share of a busy pool relative to other tenants'")
    _limit(change, "--limit", "limits", "for all of it together, such as usd_per_month=500; none takes it away")
    _limit(change, "--user-limit", "user_limits", "for each of its end users")
    change.add_argument(
        "--model-limit",
        dest="model_limits",
        action="append",
        metavar="MODEL:LIMIT=VALUE",
        help="for its use of one model",
    )
    change.add_argument("--metadata", action="append", metavar="NAME=TEXT", help="your own notes, all of them")
    state = change.add_mutually_exclusive_group()
    state.add_argument("--disable", dest="disabled", action="store_true", default=None, help="refuse all of its keys")
    state.add_argument("--enable", dest="disabled", action="store_false", default=None, help="let them in again")
    raised = actions.add_parser("raise", parents=[shared], help="change a tenant's limits for some time")
    _raise(raised, "tenant", "TENANT")


def _raise(parser: argparse.ArgumentParser, dest: str, metavar: str) -> None:
    parser.add_argument(dest, metavar=metavar)
    _limit(parser, "--limit", "limits", "in place of its own until then", required=True)
    parser.add_argument("--until", required=True, metavar="TIME", help=_TIMES)


def _limit(parser: argparse.ArgumentParser, flag: str, dest: str, text: str, *, required: bool = False) -> None:
    parser.add_argument(flag, dest=dest, action="append", metavar="LIMIT=VALUE", required=required, help=text)


def _whole_or_none(text: str) -> int | str:
    """A number, or the word `none`: argparse's own None means that the option was not given."""
    return NONE if text == NONE else _whole(text)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:12]) > 0 and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number above 0, nor none")
    return int(text)
