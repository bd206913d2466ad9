"""The options of `tidegate overview`; apart, so that parsing a command line imports nothing else."""

from __future__ import annotations

import argparse


def add_overview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", choices=("live", "hour", "day", "week"), default="hour", help="what the figures are of (hour)"
    )
    parser.add_argument("--watch", action="store_true", help="show it again every two seconds, until Ctrl-C")
