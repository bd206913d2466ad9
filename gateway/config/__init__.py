"""The configuration: one YAML file, overrides from the environment, secrets from files; read once, frozen.

`load` either returns a `Settings` that needs no further checking, or raises one `ConfigError` that lists
everything that is wrong. Nothing here opens a socket or changes the process.
"""

from gateway.config.load import json_schema, load, require_models, restart_only_changes
from gateway.config.problems import ConfigError, Problem
from gateway.config.replicas import Health, KvEvents, Replica
from gateway.config.schema import RESTART_ONLY, Admin, Server, Settings, Shutdown, Stream, UsageLog
from gateway.config.upstreams import Backend, Connections, Model, ModelTimeouts, Price, Timeouts

__all__ = [
    "RESTART_ONLY",
    "Admin",
    "Backend",
    "ConfigError",
    "Connections",
    "Health",
    "KvEvents",
    "Model",
    "ModelTimeouts",
    "Price",
    "Problem",
    "Replica",
    "Server",
    "Settings",
    "Shutdown",
    "Stream",
    "Timeouts",
    "UsageLog",
    "json_schema",
    "load",
    "require_models",
    "restart_only_changes",
]
