"""One llama.cpp replica: llama.cpp's own HTTP server, run in this process from the prebuilt `xllamacpp`
wheel.

    python -m backends.launch.llamacpp --model F.gguf --port 18081 --alias chat

When the model is loaded and the port is open, one line goes to standard output, `listening
http://127.0.0.1:18081`; the server's own log goes to standard error. SIGTERM and SIGINT end it at once with
exit code 0. (llama.cpp left to itself stops generating but keeps open streams alive with pings for half a
minute; a cut tells the client sooner.)

This module only sets parameters and waits. Keeping replicas running is the supervisor's work
(`gateway.demo`).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LISTENING = "listening "
_GGUF_MAGIC = b"GGUF"  # the first four bytes of every model file llama.cpp reads


@dataclass(frozen=True, slots=True)
class Launch:
    """How one replica is to run."""

    model: Path
    alias: str  # the name it calls the model in its answers
    port: int = 0  # 0: a free one, told on standard output
    host: str = "127.0.0.1"
    ctx: int = 4096  # tokens, shared by the slots: each gets ctx / slots
    slots: int = 2  # requests generated at the same time; more wait inside the engine
    threads: int = 1
    prompt_cache_mib: int = 64  # finished prompts kept in memory; llama.cpp's own default is 8 GiB
    embeddings: bool = False  # answer /v1/embeddings too (mean of the last layer)

    def command(self) -> list[str]:
        """The command line that runs this replica in a process of its own."""
        command = [sys.executable, "-m", "backends.launch.llamacpp"]
        command += ["--model", str(self.model), "--alias", self.alias, "--host", self.host]
        command += ["--port", str(self.port), "--ctx", str(self.ctx), "--slots", str(self.slots)]
        command += ["--threads", str(self.threads), "--prompt-cache-mib", str(self.prompt_cache_mib)]
        return [*command, "--embeddings"] if self.embeddings else command


class LaunchError(Exception):
    """The replica cannot start; the message says why and what to do."""


def check(launch: Launch) -> None:
    """Find the usual reasons for a failed start, which llama.cpp itself reports as one and the same error."""
    try:
        with launch.model.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise LaunchError(f"cannot read the model {launch.model}: {error.strerror}") from error
    if magic != _GGUF_MAGIC:
        raise LaunchError(f"{launch.model} is not a GGUF file, the only kind of model llama.cpp reads")
    with socket.socket() as probe:
        # As the server will set it: a port whose last owner has just left counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((launch.host, launch.port))
        except OSError as error:
            raise LaunchError(f"cannot listen on {launch.host}:{launch.port}: {error.strerror}") from error


def parameters(launch: Launch, xllamacpp: Any) -> Any:
    """The launch in llama.cpp's own words."""
    params = xllamacpp.CommonParams()
    params.model.path = str(launch.model)
    params.model_alias = {launch.alias}
    params.hostnames = [launch.host]
    params.port = launch.port
    params.n_ctx = launch.ctx
    params.n_parallel = launch.slots
    params.cpuparams.n_threads = launch.threads
    params.cpuparams_batch.n_threads = launch.threads
    params.cache_ram_mib = launch.prompt_cache_mib
    params.endpoint_metrics = True  # /metrics and /slots: where the load of a replica is read
    params.endpoint_slots = True
    params.use_jinja = True  # chat templates with tools
    params.warmup = False  # the first request pays some milliseconds; every start would pay more
    params.ui = False
    params.cors_origins = ""  # the default lets any web page in the owner's browser talk to the replica
    if launch.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def serve(launch: Launch) -> NoReturn:
    """Load the model, say where it listens, and stay until a signal comes."""
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        raise LaunchError(
            "llama.cpp's server is not installed; it comes with an extra: pip install 'tidegate[demo]'"
        ) from error
    check(launch)
    # Loading does not return to the interpreter, so a Python handler would wait for it: until then, the
    # default action (end at once) is the right one. There is nothing to clean up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = xllamacpp.Server(parameters(launch, xllamacpp))
    except RuntimeError as error:
        raise LaunchError(f"llama.cpp refused to start ({error}); its log above says why") from error
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not sys.exit: tearing the server down waits for its open streams.
        signal.signal(number, lambda *_: os._exit(0))
    stay(f"{LISTENING}{server.listening_address}")


def stay(announcement: str) -> NoReturn:
    """Print a line and run nothing but the handlers of signals, of which none that comes after the line is missed.

    Python runs a handler between two of its own instructions: one for a signal that comes just before the system call
    of `signal.pause`, or on another thread, would wait there for the next signal. A byte in a pipe is never too early.
    """
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    print(announcement, flush=True)
    while True:
        os.read(awake, 1)


def parse(argv: Sequence[str]) -> Launch:
    """The command line as a `Launch`."""
    parser = argparse.ArgumentParser(
        prog="python -m backends.launch.llamacpp",
        description="One llama.cpp replica: llama.cpp's own HTTP server.",
        argument_default=argparse.SUPPRESS,  # what is not given keeps the dataclass's default
    )
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--alias", required=True, help="the name it calls the model in its answers")
    parser.add_argument("--port", type=int, help="0 (the default) takes a free one")
    parser.add_argument("--host")
    parser.add_argument("--ctx", type=int, help="context in tokens, shared by the slots")
    parser.add_argument("--slots", type=int, help="requests generated at the same time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-cache-mib", type=int)
    parser.add_argument("--embeddings", action="store_true", help="answer /v1/embeddings too")
    return Launch(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Run one replica; exit code 1 and one plain sentence where it cannot start."""
    try:
        serve(parse(argv))
    except LaunchError as error:
        print(f"llamacpp: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
