"""What the client connects over: TCP options, unix sockets, IPv6, TLS."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from backends.errors import (
    ConnectFailed,
    Disconnected,
)
from backends.origin import Origin
from backends.pool import ConnectionPool
from tests.backends.scripted import OK, Peer, exchange, scripted, until

EVERY_LOOP = True


async def test_nagle_is_off_and_keepalive_is_on() -> None:
    async with scripted(lambda peer: peer.serve(OK)) as server:
        pool = ConnectionPool(server.origin)
        connection = await pool.acquire(1)
        assert connection._wire is not None
        assert connection._wire.transport is not None
        sock = connection._wire.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        connection.detach()
        await pool.aclose()


async def test_unix_socket(tmp_path: Path) -> None:
    async with scripted(lambda peer: peer.serve(OK), uds=tmp_path / "engine.sock") as server:
        pool = ConnectionPool(Origin.parse(f"http+unix://{str(tmp_path).replace('/', '%2F')}%2Fengine.sock"))
        assert pool.origin == server.origin
        for _ in range(2):
            assert (await exchange(pool)).body == b"hi"
        assert server.accepted == 1
        await pool.aclose()


async def test_ipv6_literal() -> None:
    async with scripted(lambda peer: peer.serve(OK), host="::1") as server:
        pool = ConnectionPool(Origin.parse(f"http://[::1]:{server.origin.port}"))
        assert (await exchange(pool)).body == b"hi"
        await pool.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    files = [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return cert, key


async def test_tls_offers_http11_checks_the_name_and_reuses(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    server_side.set_alpn_protocols(["h2", "http/1.1"])
    chosen: list[str | None] = []

    async def script(peer: Peer) -> None:
        chosen.append(peer.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await peer.serve(OK)

    client_side = ssl.create_default_context(cafile=str(cert))
    client_side.set_alpn_protocols(["http/1.1"])
    async with scripted(script, ssl_context=server_side) as server:
        pool = ConnectionPool(server.origin, ssl_context=client_side)
        for _ in range(2):
            assert (await exchange(pool)).body == b"hi"
        assert chosen == ["http/1.1"]
        large = [b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n", b"x" * 1_000_000]
        assert (await exchange(pool, large, method=b"POST")).body == b"hi"
        await pool.aclose()
        await until(lambda: server.open == 0)


@pytest.mark.parametrize(("host", "trusted"), [("localhost", False), ("127.0.0.1", True)])
async def test_tls_refuses_an_unknown_issuer_and_another_name(
    certificate: tuple[Path, Path], host: str, trusted: bool
) -> None:
    cert, key = certificate
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    client_side = ssl.create_default_context(cafile=str(cert)) if trusted else None
    async with scripted(lambda peer: peer.serve(OK), ssl_context=server_side) as server:
        pool = ConnectionPool(Origin("https", host, server.origin.port), ssl_context=client_side)
        with pytest.raises(ConnectFailed, match=r"certificate verify failed: .* \(connect\)$") as caught:
            await pool.acquire(1)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert pool.active == 0


async def test_truncated_body_over_tls_is_a_disconnect(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK[:-1])

    async with scripted(script, ssl_context=server_side) as server:
        pool = ConnectionPool(server.origin, ssl_context=ssl.create_default_context(cafile=str(cert)))
        recorder = await exchange(pool)
        assert isinstance(recorder.error, Disconnected)
        assert recorder.body == b"h"
        assert (pool.idle, pool.active) == (0, 0)
