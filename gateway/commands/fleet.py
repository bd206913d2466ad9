"""`tidegate fleet`: launches a pool's servers on this machine, and shows and steers those of all machines.

Exit codes as in `gateway.operate`: 0 done, or stopped by a signal; 1 not done; 2 the command line, the configuration or
the token cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gateway.operate import DONE, FAILED, INTERRUPTED, UNUSABLE, Gateway, Problem, find, plain, print_table

BAR = 20
"""Characters of a progress bar."""
POLL_S = 0.2


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one command; returns the exit code."""
    try:
        match options.action:
            case "up":
                return _up(options, environ)
            case "down":
                return _down(options, environ)
            case "status":
                return _status(find(options, environ), options.pool, options.json)
            case _:
                return _roll(find(options, environ), options.pool, options.json)
    except Problem as problem:
        if getattr(options, "json", False):
            print(json.dumps({"error": str(problem)}))
        print(f"tidegate fleet {options.action}: {problem}", file=sys.stderr)
        return problem.exit_code


def _folder(environ: Mapping[str, str]) -> Path:
    from gateway.owner import StateError, state_directory

    try:
        return state_directory(environ).absolute() / "fleet"
    except StateError as error:
        raise Problem(f"there is no place for the agent's state: {error}", UNUSABLE) from error


def _agent_name(given: str | None) -> str:
    from gateway.agent.places import NoRoom, agent_name

    try:
        return agent_name(given, socket.gethostname())
    except NoRoom as error:
        raise Problem(str(error), UNUSABLE) from error


# -- up


def _up(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gateway.agent.agent import Agent, Where
    from gateway.agent.places import NoRoom
    from gateway.agent.times import AlreadyRunning
    from gateway.config import ConfigError

    where = Where(_agent_name(options.agent), _folder(environ), (options.log_dir or _folder(environ)).absolute())
    registrars = _registrars(options, environ)
    read = _reader(options, environ, where.agent)

    async def main() -> None:
        await Agent(where, read, registrars(), _say, node_rank=options.node_rank).run()

    try:
        asyncio.run(main())
    except (ConfigError, NoRoom) as error:
        raise Problem(str(error), UNUSABLE) from error
    except AlreadyRunning as error:
        raise Problem(f"{error}; tidegate fleet down ends it, --agent gives this one another name", FAILED) from error
    except OSError as error:
        raise Problem(f"the operating system refused: {error}", FAILED) from error
    return DONE


def _reader(options: argparse.Namespace, environ: Mapping[str, str], agent: str) -> Any:
    """What reads the configuration, now and at each SIGHUP."""
    from gateway.agent.places import NoRoom, Room, rooms, visible_gpus
    from gateway.config import Settings, load
    from gateway.config.lines import read_document
    from gateway.config.secrets import secret_places
    from gateway.owner import STATE_DIR

    settings_environ = {name: value for name, value in environ.items() if name != STATE_DIR}

    def read() -> tuple[Settings, dict[str, Room]]:
        # An engine's machine need not have the gateway's secrets: only those that the servers are started with.
        document = read_document(options.config)
        paths = [".".join(map(str, place.path)) for place in secret_places(Settings, document.data)]
        wanted = [path for path in paths if path.startswith("backends.") and _is_for_servers(path)]
        settings = load(options.config, settings_environ, secrets=wanted)
        found = rooms(settings, agent, visible_gpus(environ), options.host, tuple(options.pool))
        if not found:
            raise NoRoom(f"{options.config}: no pool has `launch`, so there is nothing to start")
        return settings, found

    return read


def _is_for_servers(path: str) -> bool:
    return ".launch.secret_env." in path or ".api_key" in path


def _registrars(options: argparse.Namespace, environ: Mapping[str, str]) -> Any:
    """What makes the clients of the gateways, inside of the event loop. Raises `Problem` for what cannot be used."""
    from backends.discovery.registrar import Registrar

    found: list[Gateway] = []
    for url in options.gateway or [None]:
        asked = argparse.Namespace(url=url, config=options.config, token_file=options.token_file)
        found.append(find(asked, environ))

    def make() -> Sequence[Registrar]:
        try:
            return [Registrar(each.url, each.token, options.ca_file) for each in found]
        except ValueError as error:
            raise Problem(str(error), UNUSABLE) from error

    return make


def _say(who: str, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads on: the servers go on all the same
        print(f"{time.strftime('%H:%M:%S')}  {plain(who)}  {plain(text)}", flush=True)


# -- down


def _down(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gateway.agent.times import StateFile, put_order

    folder, agent = _folder(environ), _agent_name(options.agent)
    file = StateFile(folder, agent)
    pid = file.pid()
    if not file.locked() or pid is None:
        raise Problem(f"no agent {agent} runs on this machine; --agent names another", FAILED)
    going = _meant(file.read().get("servers", []), options.what)
    if options.what is None:
        os.kill(pid, signal.SIGTERM)
    else:
        if not going:
            raise Problem(f"agent {agent} has no server {options.what}; tidegate fleet status lists them", FAILED)
        put_order(folder, agent, options.what)
        os.kill(pid, signal.SIGUSR1)
    try:
        while not options.no_wait and file.locked():
            left = [name for name in _meant(file.read().get("servers", []), options.what) if name in going]
            if options.what is not None and not left:
                break
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return INTERRUPTED
    done = "told to end" if options.no_wait else "ended"
    print(f"agent {agent}: {done}" if options.what is None else f"{', '.join(going)}: {done}")
    return DONE


def _meant(servers: Sequence[Mapping[str, Any]], what: str | None) -> list[str]:
    """Names of the servers that `POOL` or `POOL/NAME` means; of all for None."""
    pool, _, name = (what or "").partition("/")
    return [each["name"] for each in servers if what is None or (each["pool"] == pool and name in ("", each["name"]))]


# -- roll


def _roll(gateway: Gateway, pool: str | None, as_json: bool) -> int:
    if pool is not None:
        pools = [pool]
    else:
        _, answer = gateway.ask("GET", "/admin/members")
        pools = [each["pool"] for each in answer["pools"] if any(member.get("agent") for member in each["members"])]
        if not pools:
            raise Problem("no agent has launched a server: there is nothing to start anew", FAILED)
    told = {each: gateway.ask("POST", f"/admin/pools/{quote(each, safe='')}/roll")[1] for each in pools}
    if as_json:
        print(json.dumps(told))
    else:
        for each in pools:
            print(f"{each}: its servers are started anew, one after the other; tidegate fleet status shows how far")
    return DONE


# -- status


def _status(gateway: Gateway, pool: str | None, as_json: bool) -> int:
    _, members = gateway.ask("GET", "/admin/members")
    _, agents = gateway.ask("GET", "/admin/agents")
    pools = [each for each in members["pools"] if pool is None or each["pool"] == pool]
    if not pools:
        raise Problem(f"the gateway has no pool {pool}", UNUSABLE)
    if as_json:
        print(json.dumps({"pools": pools, "agents": agents.get("agents", [])}))
        return DONE
    rows: list[tuple[str, ...]] = [("SERVER", "STATE", "READY IN", "RESTARTS", "AGENT", "URL", "")]
    rows += [_row(each["pool"], member) for each in pools for member in each["members"]]
    if len(rows) == 1:
        print("no server is launched, registered or discovered", file=sys.stderr)
    else:
        print_table(rows)
    for each in agents.get("agents", []):
        print(f"agent {plain(each['agent'])}: {plain(_agent_line(each))}")
    return DONE


def _row(pool: str, member: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{pool}/{member['name']}",
        state_of(member),
        _took(member.get("started_in_s")),
        str(member.get("restarts", 0)),
        member.get("agent") or "-",
        member["url"],
        member.get("refused") or member.get("detail") or "",
    )


def state_of(member: Mapping[str, Any]) -> str:
    """One or two words, and a bar where it is known how far a start has come.

    >>> state_of({"state": "starting", "phase": "loading", "progress": 0.25})
    'loading [#####...............] 25%'
    """
    if member["state"] != "starting":
        return str(member["state"])
    phase, progress = member.get("phase") or "starting", member.get("progress")
    if progress is None:
        return str(phase)
    done = round(BAR * min(1.0, max(0.0, progress)))
    return f"{phase} [{'#' * done}{'.' * (BAR - done)}] {progress:.0%}"


def _took(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _agent_line(agent: Mapping[str, Any]) -> str:
    had = [
        f"{each['pool']} {each['ready']} of {each['launched']} ready, at most {each['max']}" for each in agent["pools"]
    ]
    return "; ".join(had) or "nothing launched"
