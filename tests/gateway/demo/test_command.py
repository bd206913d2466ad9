"""The demo as a person meets it: in a terminal, with the real engine and the real gateway."""

from __future__ import annotations

import asyncio
import io
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from gateway.demo import run
from gateway.demo.command import parse
from gateway.demo.fleet import Ports
from gateway.demo.welcome import sdk_example
from loadtests.ports import free_port

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_ports_come_from_the_command_line_before_the_environment() -> None:
    environ = {"TIDEGATE_SERVER__PORT": "8400", "TIDEGATE_ADMIN__PORT": "8401"}
    assert parse([], {}).ports == Ports(7400, 7401)
    assert parse([], environ).ports == Ports(8400, 8401)
    assert parse(["--port", "9400"], environ).ports == Ports(9400, 8401)


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        ([], {"TIDEGATE_SERVER__PORT": "http"}, "TIDEGATE_SERVER__PORT=http is not a port number"),
        (["--port", "70000"], {}, "70000 is not a port"),
        (["--port", "7401"], {}, "cannot both be on port 7401"),
        (["--replicas", "0"], {}, "--replicas is 1 to 8"),
        (["--no-such-option"], {}, "unrecognized arguments"),
    ],
)
def test_wrong_command_line_is_exit_code_2(
    argv: list[str], environ: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv, environ, io.StringIO()) == 2
    assert says in capsys.readouterr().err


def test_port_in_use_ends_the_demo_before_it_starts_anything() -> None:
    out = io.StringIO()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["--port", str(port), "--admin-port", str(free_port())], {}, out) == 1
    assert f"Port {port} is in use" in out.getvalue()


@pytest.mark.engine
def test_gateway_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    out = io.StringIO()
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    broken = [sys.executable, "-c", "import sys; sys.exit('no such setting: sevrer')"]
    argv = ["--port", str(free_port()), "--admin-port", str(free_port()), "--replicas", "1"]
    assert run(argv, environ, out, gateway_command=lambda _config: broken) == 1
    assert "The gateway ended with exit code 1" in out.getvalue()
    assert "no such setting: sevrer" in out.getvalue()


@pytest.mark.engine
def test_replica_that_dies_during_its_start_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing else")
    monkeypatch.setattr("gateway.demo.preflight.weights", lambda: broken)
    out = io.StringIO()
    argv = ["--port", str(free_port()), "--admin-port", str(free_port()), "--replicas", "1"]
    assert run(argv, {**os.environ, "TMPDIR": str(tmp_path)}, out) == 1
    assert "Replica smollm2-1 ended with exit code 1" in out.getvalue()
    assert "llama.cpp refused to start" in out.getvalue()


@dataclass
class RunningDemo:
    """A demo in a process of its own, its terminal read line by line."""

    process: asyncio.subprocess.Process
    ports: Ports
    text: str = ""

    async def until(self, words: str) -> None:
        """Read the terminal up to a line with these words."""
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            while True:
                line = (await self.process.stdout.readline()).decode()
                self.text += line
                assert line, f"the demo ended before it said {words!r}:\n{self.text}"
                if words in line:
                    return

    async def rest(self) -> str:
        """Read to the end: nothing holds the terminal open any more, so no child is left."""
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            return (await self.process.stdout.read()).decode()

    def children(self) -> dict[str, int]:
        """The pids of the replicas and of the gateway."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
        replicas = sorted(pid for pid, line in lines.items() if "backends.launch.llamacpp" in line)
        gateways = [pid for pid, line in lines.items() if "serve" in line]
        return {"gateway": gateways[0], **{f"replica {n}": pid for n, pid in enumerate(replicas, 1)}}


@asynccontextmanager
async def running_demo(folder: Path) -> AsyncIterator[RunningDemo]:
    """`tidegate demo` on free ports, up to its welcome."""
    ports = Ports(free_port(), free_port())
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "gateway", "demo"],
        *["--port", str(ports.server), "--admin-port", str(ports.admin)],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    demo = RunningDemo(process, ports)
    try:
        await demo.until("Ctrl-C stops all of it.")
        yield demo
    finally:
        if process.returncode is None:
            process.kill()
        await demo.rest()
        await process.wait()


async def ask(ports: Ports) -> str:
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        response = await client.post(f"{ports.base_url}/chat/completions", json=body)
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


@only_linux
@pytest.mark.engine
async def test_demo_answers_survives_a_dead_replica_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    async with running_demo(tmp_path) as demo:
        assert "force" in demo.text  # the real answer to the question in the welcome
        assert sdk_example(demo.ports).splitlines()[1] in demo.text
        assert await ask(demo.ports)

        os.kill(demo.children()["replica 1"], signal.SIGKILL)
        await demo.until("starting it again in 1 s")
        assert await ask(demo.ports)
        await demo.until("is back")
        assert len(demo.children()) == 3

        demo.process.send_signal(signal.SIGINT)
        assert (await demo.rest()).endswith("Stopped.\n")
        assert await demo.process.wait() == 0
        assert os.listdir(tmp_path) == []  # its configuration, token and logs went with it


@only_linux
@pytest.mark.engine
async def test_nothing_is_left_when_the_demo_itself_is_killed(tmp_path: Path) -> None:
    async with running_demo(tmp_path) as demo:
        # A handle on each process, taken while it surely is the one meant; it turns readable when that ends.
        handles = {name: os.pidfd_open(pid) for name, pid in demo.children().items()}
        demo.process.kill()
        for name, handle in handles.items():
            ended, _, _ = await asyncio.to_thread(select.select, [handle], [], [], 10)
            os.close(handle)
            assert ended, f"{name} outlived the demo"


@only_linux
@pytest.mark.engine
async def test_gateway_that_dies_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    async with running_demo(tmp_path) as demo:
        os.kill(demo.children()["gateway"], signal.SIGKILL)
        rest = await demo.rest()
        assert "The gateway was ended by SIGKILL" in rest
        assert await demo.process.wait() == 1
