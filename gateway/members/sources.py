"""The sources that a pool's configuration names, made when they are needed: their libraries are not everybody's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from backends.discovery.member import Source
from gateway.config.discovery import Discovery, Dns, Kubernetes, ReplicaFile
from gateway.members.merge import DNS, FILE, KUBERNETES

Make = Callable[[], tuple[str, Source]]
"""What the source is, for people, and the source."""


def sources_of(pool: str, discovery: Discovery | None, config: Path | None) -> Iterator[tuple[str, BaseModel, Make]]:
    """Kind, settings (equal ones need no new source) and maker of each. `config`: the file that relative paths are
    relative to."""
    if discovery is None:
        return
    if discovery.dns is not None:
        yield DNS, discovery.dns, _dns(pool, discovery.dns)
    if discovery.kubernetes is not None:
        yield KUBERNETES, discovery.kubernetes, _kubernetes(discovery.kubernetes)
    if discovery.file is not None:
        yield FILE, discovery.file, _file(discovery.file, config)


def _dns(pool: str, settings: Dns) -> Make:
    def make() -> tuple[str, Source]:
        from backends.discovery.dns import DnsSource

        return f"{settings.record} {settings.name}", DnsSource(
            settings.name,
            record=settings.record,
            port=settings.port,
            scheme=settings.scheme,
            interval_s=settings.interval_s,
            timeout_s=settings.timeout_s,
            servers=settings.servers,
            pool=pool,
        )

    return make


def _kubernetes(settings: Kubernetes) -> Make:
    def make() -> tuple[str, Source]:
        from backends.discovery.kubernetes import KubernetesSource
        from backends.kubernetes.client import Access
        from backends.kubernetes.slices import Wanted

        what = settings.service or ",".join(f"{name}={value}" for name, value in settings.labels.items()) or "all"
        return f"{settings.namespace or '(own namespace)'}/{what}", KubernetesSource(
            Access(
                kubeconfig=None if settings.kubeconfig is None else str(settings.kubeconfig),
                context=settings.context,
                namespace=settings.namespace,
            ),
            Wanted(
                service=settings.service,
                labels=settings.labels,
                port=settings.port,
                scheme=settings.scheme,
                zones_as_regions=settings.zones_as_regions,
            ),
        )

    return make


def _file(settings: ReplicaFile, config: Path | None) -> Make:
    def make() -> tuple[str, Source]:
        from backends.discovery.files import FileSource

        path = settings.path if config is None else config.parent / settings.path
        return str(path), FileSource(path, interval_s=settings.interval_s)

    return make
