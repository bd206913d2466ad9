"""Where to connect for an engine's KV events, and where not.

An engine may name its endpoint itself (SGLang does in `/server_info`). What it names is followed to the replica's own
host only: else whoever answers at a replica's address could make the gateway connect to any other. An operator's own
configuration is taken as it is.
"""

from __future__ import annotations

import ipaddress
import re

WILDCARDS = frozenset({"*", "0.0.0.0", "[::]", "::"})
_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]@;]+|::):(?P<port>[0-9]{1,5})\Z")
_MAX_IPC_PATH = 107
"""`sun_path` of Linux, without its terminator."""


class EndpointRefused(ValueError):
    """The endpoint is malformed, or leads where the gateway won't connect; the message says which and what to do."""


def resolve(endpoint: str, host: str | None, rank: int = 0, *, configured: bool = False) -> str:
    """The address to connect to for a data-parallel rank. Raises `EndpointRefused`.

    `host`: the replica's own; None when it is reached over a Unix socket, which means this machine.
    `configured`: the operator wrote the endpoint; else an engine named it.
    """
    if endpoint.startswith("ipc://"):
        return _ipc(endpoint, host, rank, configured)
    match = _TCP.match(endpoint)
    if match is None:
        raise EndpointRefused(f"{endpoint!r} is neither tcp://host:port nor ipc://path")
    named, port = match["host"], int(match["port"]) + rank
    if not 1 <= port <= 65535 or int(match["port"]) == 0:
        raise EndpointRefused(f"{endpoint!r} has no usable port for rank {rank}")
    own = "127.0.0.1" if host is None else host
    if named in WILDCARDS:
        named = own
    elif not configured and _plain(named) != _plain(own):
        raise EndpointRefused(
            f"{endpoint!r} is not on the replica's own host ({own}); to follow it, put it into the configuration"
        )
    return f"tcp://{_bracketed(named)}:{port}"


def _ipc(endpoint: str, host: str | None, rank: int, configured: bool) -> str:
    path = endpoint.removeprefix("ipc://")
    if not configured and not _is_this_machine(host):
        raise EndpointRefused(f"{endpoint!r} is a local socket, but the replica ({host}) runs on another machine")
    if not path or "\0" in path or len(path.encode()) > _MAX_IPC_PATH:
        raise EndpointRefused(f"{endpoint!r} has no usable path (1 to {_MAX_IPC_PATH} bytes)")
    if rank > 0:
        raise EndpointRefused(f"{endpoint!r} can't serve rank {rank}: engines number TCP ports only")
    return endpoint


def _is_this_machine(host: str | None) -> bool:
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(_plain(host)).is_loopback
    except ValueError:
        return False


def _plain(host: str) -> str:
    return host.strip("[]").lower().rstrip(".")


def _bracketed(host: str) -> str:
    plain = host.strip("[]")
    return f"[{plain}]" if ":" in plain else plain
