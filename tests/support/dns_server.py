"""A name server over UDP that knows what a test tells it: addresses, nothing, or only silence.

    async with DnsServer() as names:
        names.addresses["r0.test"] = ["127.0.0.1"]
        names.delay_s["r1.test"] = 10.0

The resolver of the C library asks port 53 and no other, so that this needs the right to listen there; a process is
pointed to it by a resolv.conf of its own (`with_resolver`, in a mount namespace).
"""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import cast

import pytest

ADDRESS = "127.0.0.77"
_A, _IN, _NXDOMAIN = 1, 1, 3


class DnsServer(asyncio.DatagramProtocol):
    """Answers questions for A records; for any other type there is nothing, and that is no error."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        """By name; others do not exist (NXDOMAIN)."""
        self.delay_s: dict[str, float] = {}
        self.silent: set[str] = set()
        self.flapping: dict[str, list[list[str]]] = {}
        """By name: what it says in turn, over and over."""
        self.asked: dict[str, int] = {}
        """Questions for A records so far."""
        self._transport: asyncio.DatagramTransport | None = None

    async def __aenter__(self) -> DnsServer:
        """Skips the test where port 53 may not be listened on."""
        try:
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, (ADDRESS, 53))
        except OSError as error:
            pytest.skip(f"no name server can listen on {ADDRESS}:53: {error}")
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
        if found is None:
            return id_ + struct.pack(">HHHHH", 0x8180 | _NXDOMAIN, 1, 0, 0, 0) + question
        records = [
            b"\xc0\x0c" + struct.pack(">HHIH", _A, _IN, 0, 4) + bytes(map(int, each.split(".")))
            for each in (found if kind == _A else [])
        ]
        return id_ + struct.pack(">HHHHH", 0x8180, 1, len(records), 0, 0) + question + b"".join(records)


def with_resolver(folder: Path) -> tuple[str, ...]:
    """A command that runs another one which asks this name server. Skips where there are no mount namespaces."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    config = folder / "resolv.conf"
    config.write_text(f"nameserver {ADDRESS}\n")
    return ("unshare", "-m", "sh", "-c", f'mount --bind {config} /etc/resolv.conf && exec "$@"', "sh")
