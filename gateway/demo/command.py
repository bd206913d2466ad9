"""The demo from its command line to its exit code.

0    stopped by Ctrl-C or SIGTERM
1    it could not start, or the gateway ended; what and why is on the terminal
2    the command line is wrong
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from backends.launch.llamacpp import Launch
from gateway.demo import preflight
from gateway.demo.fleet import MODEL, Fleet, GatewayCommand, GatewayEnded, Ports, StartError
from gateway.demo.welcome import welcome

_MAX_REPLICAS = 8
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    """What the owner may choose."""

    ports: Ports
    replicas: int


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    stdout: TextIO,
    *,
    gateway_command: GatewayCommand | None = None,
) -> int:
    """Run the demo until it is stopped; `argv` is what follows `tidegate demo`. Tests bring a gateway."""
    try:
        options = parse(argv, environ)
    except SystemExit as end:  # argparse has said what is wrong
        return int(end.code or 0)
    except ValueError as error:
        print(f"tidegate demo: {error}", file=sys.stderr)
        return 2

    def say(text: str) -> None:
        print(text, file=stdout, flush=True)

    problem = first_problem(options)
    if problem is not None:
        say(problem)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="tidegate-demo-", dir=environ.get("TMPDIR") or None))
    try:
        code = asyncio.run(_demo(options, environ, folder, gateway_command or _serve, say))
    except (StartError, GatewayEnded) as error:
        say(f"{error}\nAll logs are in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return code


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The command line; a port not given there comes from the variable that `tidegate serve` reads too."""
    parser = argparse.ArgumentParser(
        prog="tidegate demo", description="A small real model (SmolLM2 on llama.cpp) behind the gateway."
    )
    parser.add_argument("--port", type=int, help="where the API listens (default 7400)")
    parser.add_argument("--admin-port", type=int, help="where the admin interface listens (default 7401)")
    parser.add_argument("--replicas", type=int, default=2, help="how many times the model is loaded (default 2)")
    given = parser.parse_args(argv)
    server, admin = given.port, given.admin_port
    if server is None:
        server = _port_in(environ, "TIDEGATE_SERVER__PORT", 7400)
    if admin is None:
        admin = _port_in(environ, "TIDEGATE_ADMIN__PORT", 7401)
    for port in (server, admin):
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is not a port; ports are 1 to 65535")
    if server == admin:
        raise ValueError(f"the API and the admin interface cannot both be on port {server}")
    if not 1 <= given.replicas <= _MAX_REPLICAS:
        raise ValueError(f"--replicas is 1 to {_MAX_REPLICAS}, not {given.replicas}")
    return Options(ports=Ports(server=server, admin=admin), replicas=given.replicas)


def _port_in(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable, "")
    if text and not text.isdecimal():
        raise ValueError(f"{variable}={text} is not a port number")
    return int(text) if text else default


def first_problem(options: Options) -> str | None:
    """What would make the demo fail, the most basic first."""
    return (
        preflight.missing_packages()
        or preflight.port_problem("127.0.0.1", options.ports.server, "PORT")
        or preflight.port_problem("127.0.0.1", options.ports.admin, "ADMIN_PORT")
        or preflight.memory_problem(options.replicas)
    )


def _serve(config: Path) -> list[str]:
    return [sys.executable, "-m", "gateway", "serve", "--log-format=text", "--config", str(config)]


def _child_environ(environ: Mapping[str, str], ports: Ports) -> dict[str, str]:
    """The environment of every child: the demo's own, with the ports that were chosen on the command line."""
    return {
        **environ,
        "TIDEGATE_SERVER__PORT": str(ports.server),
        "TIDEGATE_ADMIN__PORT": str(ports.admin),
        "PYTHONUNBUFFERED": "1",  # a log that is shown after a crash must have its last lines
    }


async def _demo(
    options: Options,
    environ: Mapping[str, str],
    folder: Path,
    gateway_command: GatewayCommand,
    say: Callable[[str], None],
) -> int:
    """Start everything, greet, keep it running; on a signal, stop everything and return 0."""
    model = preflight.weights()
    assert model is not None, "checked by first_problem"
    cores = os.cpu_count() or 1
    threads = max(1, min(4, cores // options.replicas))  # more than four gain nothing with so small a model
    launch = Launch(model=model, alias=MODEL, threads=threads, embeddings=True)
    fleet = Fleet(launch, options.ports, folder, _child_environ(environ, options.ports), gateway_command, say)
    stopping = _on_signals(fleet)
    started_at = time.monotonic()
    try:
        say(f"Loading SmolLM2-135M-Instruct into {options.replicas} x llama.cpp ...")
        await fleet.start_replicas(options.replicas)
        say(f"Loaded after {time.monotonic() - started_at:.1f} s. Starting the gateway ...")
        await fleet.start_gateway()
        answer = await fleet.first_answer()
        say(welcome(options.ports, options.replicas, answer, folder))
        await fleet.keep_running()
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
        say("Stopping: the gateway finishes what it is answering, then the replicas end.")
    finally:
        await fleet.stop()
    say("Stopped.")
    return 0


def _on_signals(fleet: Fleet) -> asyncio.Event:
    """The first signal cancels this task and sets the event returned; every later one kills the children."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            fleet.kill()
            return
        stopping.set()
        task.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    return stopping
