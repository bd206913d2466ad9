"""Ports that the kernel may give away before a server listens on them, and who has one that is in use.

An outgoing connection gets a local port out of `net.ipv4.ip_local_port_range` (IPv6 as well), and nobody can listen
there for as long as it lasts: https://docs.kernel.org/networking/ip-sysctl.html. Read from /proc; where there is none,
on systems other than Linux, nothing is known and nothing is said.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_RANGE: Final = "sys/net/ipv4/ip_local_port_range"
_RESERVED: Final = "sys/net/ipv4/ip_local_reserved_ports"
_ESTABLISHED: Final = 0x01
_TIME_WAIT: Final = 0x06
_LISTEN: Final = 0x0A

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def spans(ports: Iterable[int]) -> str:
    """As the kernel writes lists of ports.

    >>> spans([8080, 30001, 30000, 30002])
    '8080,30000-30002'
    """
    runs: list[list[int]] = []
    for port in sorted(set(ports)):
        if runs and port == runs[-1][1] + 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def ports_of(text: str) -> set[int]:
    """What a list of the kernel's means. Raises `ValueError`.

    >>> sorted(ports_of("8080,30000-30002"))
    [8080, 30000, 30001, 30002]
    """
    found: set[int] = set()
    for word in text.replace(",", " ").split():
        first, _, last = word.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def advice(ports: Collection[int], proc: Path = PROC) -> str | None:
    """What there is to say of a pool whose servers are to listen on these ports; None: nothing."""
    try:
        first, last = (int(word) for word in (proc / _RANGE).read_text().split())
        reserved = ports_of((proc / _RESERVED).read_text())
    except (OSError, ValueError):
        return None
    risky = {port for port in ports if first <= port <= last} - reserved
    if not risky:
        return None
    many = len(risky) > 1
    return (
        f"{'ports' if many else 'port'} {spans(risky)} of its servers {'are' if many else 'is'} among those that this "
        f"machine gives to outgoing connections ({first}-{last}): a server cannot start while one of them has its "
        f"port. Choose a launch.port outside of that range, or reserve: sysctl -w "
        f"net.ipv4.ip_local_reserved_ports={spans(risky | reserved)}"
    )


# -- who has one


@dataclass(frozen=True, slots=True)
class _Socket:
    """A line of /proc/net/tcp or tcp6."""

    address: Address
    peer: str
    state: int
    inode: int

    def in_the_way_of(self, wanted: Collection[Address]) -> bool:
        return (
            self.address.is_unspecified
            or self.address in wanted
            or not wanted
            or any(each.is_unspecified for each in wanted)
        )


def who_has(host: str, port: int, proc: Path = PROC) -> str:
    """Who keeps a server from listening there, as the end of a sentence; empty where that is not known.

    `host`: an address; a name stands for all addresses. Reads the descriptors of all processes that may be read: a few
    milliseconds for each thousand.
    """
    with contextlib.suppress(ValueError):
        return _said(_sockets(port, {ipaddress.ip_address(host)}, proc), proc)
    return _said(_sockets(port, set(), proc), proc)


def _said(found: list[_Socket] | None, proc: Path) -> str:
    if found is None:
        return ""
    if not found:
        return "nobody has it any more"
    listening = [each for each in found if each.state == _LISTEN]
    if listening:
        name = _process(listening[0].inode, proc)
        return f"{name or 'a process that this one may not look at'} listens there"
    # One that lives says more than one that is over.
    one = min(found, key=lambda each: (each.state == _TIME_WAIT, each.state != _ESTABLISHED))
    if one.state == _TIME_WAIT:
        return f"nobody listens there: a connection to {one.peer} that was closed keeps it for a minute"
    name = _process(one.inode, proc)
    return (
        f"nobody listens there: it is the local end of a connection to {one.peer}{f' of {name}' if name else ''}, and "
        "free once that is closed"
    )


def _sockets(port: int, wanted: Collection[Address], proc: Path) -> list[_Socket] | None:
    """All of this port that are in the way; None: nobody says."""
    found: list[_Socket] = []
    known = False
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        known = True
        for line in lines:
            with contextlib.suppress(ValueError, IndexError):
                words = line.split()
                address, its_port = _place(words[1])
                each = _Socket(address, _shown(*_place(words[2])), int(words[3], 16), int(words[9]))
                if its_port == port and each.in_the_way_of(wanted):
                    found.append(each)
    return found if known else None


def _place(text: str) -> tuple[Address, int]:
    """`0100007F:1F90` is 127.0.0.1:8080: words of four bytes in the machine's order, then the port."""
    address, _, port = text.partition(":")
    raw = bytes.fromhex(address)
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    found = ipaddress.ip_address(raw)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found, int(port, 16)


def _shown(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _process(inode: int, proc: Path) -> str:
    """Name and number of a process that has this socket; empty where nobody may see it."""
    wanted = f"socket:[{inode}]"
    for folder in _numbered(proc):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(folder / "fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(folder / "fd" / descriptor) == wanted:
                        # Cut within a character perhaps, and whatever somebody chose.
                        name = (folder / "comm").read_text("utf-8", "replace").strip()
                        shown = "".join(each if each.isprintable() else "?" for each in name)
                        return f"{shown} (process {folder.name})"
    return ""


def _numbered(proc: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (each for each in proc.iterdir() if each.name.isdecimal())
