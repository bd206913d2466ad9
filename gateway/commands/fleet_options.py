"""The options of `tidegate fleet`; apart, so that parsing a command line imports nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_fleet(parser: argparse.ArgumentParser, of_admin: argparse.ArgumentParser) -> None:
    """`of_admin`: where the gateway is, for what is asked of it."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="start the servers of this machine, keep them running, register them")
    up.add_argument("--config", type=Path, required=True, metavar="FILE", help="the gateway's configuration file")
    up.add_argument("--pool", action="append", default=[], metavar="POOL", help="only of this pool; repeatable")
    _agent(up)
    up.add_argument(
        "--gateway", action="append", default=[], metavar="URL", help="admin listener to register at; repeatable"
    )
    up.add_argument("--token-file", type=Path, metavar="FILE", help="a token with the role `registrar`, or the owner's")
    up.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust, for https gateways")
    up.add_argument("--host", metavar="ADDRESS", help="this machine's address, instead of launch.host")
    up.add_argument("--node-rank", type=_rank, metavar="R", help="which machine of several this is (launch.nodes)")
    up.add_argument("--log-dir", type=Path, metavar="DIR", help="where the servers' logs go, by pool")
    status = actions.add_parser("status", parents=[of_admin], help="show the servers of all machines")
    status.add_argument("--pool", metavar="POOL", help="only of this pool")
    roll = actions.add_parser("roll", parents=[of_admin], help="start all servers anew, one after the other")
    roll.add_argument("pool", nargs="?", metavar="POOL", help="only this pool's")
    down = actions.add_parser("down", help="have the agent of this machine drain and end its servers")
    down.add_argument("what", nargs="?", metavar="POOL[/NAME]", help="only these, and the agent goes on")
    _agent(down)
    down.add_argument("--no-wait", action="store_true", help="do not wait until they are gone")


def _agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agent", metavar="NAME", help="what this machine's agent is called (its host name)")


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5 and int(text) < 1024):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 1023")
    return int(text)
