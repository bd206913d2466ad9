"""A name server over UDP that knows what a test tells it: addresses, services, nothing, or only silence.

    async with DnsServer() as names:
        names.addresses["r0.test"] = ["127.0.0.1", "::1"]
        names.services["_sglang._tcp.test"] = [(0, 1, 30000, "r0.test")]
        names.delay_s["r1.test"] = 10.0

The resolver of the C library asks port 53 and no other, so that this needs the right to listen there; a process is
pointed to it by a resolv.conf of its own (`with_resolver`, in a mount namespace). Resolvers that can be told a port get
one that is free: `DnsServer(port=0)`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import cast

import pytest

ADDRESS = "127.0.0.77"
_A, _AAAA, _SRV, _IN, _NXDOMAIN = 1, 28, 33, 1, 3
SERVFAIL, REFUSED = 2, 5


class DnsServer(asyncio.DatagramProtocol):
    """Answers questions for A, AAAA and SRV; for any other type there is nothing, and that is no error."""

    def __init__(self, port: int = 53) -> None:
        """`port` 0: a free one."""
        self.port = port
        self.addresses: dict[str, list[str]] = {}
        """By name, IPv4 and IPv6. Names that are in none of these do not exist (NXDOMAIN)."""
        self.services: dict[str, list[tuple[int, int, int, str]]] = {}
        """SRV records by name: priority, weight, port, target."""
        self.failing: dict[str, int] = {}
        """Response codes, by name."""
        self.ttl_s = 0
        self.glue = False
        """Whether addresses of targets are sent along with SRV records."""
        self.delay_s: dict[str, float] = {}
        self.silent: set[str] = set()
        self.flapping: dict[str, list[list[str]]] = {}
        """By name: what it says in turn, over and over."""
        self.asked: dict[str, int] = {}
        """Questions for A records so far."""
        self.questions = 0
        """Of any type."""
        self._transport: asyncio.DatagramTransport | None = None

    async def __aenter__(self) -> DnsServer:
        """Skips the test where port 53 may not be listened on."""
        try:
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, (ADDRESS, self.port))
        except OSError as error:
            pytest.skip(f"no name server can listen on {ADDRESS}:{self.port}: {error}")
        assert self._transport is not None
        self.port = self._transport.get_extra_info("sockname")[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while size := data[at]:
            labels.append(data[at + 1 : at + 1 + size].decode("ascii").lower())
            at += size + 1
        name, question = ".".join(labels), data[12 : at + 5]
        (kind,) = struct.unpack_from(">H", data, at + 1)
        self.questions += 1
        if kind == _A:
            self.asked[name] = self.asked.get(name, 0) + 1
        if name in self.silent:
            return
        reply = self._reply(data[:2], name, kind, question)
        assert self._transport is not None
        asyncio.get_running_loop().call_later(self.delay_s.get(name, 0.0), self._send, reply, addr)

    def _send(self, reply: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.sendto(reply, addr)

    def _reply(self, id_: bytes, name: str, kind: int, question: bytes) -> bytes:
        found = self.addresses.get(name)
        if name in self.flapping:
            turns = self.flapping[name]
            found = turns[self.asked.get(name, 0) % len(turns)]
        services = self.services.get(name)
        code = self.failing.get(name, _NXDOMAIN if found is None and services is None else 0)
        if code:
            return id_ + struct.pack(">HHHHH", 0x8180 | code, 1, 0, 0, 0) + question
        more: list[bytes] = []
        if kind == _SRV:
            records = [self._record(b"\xc0\x0c", _SRV, _service(*each)) for each in services or []]
            if self.glue:
                targets = dict.fromkeys(target for *_, target in services or [])
                more = [each for target in targets for each in self._addresses(target, _A)]
        else:
            records = self._addresses(name, kind, found)
        return id_ + struct.pack(">HHHHH", 0x8180, 1, len(records), 0, len(more)) + question + b"".join(records + more)

    def _addresses(self, name: str, kind: int, found: list[str] | None = None) -> list[bytes]:
        several = map(ipaddress.ip_address, self.addresses.get(name, []) if found is None else found)
        wanted = {_A: 4, _AAAA: 6}.get(kind)
        return [self._record(_labels(name), kind, each.packed) for each in several if each.version == wanted]

    def _record(self, name: bytes, kind: int, data: bytes) -> bytes:
        return name + struct.pack(">HHIH", kind, _IN, self.ttl_s, len(data)) + data


def _service(priority: int, weight: int, port: int, target: str) -> bytes:
    return struct.pack(">HHH", priority, weight, port) + _labels(target)


def _labels(name: str) -> bytes:
    labels = [each.encode("ascii") for each in name.split(".") if each]
    return b"".join(bytes([len(each)]) + each for each in labels) + b"\0"


def with_resolver(folder: Path) -> tuple[str, ...]:
    """A command that runs another one which asks this name server. Skips where there are no mount namespaces."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    config = folder / "resolv.conf"
    config.write_text(f"nameserver {ADDRESS}\n")
    return ("unshare", "-m", "sh", "-c", f'mount --bind {config} /etc/resolv.conf && exec "$@"', "sh")
