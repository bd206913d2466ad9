"""Options of `tidegate scaling`, without what carries it out."""

from __future__ import annotations

import argparse
import re

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def add_scaling(scaling: argparse.ArgumentParser, of_admin: argparse.ArgumentParser) -> None:
    """Show what is wanted; hold a number and let go of it. `of_admin` says where the gateway is."""
    actions = scaling.add_subparsers(dest="action", metavar="ACTION", required=False)
    show = actions.add_parser("show", parents=[of_admin], help="how many replicas pools should have, and why (default)")
    show.add_argument("pool", nargs="?", metavar="POOL", help="only this one, with all its changes")
    hold = actions.add_parser("hold", parents=[of_admin], help="keep to a number of replicas for a while")
    hold.add_argument("pool", metavar="POOL")
    hold.add_argument("count", type=_count, metavar="COUNT")
    hold.add_argument(
        "--for", dest="for_s", type=_duration, default=3600.0, metavar="TIME", help="90s, 30m, 1h (default), 24h"
    )
    release = actions.add_parser("release", parents=[of_admin], help="follow what is asked for again")
    release.add_argument("pool", metavar="POOL")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of replicas")
    return int(text)


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)([smh]?)", text)
    seconds = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 1h; at most 24h")
    return seconds
