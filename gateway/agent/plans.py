"""How one server is started and asked: the configuration, a place of this machine, and an engine's own words."""

from __future__ import annotations

import os
from typing import Final

from backends.dialects import DIALECTS
from backends.launch.commands import command_of, environment_of
from backends.launch.spec import LaunchError
from gateway.agent.keeping import span
from gateway.agent.places import Room
from gateway.agent.process import StartError
from gateway.agent.server import Plan
from gateway.agent.specs import served_name_of, spec_of
from gateway.config import Settings
from gateway.own_keys import headers_with, keys_of

OURS: Final = "TIDEGATE_"
"""Variables that begin so are the gateway's and the agent's own, tokens among them: no server gets them."""


def plan_of(settings: Settings, room: Room, place: int, node_rank: int | None, usual_s: float | None) -> Plan:
    """Of the server in this place, started now. `usual_s`: what a start took lately. Raises `StartError`."""
    backend = settings.backends[room.pool]
    served_name = served_name_of(settings, room.pool)
    gpus = room.gpus_of(place)
    try:
        spec = spec_of(
            room.pool,
            backend,
            place,
            served_name=served_name,
            name=room.name(place),
            host=room.host,
            port=room.port_of(place),
            gpus=gpus,
            node_rank=node_rank,
        )
        command = command_of(spec)
        added = environment_of(spec)
    except LaunchError as error:
        raise StartError(f"was not started: {error}") from error
    dialect, keys = DIALECTS[backend.engine], keys_of(backend)
    note = "" if gpus is None else f", GPUs {','.join(map(str, gpus)) or 'none'}"
    if spec.node_rank > 0:
        note += f", rank {spec.node_rank} of {spec.nodes}"
    if usual_s is not None:
        note += f", lately ready in {span(usual_s)}"
    return Plan(
        command=command,
        environ={**{name: text for name, text in os.environ.items() if not name.startswith(OURS)}, **added},
        engine=backend.engine,
        model=served_name,
        dialect=dialect,
        headers=headers_with(keys[0] if keys else None, backend, dialect),
        host=room.host,
        port=room.port_of(place),
        url=room.url(place),
        timeout_s=backend.health.timeout_s,
        answers=spec.node_rank == 0,
        note=note,
    )
