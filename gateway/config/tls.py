"""Certificates for connections to model servers and to Redis: whom to trust, and who we are."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from gateway.config.problems import Finding
from gateway.config.problems import Path as SettingPath
from gateway.config.values import FilePath, Section


class Tls(Section):
    """Certificates for the `https` replicas of a backend. They are always checked; there is no switch for that."""

    ca_file: FilePath | None = Field(
        default=None,
        description="File of the certificates that the replicas' are checked against. Null: the system's.",
        examples=["/etc/ssl/engines-ca.pem"],
    )
    cert_file: FilePath | None = Field(
        default=None,
        description="File of the certificate that the gateway shows to the replicas, with the chain above it. Null: it "
        "shows none.",
        examples=["/etc/ssl/gateway.pem"],
    )
    key_file: FilePath | None = Field(
        default=None,
        description="File of that certificate's private key, without a password. Null: none; the two come together.",
        examples=["/etc/ssl/gateway.key"],
    )


def tls_context(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext | None:
    """A context that checks certificates and host names; None where nothing is given, which is the system's own.

    Raises `OSError` (`ssl.SSLError` is one) for files that cannot be used.
    """
    if ca_file is None and cert_file is None:
        return None
    context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    if cert_file is not None:
        # Without this, a key with a password would be asked for at the terminal.
        context.load_cert_chain(str(cert_file), None if key_file is None else str(key_file), password="")
    return context


def check_tls(data: dict[str, Any]) -> Iterator[Finding]:
    """Certificates that are not there, do not fit together or cannot be read."""
    backends = data.get("backends")
    for name, backend in backends.items() if isinstance(backends, dict) else ():
        tls = backend.get("tls") if isinstance(backend, dict) else None
        if isinstance(tls, dict):
            yield from _check(("backends", name, "tls"), tls)
    redis = data.get("redis")
    if isinstance(redis, dict):
        yield from _check(("redis",), redis)


def _check(path: SettingPath, given: dict[str, Any]) -> Iterator[Finding]:
    ca_file, cert_file, key_file = (given.get(name) for name in ("ca_file", "cert_file", "key_file"))
    if any(value is not None and not isinstance(value, str) for value in (ca_file, cert_file, key_file)):
        return  # the schema has said so
    if (cert_file is None) is not (key_file is None):
        missing, there = ("key_file", "cert_file") if key_file is None else ("cert_file", "key_file")
        yield Finding((*path, there), f"{there} is given without {missing}", "give both, or neither")
        return
    for name, value in (("ca_file", ca_file), ("cert_file", cert_file), ("key_file", key_file)):
        if value is not None:
            try:
                Path(value).open("rb").close()
            except OSError as error:
                yield Finding((*path, name), f"{value} cannot be read: {error.strerror}")
                return
    try:
        tls_context(*(None if value is None else Path(value) for value in (ca_file, cert_file, key_file)))
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        yield Finding(path, f"the certificates cannot be used: {reason}", "PEM files, the key without a password")
