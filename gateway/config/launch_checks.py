"""The checks of `backends.*.launch` that need more than one setting, and what the engine can be told at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from gateway.config.launch import Launch
from gateway.config.problems import Finding, Path, shown
from gateway.config.upstreams import Backend

_HIGHEST_PORT = 65535
# Of a backend, what starting its servers has to do with.
_READ = ("engine", "adapters", "adapters_load", "adapter_slots", "launch", "scaling")


def check_launch(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything wrong with how servers are to be started. Backends that the schema refuses are passed over."""
    pools = dict(_pools(data))
    for pool, backend in pools.items():
        path: Path = ("backends", pool, "launch")
        assert backend.launch is not None
        yield from _one(path, backend.launch)
        yield from _told(path, pool, backend)
    yield from _ports(pools)
    yield from _names(data, pools)


def _pools(data: Mapping[str, Any]) -> Iterator[tuple[str, Backend]]:
    backends = data.get("backends")
    for pool, raw in backends.items() if isinstance(backends, dict) else ():
        if not isinstance(raw, dict) or raw.get("launch") is None:
            continue
        try:
            yield pool, Backend.model_validate({key: raw[key] for key in _READ if key in raw})
        except ValidationError:
            continue


def _one(path: Path, launch: Launch) -> Iterator[Finding]:
    """Settings of one section that contradict each other."""
    if launch.nodes > 1 and launch.node_address is None:
        yield Finding((*path, "nodes"), "several nodes need node_address", "write host:port at the machine of rank 0")
    if launch.node_address is not None and not _has_port(launch.node_address):
        yield Finding((*path, "node_address"), f"{shown(launch.node_address)} has no port", "write host:port")
    if launch.node_rank >= launch.nodes:
        yield Finding(
            (*path, "node_rank"), f"{launch.node_rank} is not one of {launch.nodes} nodes", "they count from 0"
        )
    if (gpus := launch.tp * launch.pp * launch.dp) % launch.nodes:
        yield Finding(
            (*path, "nodes"),
            f"{gpus} GPUs (tp x pp x dp) cannot be spread evenly over {launch.nodes} nodes",
            "let the nodes divide them",
        )
    if launch.command is not None:
        for setting in ("python", "flags"):
            if getattr(launch, setting):
                yield Finding((*path, setting), "`command` is given as well", "say it in the command")
    for variable in sorted(launch.env.keys() & launch.secret_env.keys()):
        yield Finding((*path, "env", variable), "is in secret_env as well", "leave it out of one of them")


def _told(path: Path, pool: str, backend: Backend) -> Iterator[Finding]:
    """What the engine has no word for. The command is made as it would be at the start."""
    # Here, since what makes it needs this package whole.
    from backends.launch.commands import command_of, launchable
    from backends.launch.spec import LaunchError
    from gateway.agent.specs import spec_of

    launch = backend.launch
    assert launch is not None
    if launch.command is None and backend.engine not in launchable():
        yield Finding(
            path,
            f"{backend.engine} is not an engine that can be started",
            f"write a command, or one of these engines: {', '.join(launchable())}",
        )
        return
    has_adapters = backend.adapters or launch.lora
    for setting in ("max_loras", "max_lora_rank"):
        if getattr(launch, setting) is not None and not has_adapters:
            yield Finding((*path, setting), "there are no adapters", "name some under adapters, or set lora: true")
            return
    if launch.nodes > 1 and (launch.node_address is None or launch.node_rank >= launch.nodes):
        return  # said above
    try:
        command_of(spec_of(pool, backend, 0, served_name=pool))
    except LaunchError as error:
        where = error.setting.split(".") if error.setting else []
        place = ("backends", pool, "adapters") if where == ["adapters"] else (*path, *where)
        yield Finding(place, str(error).removeprefix(f"launch.{error.setting}: "))


def _ports(pools: Mapping[str, Backend]) -> Iterator[Finding]:
    """Two servers of one machine at one port."""
    taken = {pool: (backend.launch, set(_ports_of(backend))) for pool, backend in pools.items()}
    for pool, (launch, ports) in taken.items():
        if launch is not None and max(ports, default=0) > _HIGHEST_PORT:
            yield Finding(
                ("backends", pool, "launch", "port"),
                f"the last of its servers would be at port {max(ports)}",
                f"there are none above {_HIGHEST_PORT}",
            )
    for (one, (first, ports)), (other, (second, others)) in combinations(taken.items(), 2):
        if first is None or second is None or first.host != second.host or not (both := ports & others):
            continue
        yield Finding(
            ("backends", other, "launch", "port"),
            f"port {min(both)} is also one of backends.{one}.launch's, on the same host",
            "let them be further apart",
        )


def _ports_of(backend: Backend) -> range:
    launch = backend.launch
    assert launch is not None
    grows = backend.scaling is not None and backend.scaling.provider == "local"
    most = max(launch.count, min(backend.scaling.max, 256)) if grows and backend.scaling is not None else launch.count
    return range(launch.port, launch.port + most * launch.port_step, launch.port_step)


def _names(data: Mapping[str, Any], pools: Mapping[str, Backend]) -> Iterator[Finding]:
    """vLLM answers 404 to any name but the one that it is started with; the others answer to all."""
    models = data.get("models")
    asked: dict[str, tuple[str, str]] = {}
    for name, model in models.items() if isinstance(models, dict) else ():
        pool = model.get("backend") if isinstance(model, dict) else None
        if not isinstance(pool, str) or pool not in pools or pools[pool].engine != "vllm":
            continue
        wanted = model.get("upstream_model") or name
        first, said = asked.setdefault(pool, (name, wanted))
        launch = pools[pool].launch
        if isinstance(wanted, str) and wanted != said and launch is not None and launch.command is None:
            yield Finding(
                ("models", name, "upstream_model"),
                f"backends.{pool}.launch starts servers that answer to {shown(said)} alone, as models.{first} wants it",
                f"write upstream_model: {said}",
            )


def _has_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) <= _HIGHEST_PORT
