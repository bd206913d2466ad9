"""What the configuration asks of one server, for `backends.launch` to put into an engine's words."""

from __future__ import annotations

from collections.abc import Iterator

from backends.launch.spec import LaunchError, LaunchSpec, SpeculativeSpec
from gateway.config.launch import Launch
from gateway.config.schema import Settings
from gateway.config.upstreams import Backend


def spec_of(
    pool: str,
    backend: Backend,
    index: int,
    *,
    served_name: str,
    name: str = "",
    host: str | None = None,
    port: int | None = None,
    gpus: tuple[int, ...] | None = None,
    node_rank: int | None = None,
) -> LaunchSpec:
    """The server in place `index` of this machine, from 0. Raises `LaunchError` where the backend has no `launch`.

    `served_name`: as `served_name_of` says. What is None is as the settings say; of `gpus`: nothing is set.
    Secrets of `secret_env` are in the spec's environment.
    """
    launch = backend.launch
    if launch is None:
        raise LaunchError(f"backends.{pool} has no `launch`: it is not known how its servers are started")
    return LaunchSpec(
        engine=backend.engine,
        model=launch.model,
        served_name=served_name,
        host=launch.host if host is None else host,
        port=launch.port + index * launch.port_step if port is None else port,
        name=name or f"{pool}-{index}",
        index=index,
        revision=launch.revision,
        tp=launch.tp,
        pp=launch.pp,
        dp=launch.dp,
        ep=launch.ep,
        nodes=launch.nodes,
        node_rank=launch.node_rank if node_rank is None else node_rank,
        node_address=launch.node_address,
        dtype=launch.dtype,
        quantization=launch.quantization,
        kv_cache_dtype=launch.kv_cache_dtype,
        context_tokens=launch.context_tokens,
        max_running=launch.max_running,
        memory_fraction=launch.memory_fraction,
        speculative=_speculative(launch),
        adapters=_first_adapters(backend),
        # The gateway loads the others while the server runs.
        lora=launch.lora or len(_first_adapters(backend)) < len(backend.adapters),
        max_loras=launch.max_loras,
        max_lora_rank=launch.max_lora_rank,
        gpus=gpus,
        python=None if launch.python is None else str(launch.python),
        command=launch.command,
        flags=launch.flags,
        env={
            **launch.env,
            **{variable: secret.get_secret_value() for variable, secret in launch.secret_env.items()},
        },
    )


def served_name_of(settings: Settings, pool: str) -> str:
    """The name by which the pool's servers are asked for their model; the pool's own where no model goes there.

    Of several names the first: `gateway.config.launch_checks` finds engines that would answer to one alone.
    """
    return next(_asked_names(settings, pool), pool)


def gpus_of_server(launch: Launch) -> int:
    """GPUs of this machine that one server needs, where `gpus_per_server` does not say: at least one."""
    return max(1, launch.tp * launch.pp * launch.dp // launch.nodes)


def _asked_names(settings: Settings, pool: str) -> Iterator[str]:
    backend = settings.backends[pool]
    found = None if backend.discovery is None else backend.discovery.defaults.upstream_model
    if found is not None:
        yield found
    for name, model in settings.models.items():
        if model.backend == pool:
            yield model.upstream_model or name


def _first_adapters(backend: Backend) -> tuple[tuple[str, str], ...]:
    """Those that a server has from its start: all, unless they are loaded on demand or have no room at once."""
    slots = backend.adapter_slots
    if backend.adapters_load == "on_demand" or (slots is not None and len(backend.adapters) > slots):
        return ()
    return tuple((adapter.name, str(adapter.path)) for adapter in backend.adapters)


def _speculative(launch: Launch) -> SpeculativeSpec | None:
    asked = launch.speculative
    if asked is None:
        return None
    return SpeculativeSpec(
        algorithm=asked.algorithm,
        draft_model=asked.draft_model,
        steps=asked.steps,
        topk=asked.topk,
        draft_tokens=asked.draft_tokens,
    )
