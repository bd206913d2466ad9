"""The configuration: one YAML file, overrides from the environment, secrets from files; read once, frozen.

`load` either returns a `Settings` that needs no further checking, or raises one `ConfigError` that lists
everything that is wrong. Nothing here opens a socket or changes the process.
"""

from gateway.config.caps import Caps
from gateway.config.limit_checks import needs_shared_store
from gateway.config.limits import DEFAULT_TENANT, LimitBlock, Queue, StaticKey, Tenant
from gateway.config.load import (
    Reading,
    json_schema,
    keep_restart_only,
    load,
    read_all,
    require_database_folder,
    require_models,
    require_shared_store,
    restart_only_changes,
)
from gateway.config.prices import ExchangeRates, Price
from gateway.config.problems import ConfigError, Problem
from gateway.config.replicas import Dcgm, Health, KvEvents, Replica
from gateway.config.schema import RESTART_ONLY, Admin, Server, Settings, Shutdown, Stream, UsageLog
from gateway.config.shadow import Shadow
from gateway.config.spill import Spill
from gateway.config.upstreams import Backend, Connections, Model, ModelTimeouts, Timeouts

__all__ = [
    "DEFAULT_TENANT",
    "RESTART_ONLY",
    "Admin",
    "Backend",
    "Caps",
    "ConfigError",
    "Connections",
    "Dcgm",
    "ExchangeRates",
    "Health",
    "KvEvents",
    "LimitBlock",
    "Model",
    "ModelTimeouts",
    "Price",
    "Problem",
    "Queue",
    "Reading",
    "Replica",
    "Server",
    "Settings",
    "Shadow",
    "Shutdown",
    "Spill",
    "StaticKey",
    "Stream",
    "Tenant",
    "Timeouts",
    "UsageLog",
    "json_schema",
    "keep_restart_only",
    "load",
    "needs_shared_store",
    "read_all",
    "require_database_folder",
    "require_models",
    "require_shared_store",
    "restart_only_changes",
]
