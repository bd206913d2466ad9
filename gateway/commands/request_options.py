"""Options of `tidegate requests`, without what carries it out."""

from __future__ import annotations

import argparse

FILTERS = {
    "tenant": ("NAME", "only of this tenant"),
    "key": ("ID", "only with the key of this id"),
    "model": ("NAME", "only for this model"),
    "replica": ("REPLICA", "only those that this replica was asked for; POOL/REPLICA where names are not unique"),
    "outcome": ("OUTCOME", "only with this outcome, such as upstream_error"),
    "status": ("STATUS", "only with this HTTP status, such as 503 or 5xx"),
    "since": ("UNIX_S", "only those that began at this time or later"),
    "until": ("UNIX_S", "only those that began before this time"),
    "slower-than-ms": ("MS", "only those that took longer"),
    "before": ("CURSOR", "only those settled before this page's `next`"),
}


def add_requests(parser: argparse.ArgumentParser, of_admin: argparse.ArgumentParser) -> None:
    """The actions of `tidegate requests`; each takes the options of `of_admin`, which say where the gateway is."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", parents=[of_admin], help="those under way, and the last ones that were settled")
    which = listed.add_mutually_exclusive_group()
    which.add_argument("--live", action="store_const", const="true", dest="live", help="only those under way")
    which.add_argument("--settled", action="store_const", const="false", dest="live", help="only settled ones")
    for name, (metavar, text) in FILTERS.items():
        listed.add_argument(f"--{name}", metavar=metavar, help=text)
    listed.add_argument("--limit", default="30", metavar="N", help="settled ones shown, 1 to 1000 (default 30)")
    shown = actions.add_parser("show", parents=[of_admin], help="one: what happened when, and why it went there")
    shown.add_argument("id", metavar="ID", help="as in the header x-request-id")
    killed = actions.add_parser("kill", parents=[of_admin], help="end one that is under way")
    killed.add_argument("id", metavar="ID", help="as in the header x-request-id")
