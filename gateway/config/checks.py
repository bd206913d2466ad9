"""The checks that need more than one setting.

They read the raw configuration rather than the finished settings, so that they also report when something
unrelated is wrong, and all problems appear at once. Values of the wrong type are passed over: the schema has
reported those.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, get_args

from pydantic import SecretStr
from pydantic_core import PydanticCustomError

from gateway.config.discovery_checks import check_discovery
from gateway.config.launch_checks import check_launch
from gateway.config.operators import PersonRole
from gateway.config.overload import Overload
from gateway.config.problems import Finding, Path, did_you_mean, looks_secret, show_path, shown
from gateway.config.routing_checks import check_routing
from gateway.config.scaling_checks import check_scaling
from gateway.config.schema import Admin, Server
from gateway.config.tls import check_tls
from gateway.config.urls import normal_url
from gateway.config.values import checked_host, is_loopback

# 128 bits, below which a token can be guessed by whoever may try for long enough.
MIN_TOKEN_BYTES = 16


def cross_check(data: dict[str, Any]) -> Iterator[Finding]:
    """Everything wrong between settings that are each right by themselves."""
    yield from _listeners(data)
    yield from _admin_token(data)
    yield from _sizes(data)
    yield from _overload(data)
    yield from _model_names(data)
    yield from _model_backends(data)
    yield from _keys(data)
    yield from _replicas(data)
    yield from check_discovery(data)
    yield from _adapters(data)
    yield from _allowed_fields(data)
    yield from check_launch(data)
    yield from check_routing(data)
    yield from check_scaling(data)
    yield from check_tls(data)


def literal_secrets(data: Any, path: Path = ()) -> Iterator[Finding]:
    """Every text that looks like a key or a token. Secrets in their proper place were resolved before."""
    if isinstance(data, dict):
        for key, value in data.items():
            if looks_secret(str(key)):
                yield Finding((*path, key), "a key looks like a secret: a secret in the wrong place", _SECRET_HINT)
            yield from literal_secrets(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from literal_secrets(value, (*path, index))
    elif isinstance(data, str) and looks_secret(data):
        yield Finding(path, "the value looks like a secret: a secret in the wrong place", _SECRET_HINT)


_SECRET_HINT = "take it out, and give it where a secret is due as {env: NAME} or {file: PATH}"


def _mapping(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}


def _listeners(data: dict[str, Any]) -> Iterator[Finding]:
    server, admin = _mapping(data, "server"), _mapping(data, "admin")
    host, port = server.get("host", Server().host), server.get("port", Server().port)
    tcp = not server.get("uds") and _is_host(host)
    if tcp and not is_loopback(host) and data.get("auth", "insecure") == "insecure":
        yield Finding(
            ("server", "host"),
            f"auth is insecure, and {shown(host)} can be reached from other machines",
            "write auth: keys, or listen on 127.0.0.1 or on a Unix socket (server.uds)",
        )
    admin_host, admin_port = admin.get("host", Admin().host), admin.get("port", Admin().port)
    if admin.get("enabled") is False or not _is_host(admin_host):
        return
    if not is_loopback(admin_host) and admin.get("token") is None:
        yield Finding(
            ("admin", "host"),
            f"{shown(admin_host)} can be reached from other machines, and admin.token is not set",
            "set admin.token, or listen on 127.0.0.1",
        )
    if tcp and port == admin_port != 0 and _overlap(host, admin_host):
        yield Finding(
            ("admin", "port"),
            f"{shown(port)} is also server.port, on the same host",
            "give one of them another port",
        )


def _is_host(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(checked_host(value))
    except PydanticCustomError:
        return False


def _overlap(one: str, other: str) -> bool:
    """Whether two listeners with the same port would meet."""
    names = {"127.0.0.1" if host.lower() == "localhost" else host for host in (one, other)}
    return len(names) == 1 or any(_is_wildcard(host) for host in names)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _admin_token(data: dict[str, Any]) -> Iterator[Finding]:
    """None that can be guessed, and none that would make it a matter of luck who its bearer is."""
    admin = _mapping(data, "admin")
    places: dict[Path, Any] = {("admin", "token"): admin.get("token")}
    places |= {
        ("admin", "tokens", name, "token"): _mapping(admin["tokens"], name).get("token")
        for name in _mapping(admin, "tokens")
    }
    seen: dict[str, Path] = {}
    for path, token in places.items():
        if not isinstance(token, SecretStr) or not (value := token.get_secret_value()):
            continue
        if len(value.encode()) < MIN_TOKEN_BYTES:
            yield Finding(
                path,
                f"the token is shorter than {MIN_TOKEN_BYTES} bytes (128 bits)",
                "make one with: openssl rand -hex 32",
            )
        if (first := seen.setdefault(value, path)) != path:
            yield Finding(path, f"is the same token as {show_path(first)}", "make another with: openssl rand -hex 32")
    for name in _mapping(admin, "tokens"):
        yield from _token_pools(data, name, _mapping(admin["tokens"], name))
    oidc = _mapping(admin, "oidc")
    scopes = oidc.get("scopes")
    if isinstance(scopes, list | tuple) and "openid" not in scopes:
        yield Finding(("admin", "oidc", "scopes"), "openid is not among them", "add openid")


def _token_pools(data: dict[str, Any], name: str, token: dict[str, Any]) -> Iterator[Finding]:
    """Pools narrow a registrar only: other roles see and steer the gateway as a whole."""
    pools, path = token.get("pools"), ("admin", "tokens", name, "pools")
    if pools is None:
        return
    if token.get("role") in get_args(PersonRole):
        yield Finding(
            path,
            f"the role is {shown(token.get('role'))}, and only a registrar's token can be for some pools",
            "leave it out, or write role: registrar",
        )
    known = _mapping(data, "backends")
    for index, pool in enumerate(pools if isinstance(pools, list | tuple) else ()):
        if isinstance(pool, str) and pool not in known:
            yield Finding((*path, index), f"no backend is called {shown(pool)}", did_you_mean(pool, known))


def _sizes(data: dict[str, Any]) -> Iterator[Finding]:
    server = _mapping(data, "server")
    body = server.get("max_body_bytes", Server().max_body_bytes)
    total = server.get("max_in_flight_bytes", Server().max_in_flight_bytes)
    if isinstance(body, int) and isinstance(total, int) and total < body:
        yield Finding(
            ("server", "max_in_flight_bytes"),
            f"{total} is less than server.max_body_bytes ({body}), so that the largest bodies would never get in",
            f"write at least {body}",
        )


def _overload(data: dict[str, Any]) -> Iterator[Finding]:
    """The levels have to come one after the other."""
    section, defaults = _mapping(data, "overload"), Overload()
    names = ("shed_sheddable_at", "shed_batch_at", "critical_only_at")
    for lower, upper in pairwise(names):
        low, high = section.get(lower, getattr(defaults, lower)), section.get(upper, getattr(defaults, upper))
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            name = upper if upper in section else lower
            yield Finding(
                ("overload", name), f"{lower} ({low:g}) is above {upper} ({high:g})", "write them in rising order"
            )


def _model_names(data: dict[str, Any]) -> Iterator[Finding]:
    """A name that a client can ask for has to mean one model."""
    models = _mapping(data, "models")
    taken: dict[str, str] = {}
    for model in models:
        aliases = models[model].get("aliases") if isinstance(models[model], dict) else None
        for index, alias in enumerate(aliases if isinstance(aliases, (list, tuple)) else ()):
            path: Path = ("models", model, "aliases", index)
            if not isinstance(alias, str):
                continue
            if alias in models:
                yield Finding(path, f"{shown(alias)} is already the name of a model", "choose another alias")
            elif alias in taken:
                yield Finding(path, f"{shown(alias)} is already an alias, at {taken[alias]}", "keep one of them")
            else:
                taken[alias] = show_path(path)


def _model_backends(data: dict[str, Any]) -> Iterator[Finding]:
    backends = _mapping(data, "backends")
    for name, model in _mapping(data, "models").items():
        wanted = model.get("backend") if isinstance(model, dict) else None
        if isinstance(wanted, str) and wanted not in backends:
            hint = did_you_mean(wanted, backends) or "add it under backends"
            yield Finding(("models", name, "backend"), f"{shown(wanted)} is not the name of a backend", hint)


def _keys(data: dict[str, Any]) -> Iterator[Finding]:
    """One key or several, and each of them once."""
    for name, backend in _mapping(data, "backends").items():
        several = backend.get("api_keys") if isinstance(backend, dict) else None
        if several is None:
            continue
        path: Path = ("backends", name, "api_keys")
        if backend.get("api_key") is not None:
            yield Finding(path, f"{show_path((*path[:-1], 'api_key'))} is given as well", "keep one of the two")
        seen: dict[str, int] = {}
        for index, key in enumerate(several if isinstance(several, (list, tuple)) else ()):
            value = key.get_secret_value() if isinstance(key, SecretStr) else ""
            if value in seen:
                yield Finding((*path, index), f"is the same key as [{seen[value]}]", "leave one of them out")
            elif value:
                seen[value] = index


def _replicas(data: dict[str, Any]) -> Iterator[Finding]:
    """Two entries for one engine would double its share; two engines of one name could not be told apart."""
    for pool, backend in _mapping(data, "backends").items():
        replicas = backend.get("replicas") if isinstance(backend, dict) else None
        names: dict[str, int] = {}
        urls: dict[tuple[str, Any], int] = {}
        for index, replica in enumerate(replicas if isinstance(replicas, (list, tuple)) else ()):
            if not isinstance(replica, dict):
                continue
            path: Path = ("backends", pool, "replicas", index)
            name, url = replica.get("name") or f"{pool}-{index}", _url_or_none(replica.get("url"))
            if isinstance(name, str) and names.setdefault(name, index) != index:
                message = f"{shown(name)} is already the name of replicas[{names[name]}]"
                yield Finding((*path, "name"), message, "choose another name")
            rank = replica.get("dp_rank")
            place = (url or "", rank if isinstance(rank, int) else None)
            if url is not None and urls.setdefault(place, index) != index:
                message = f"{shown(url)} is already the address of replicas[{urls[place]}]"
                yield Finding((*path, "url"), message, "name each engine once; use weight to give it more")


def _adapters(data: dict[str, Any]) -> Iterator[Finding]:
    """A name that stands for two files would be whichever an engine loaded last."""
    for pool, backend in _mapping(data, "backends").items():
        adapters = backend.get("adapters") if isinstance(backend, dict) else None
        names: dict[str, int] = {}
        for index, adapter in enumerate(adapters if isinstance(adapters, (list, tuple)) else ()):
            name = adapter.get("name") if isinstance(adapter, dict) else None
            if isinstance(name, str) and names.setdefault(name, index) != index:
                message = f"{shown(name)} is already the name of adapters[{names[name]}]"
                yield Finding(("backends", pool, "adapters", index, "name"), message, "choose another name")


def _allowed_fields(data: dict[str, Any]) -> Iterator[Finding]:
    """A name that no engine of the pool refuses allows nothing; one that is always refused stays so."""
    from backends.dialects import DIALECTS

    for pool, backend in _mapping(data, "backends").items():
        fields = backend.get("allow_fields") if isinstance(backend, dict) else None
        if not isinstance(fields, (list, tuple)):
            continue
        entries = backend.get("replicas")
        own = [each.get("engine") for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        said = [engine or backend.get("engine") for engine in own or [None]]
        names = {engine for engine in said if isinstance(engine, str)}
        if not names or not names <= DIALECTS.keys():
            continue  # something else is wrong
        risky = sorted(frozenset[str]().union(*(DIALECTS[name].risky for name in names)))
        reserved = frozenset[str]().union(*(DIALECTS[name].reserved for name in names))
        for index, field in enumerate(fields):
            path: Path = ("backends", pool, "allow_fields", index)
            if not isinstance(field, str):
                continue
            if field in reserved:
                yield Finding(path, f"{shown(field)} steers the engine itself and is always refused", "take it out")
            elif field not in risky:
                hint = did_you_mean(field, risky) or "take it out"
                yield Finding(path, f"{shown(field)} is not a field that this backend's engines refuse", hint)


def _url_or_none(value: Any) -> str | None:
    try:
        return normal_url(value) if isinstance(value, str) else None
    except PydanticCustomError:
        return None
