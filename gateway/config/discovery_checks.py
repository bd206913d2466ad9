"""The checks of discovery that need more than one setting."""

from __future__ import annotations

import importlib.util
import ipaddress
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gateway.config.problems import Finding, Path, shown

_SOURCES = ("dns", "kubernetes", "file", "registration")


def check_discovery(
    data: Mapping[str, Any], is_installed: Callable[[str], object] = importlib.util.find_spec
) -> Iterator[Finding]:
    """Sources that could find nothing, and pools that nothing can ever come into."""
    backends = data.get("backends")
    for pool, backend in (backends if isinstance(backends, dict) else {}).items():
        if not isinstance(backend, dict):
            continue
        sources = backend.get("discovery")
        sources = sources if isinstance(sources, dict) else {}
        path: Path = ("backends", pool)
        yield from _dns(sources.get("dns"), (*path, "discovery", "dns"))
        yield from _kubernetes(sources.get("kubernetes"), (*path, "discovery", "kubernetes"))
        scaling = backend.get("scaling")
        for section, place in ((sources, "discovery"), (scaling if isinstance(scaling, dict) else {}, "scaling")):
            if section.get("kubernetes") is not None and is_installed("kubernetes") is None:
                yield Finding(
                    (*path, place, "kubernetes"),
                    "the library kubernetes is not installed",
                    "install tidegate[kubernetes], or leave the section out",
                )
        comes_from = [each for each in _SOURCES if sources.get(each) is not None]
        if backend.get("replicas") in (None, [], ()) and backend.get("launch") is None and not comes_from:
            yield Finding(
                (*path, "replicas"),
                "there are none, and nothing says where some come from",
                "write e.g. [{url: http://127.0.0.1:30000}], or say so under discovery or launch",
            )


def _dns(dns: Any, path: Path) -> Iterator[Finding]:
    if not isinstance(dns, dict):
        return
    if dns.get("record", "a") == "a":
        if dns.get("port") is None:
            yield Finding((*path, "port"), "is missing: addresses come without one", "write e.g. 30000")
        if dns.get("servers"):
            yield Finding((*path, "servers"), "are asked for srv records only", "take them out, or write record: srv")
    servers = dns.get("servers")
    for index, server in enumerate(servers if isinstance(servers, (list, tuple)) else ()):
        if isinstance(server, str) and not _is_address(server):
            yield Finding((*path, "servers", index), f"{shown(server)} is not an IP address", "write e.g. 10.0.0.53")


def _kubernetes(kubernetes: Any, path: Path) -> Iterator[Finding]:
    if isinstance(kubernetes, dict) and not kubernetes.get("service") and not kubernetes.get("labels"):
        yield Finding(
            path, "names neither a service nor labels: every pod of the namespace would count", "write service: NAME"
        )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
