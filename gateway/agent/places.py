"""What this machine has for servers: names, ports and GPUs, shared out among the pools."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.agent.specs import gpus_of_server
from gateway.config import Backend, Settings
from gateway.config.launch import Launch

MOST: Final = 256
"""Servers of one pool on one machine, as `launch.count` allows."""
_HIGHEST_PORT: Final = 65535
_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


class NoRoom(Exception):
    """The configuration asks for more than this machine has; the message says of what."""


@dataclass(frozen=True, slots=True)
class Room:
    """Where the servers of one pool on this machine are."""

    agent: str
    pool: str
    host: str
    port: int
    port_step: int
    capacity: int
    """Places, numbered from 0."""
    per_server: int | None
    """GPUs of each; None or 0: nobody says which."""
    gpus: tuple[int, ...]
    """Those of the pool, one place after the other."""

    def name(self, place: int) -> str:
        """In the pool, and the same after a restart."""
        return f"{self.agent}-{self.pool[:34]}-{place}"  # at most 80 characters, as replicas' names are

    def port_of(self, place: int) -> int:
        return self.port + self.port_step * place

    def gpus_of(self, place: int) -> tuple[int, ...] | None:
        if not self.per_server:
            return None
        return self.gpus[place * self.per_server :][: self.per_server]

    def url(self, place: int) -> str:
        """Where the gateway reaches it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port_of(place)}"


def agent_name(given: str | None, hostname: str) -> str:
    """What this agent is called: as given, else as the machine, without its domain."""
    name = given if given is not None else re.sub(r"[^A-Za-z0-9-]", "-", hostname.partition(".")[0]).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", name):
        raise NoRoom(
            f"the agent cannot be called {name!r}: use at most 40 letters, digits, dots, dashes and underscores, the "
            "first a letter or digit, in --agent"
        )
    return name


def rooms(
    settings: Settings, agent: str, gpus: tuple[int, ...] | None, host: str | None = None, only: tuple[str, ...] = ()
) -> dict[str, Room]:
    """The pools that have `launch`, with their shares; `only`: these of them. Raises `NoRoom`.

    `gpus`: numbers of those that can be used; None: unknown. Pools get theirs one after the other, in the order of the
    configuration, each as many as its largest number of servers needs, so that a pool's share does not depend on what
    others do; the last one has what is left. `host`: instead of `launch.host`.
    """
    found: dict[str, Room] = {}
    taken = 0
    launched = {name: backend for name, backend in settings.backends.items() if backend.launch is not None}
    last = next(reversed(launched), None)
    for name in only:
        if name not in settings.backends:
            raise NoRoom(f"there is no pool {name} under backends")
        if name not in launched:
            raise NoRoom(f"backends.{name} has no `launch`, so that it is not known how its servers are started")
    for pool, backend in launched.items():
        assert backend.launch is not None
        room = _room(agent, pool, backend, backend.launch, gpus, taken, host, pool == last)
        if room.per_server:
            taken += len(room.gpus)
        if not only or pool in only:
            found[pool] = room
    return found


def _room(
    agent: str,
    pool: str,
    backend: Backend,
    launch: Launch,
    gpus: tuple[int, ...] | None,
    taken: int,
    host: str | None,
    last: bool,
) -> Room:
    """`taken`: GPUs of the pools before. The `last` pool has all that are left."""
    grows = backend.scaling is not None and backend.scaling.provider == "local"
    most = max(launch.count, backend.scaling.max) if grows and backend.scaling is not None else launch.count
    per_server = launch.gpus_per_server
    if per_server is None and most > 1 and gpus is not None:
        per_server = gpus_of_server(launch)
    places = min(MOST, (_HIGHEST_PORT - launch.port) // launch.port_step + 1)
    share: tuple[int, ...] = ()
    if not per_server or gpus is None:
        if per_server:  # asked for, and nobody can say what there is: counted from 0
            share = tuple(range(taken, taken + per_server * most))
        places = min(places, max(1, most))
    else:
        left = gpus[taken:]
        places = min(places, len(left) // per_server)
        if not last:
            places = min(places, max(1, most))
        if places < launch.count:
            raise NoRoom(
                f"backends.{pool}.launch: {launch.count} servers with {per_server} GPUs each need "
                f"{launch.count * per_server}, and {len(left)} of this machine's {len(gpus)} are left"
            )
        share = left[: per_server * places]
    if places < launch.count:
        raise NoRoom(f"backends.{pool}.launch: {launch.count} servers do not fit between port {launch.port} and 65535")
    address = host or launch.host
    if _everywhere(address):
        raise NoRoom(
            f"backends.{pool}.launch.host: {address} is no address that the gateway can reach; write this machine's "
            "own, or give it as --host"
        )
    return Room(agent, pool, address, launch.port, launch.port_step, places, per_server, share)


def _everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


# -- which GPUs there are


def visible_gpus(environ: Mapping[str, str], *, ask: tuple[str, ...] = ("nvidia-smi", "-L")) -> tuple[int, ...] | None:
    """The numbers of the GPUs that may be used; None: nobody says. Raises `NoRoom`. Asks `nvidia-smi`, which takes
    about a second."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if (text := environ.get(name)) is not None:
            words = [word.strip() for word in text.split(",") if word.strip()]
            if not all(word.isdecimal() for word in words):
                raise NoRoom(f"{name} names GPUs otherwise than by number, so that they cannot be shared out: {text}")
            return tuple(int(word) for word in words)
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return _amd_gpus(_KFD_NODES)
    found = tuple(int(number) for number in re.findall(r"^GPU (\d+):", said.stdout, re.MULTILINE))
    return found if said.returncode == 0 and found else _amd_gpus(_KFD_NODES)


def _amd_gpus(nodes: Path) -> tuple[int, ...] | None:
    """As the kernel's driver lists them; processors have the id 0.

    https://docs.kernel.org/gpu/amdgpu/driver-core.html
    """
    count = 0
    for file in nodes.glob("*/gpu_id"):
        try:
            count += file.read_text().strip() not in ("", "0")
        except OSError:
            continue
    return tuple(range(count)) if count else None
