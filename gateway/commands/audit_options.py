"""The options of `tidegate audit`, apart from what carries it out: other commands are to be quick."""

from __future__ import annotations

import argparse


def add_audit(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--limit", type=_count, default=50, metavar="N", help="the newest N entries (default 50)")
    for name, text in (
        ("actor", "of actors with this in their name"),
        ("action", "of actions that begin with this, such as key. or replica.drain"),
        ("object", "of objects with this in their name"),
    ):
        parser.add_argument(f"--{name}", default="", metavar="TEXT", help=f"only {text}")
    parser.add_argument(
        "--verify", action="store_true", help="say whether entries were taken out; exit code 1 if some were"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 100_000 and len(text) < 9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100000")
    return int(text)
