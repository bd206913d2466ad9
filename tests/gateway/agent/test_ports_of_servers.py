from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.agent.ports import advice, ports_of, spans, who_has
from loadtests.ports import free_port
from tests.support.command import serve_process
from tests.support.launching import fleet_up, launching

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="who has a port is read from /proc")


def kernel(folder: Path, given: str = "32768\t60999\n", reserved: str = "\n") -> Path:
    """A /proc whose kernel is set like this."""
    settings = folder / "sys/net/ipv4"
    settings.mkdir(parents=True)
    (settings / "ip_local_port_range").write_text(given)
    (settings / "ip_local_reserved_ports").write_text(reserved)
    return folder


def test_ports_that_connections_may_get_are_told_with_what_to_do(tmp_path: Path) -> None:
    assert advice(range(32766, 32771), kernel(tmp_path)) == (
        "ports 32768-32770 of its servers are among those that this machine gives to outgoing connections "
        "(32768-60999): a server cannot start while one of them has its port. Choose a launch.port outside of that "
        "range, or reserve: sysctl -w net.ipv4.ip_local_reserved_ports=32768-32770"
    )


def test_what_is_reserved_already_is_kept_and_not_complained_of(tmp_path: Path) -> None:
    proc = kernel(tmp_path, reserved="8080,40000-40001\n")
    assert advice([40000, 40001], proc) is None
    told = advice([40000, 40001, 40002], proc)
    assert told is not None
    assert told.startswith("port 40002 of its servers is among")
    assert told.endswith("ip_local_reserved_ports=8080,40000-40002")


def test_nothing_is_said_of_other_ports_or_without_a_kernel_that_tells(tmp_path: Path) -> None:
    assert advice([30000, 61000], kernel(tmp_path)) is None
    assert advice([40000], tmp_path / "none") is None
    assert who_has("127.0.0.1", 40000, tmp_path / "none") == ""


def test_lists_of_ports_are_read_and_written_as_the_kernel_does() -> None:
    assert spans(ports_of("1,3-5,7\n")) == "1,3-5,7"
    assert ports_of("\n") == set()


@only_linux
def test_process_that_listens_is_named() -> None:
    port = free_port()
    script = f"import socket,sys; s = socket.create_server(('127.0.0.1', {port})); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        name = Path(f"/proc/{other.pid}/comm").read_text().strip()
        for host in ("127.0.0.1", "0.0.0.0", "::", "localhost"):
            assert who_has(host, port) == f"{name} (process {other.pid}) listens there"
        assert who_has("127.0.0.2", port) == "nobody has it any more"
        other.communicate("")
    assert who_has("127.0.0.1", port) == "nobody has it any more"


@only_linux
def test_process_may_be_called_anything() -> None:
    """The kernel keeps 15 bytes of a name, and cuts within a character; and a name can have colours for a terminal."""
    port = free_port()
    script = (
        "import socket, sys\n"
        "open('/proc/self/comm', 'wb').write(b'\\x1b[31m modell\\xc3')\n"
        f"s = socket.create_server(('127.0.0.1', {port}))\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        who = who_has("127.0.0.1", port)
        other.communicate(b"")
    assert who.isprintable()
    assert who.endswith(f"modell\ufffd (process {other.pid}) listens there")


@only_linux
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_connection_is_told_from_a_listener(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener, socket.socket(family) as client:
        client.bind((host, 0))  # else the kernel may give the port to connections to others as well
        client.connect(listener.getsockname())
        taken, _ = listener.accept()
        port, far = client.getsockname()[1], listener.getsockname()[1]
        shown = f"[::1]:{far}" if host == "::1" else f"127.0.0.1:{far}"
        who = who_has(host, port)
        assert who.startswith(f"nobody listens there: it is the local end of a connection to {shown} of ")
        assert f"(process {os.getpid()})" in who
        client.close()  # the end that closes first keeps its port
        taken.close()
        assert (
            who_has(host, port)
            == f"nobody listens there: a connection to {shown} that was closed keeps it for a minute"
        )


@only_linux
async def test_start_that_fails_for_a_connection_says_so_and_succeeds_once_that_is_closed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        client.connect(listener.getsockname())
        taken, _ = listener.accept()
        port = client.getsockname()[1]
        async with (
            serve_process(tmp_path, [], backends=launching(port)) as gateway,
            fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
        ):
            await fleet.said(rf"pool  port {port} of its servers is among .* net.ipv4.ip_local_reserved_ports={port}")
            await fleet.said(
                rf"box-pool-0  was not started: 127.0.0.1:{port}: Address already in use \(nobody listens there: it is "
                rf"the local end of a connection to 127.0.0.1:{listener.getsockname()[1]} of .* "
                rf"\(process {os.getpid()}\)"
            )
            taken.close()  # this end first, so that the other one is free at once
            client.close()
            await fleet.said("box-pool-0  ready in")


@only_linux
@pytest.mark.parametrize("stays", [True, False])
async def test_engine_that_finds_its_port_taken_is_told_with_who_has_it(tmp_path: Path, stays: bool) -> None:
    """An engine binds its port once its model is loaded; SGLang lives on after that."""
    port = free_port()
    script = (
        "import socket, sys, time\n"
        f"s = socket.create_server(('127.0.0.1', {port}))\n"
        "print('error while attempting to bind on address: address already in use', flush=True)\n"
        f"time.sleep(600) if {stays} else sys.exit(1)"
    )
    async with (
        serve_process(tmp_path, [], backends=launching(port, [sys.executable, "-c", script])) as gateway,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        if stays:
            await fleet.said(
                r"said that it cannot start \(.*address already in use\) \(.* \(process \d+\) listens there\)"
            )
        else:
            await fleet.said(r"exit code 1.*: the port is in use: .*address already in use \(nobody has it any more\)")
