"""Options of `tidegate limits`, `tidegate cost` and `tidegate accounts`, without what carries them out."""

from __future__ import annotations

import argparse

COST_BY = ("tenant", "model", "backend")
COST_WINDOWS = ("hour", "day", "week", "month")
KEY_ACTIONS = ("update", "disable", "enable", "rotate", "revoke")
TENANT_ACTIONS = ("put", "disable", "enable", "remove")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """What `tidegate limits` takes, besides where the gateway is."""
    parser.add_argument("--tenant", metavar="NAME", help="only this tenant's limits")
    parser.add_argument("--key", metavar="ID", help="everything that limits this key")
    parser.add_argument("--model", metavar="NAME", help="only limits of this model's use")
    parser.add_argument("--limit", type=int, default=30, metavar="N", help="holders shown, 1 to 500 (default 30)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="how many to leave out before them")


def add_cost(parser: argparse.ArgumentParser) -> None:
    """What `tidegate cost` takes, besides where the gateway is."""
    parser.add_argument("--by", choices=COST_BY, default="tenant", help="what to add up by (default tenant)")
    parser.add_argument("--window", choices=COST_WINDOWS, default="day", help="how far back (default day)")
    for name in COST_BY:
        parser.add_argument(f"--{name}", metavar="NAME", help=f"only of this {name}")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="names shown, 1 to 2000 (default 200)")
    parser.add_argument("--csv", action="store_true", help="as CSV")


def add_accounts(parser: argparse.ArgumentParser, of_admin: argparse.ArgumentParser) -> None:
    """The actions of `tidegate accounts`; each takes the options of `of_admin`, which say where the gateway is."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    keys = kinds.add_parser("keys", help="API keys").add_subparsers(dest="action", required=True, metavar="ACTION")
    tenants = kinds.add_parser("tenants", help="tenants").add_subparsers(dest="action", required=True, metavar="ACTION")
    for actions, name in ((keys, "ID"), (tenants, "NAME")):
        listed = actions.add_parser("list", parents=[of_admin], help="a page of them")
        listed.add_argument("--q", default="", metavar="TEXT", help="only with this in their name")
        listed.add_argument("--limit", type=int, default=100, metavar="N", help="at most as many, 1 to 1000")
        listed.add_argument("--after", default="", metavar=name, help="the last one of the page before")
        if actions is keys:
            listed.add_argument("--tenant", default="", metavar="NAME", help="only this tenant's")
            listed.add_argument("--state", default="", choices=("valid", "disabled", "expired"), help="only such")
        shown = actions.add_parser("show", parents=[of_admin], help="one of them")
        shown.add_argument("name", metavar=name)
    created = keys.add_parser("create", parents=[of_admin], help="issue a key; its text is shown once")
    created.add_argument("tenant", metavar="TENANT")
    _settable(created)
    for actions, names, name in ((keys, KEY_ACTIONS, "ID"), (tenants, TENANT_ACTIONS, "NAME")):
        for action in names:
            changed = actions.add_parser(action, parents=[of_admin], help=_HELP[action])
            changed.add_argument("name", metavar=name)
            changed.add_argument("--if-version", type=int, metavar="N", help="only if it has not changed since")
            if action in ("update", "put"):
                _settable(changed)
            if action == "rotate":
                changed.add_argument("--overlap", metavar="SPAN", help="how long the old key goes on, e.g. 24h")
    undone = kinds.add_parser("undo", parents=[of_admin], help="take back a change, by its entry in the audit")
    undone.add_argument("entry", metavar="ENTRY")


_HELP = {
    "update": "change what is named",
    "put": "change what is named, or make one",
    "disable": "let nobody in with it",
    "enable": "let it in again",
    "rotate": "issue another key in its place; shown once",
    "revoke": "end it, for good",
    "remove": "remove one that has no keys",
}


def _settable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field as the admin API has it, its value as JSON or plain text: limits.usd_per_day=5, "
        "models='[\"chat\"]', expires=30d, limits.usd_per_day=null",
    )
