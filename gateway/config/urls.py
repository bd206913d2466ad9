"""Replica addresses: what may be written, and the one form it is kept in.

An engine is named by its origin (`http://127.0.0.1:30000`). Hosted APIs often live below a path
(`https://openrouter.ai/api/v1`): what stands before the final `/v1` is kept as a prefix, `/v1` itself is
dropped, because the gateway adds it to every request.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from gateway.config.problems import shown, wrong

# sockaddr_un holds 108 bytes on Linux, one of them the final zero.
MAX_SOCKET_PATH_BYTES = 107

_EXAMPLE = "write e.g. http://127.0.0.1:30000"
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
_NUMBER = re.compile(r"(?:^|\.)(?:0x[0-9A-Fa-f]*|[0-9]+)\.?$", re.IGNORECASE)
"""By its last label a host is an address (WHATWG URL): `2130706433`, `0x7f.1` and `127.1` are all 127.0.0.1."""
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~+-]|%[0-9A-Fa-f]{2})+")
_ENDPOINTS = {"v1", "chat", "completions", "models", "embeddings", "responses"}
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """A replica's address, taken apart."""

    scheme: str
    """http, https or http+unix."""
    authority: str
    """host:port with the port always written, or the percent-encoded path of a socket."""
    path_prefix: str
    """What precedes `/v1` in every request path: empty, or such as `/api`."""

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        return self.origin + self.path_prefix


def parse_address(text: str) -> Address:
    """Take a replica URL apart, or raise an error that says how to write it."""
    if not re.fullmatch(r"[!-~]+", text):
        raise wrong(f"{shown(text)} is not an http(s) URL: it has spaces or characters outside ASCII", _EXAMPLE)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise wrong(f"{shown(text)} is not an http(s) URL: host or port cannot be read", _EXAMPLE) from None
    if "@" in parts.netloc:
        raise wrong(
            "the URL has credentials in it: a secret in the wrong place",
            "take them out of the URL and give the key as the backend's api_key: {env: NAME} or {file: PATH}",
        )
    if parts.query or parts.fragment or text.endswith(("?", "#")):
        raise wrong("the URL has a query or a fragment", "end it after the host, or after the path before /v1")
    if parts.scheme == "http+unix":
        return Address("http+unix", _socket(parts), _prefix(parts.path))
    if parts.scheme == "unix":
        raise wrong(f"{shown(text)} is not an http(s) URL", "write a socket as http+unix://%2Frun%2Fengine.sock")
    if parts.scheme not in _DEFAULT_PORTS:
        raise wrong(f"{shown(text)} is not an http(s) URL", _EXAMPLE)
    return Address(parts.scheme, _host_and_port(text, parts, port), _prefix(parts.path))


def normal_url(text: str) -> str:
    """The one spelling of a replica URL: lower-case host, explicit port, no trailing slash, no `/v1`."""
    return parse_address(text).url


def _host_and_port(text: str, parts: SplitResult, port: int | None) -> str:
    host = parts.hostname
    if not host:
        raise wrong(f"{shown(text)} names no host", _EXAMPLE)
    if port == 0 or parts.netloc.endswith(":"):
        raise wrong(f"{shown(text)} names no usable port", _EXAMPLE)
    if port is None:
        port = _DEFAULT_PORTS[parts.scheme]
    if ":" in host:  # urlsplit has checked the address between the brackets, and not what comes behind them
        if not re.fullmatch(r"\[[^]]*\](:[0-9]+)?", parts.netloc):
            raise wrong(f"{shown(text)} has a host that is neither a name nor an address", _EXAMPLE)
        return f"[{host}]:{port}"
    if not _HOST.fullmatch(host) or ".." in host:
        raise wrong(f"{shown(text)} has a host that is neither a name nor an address", _EXAMPLE)
    if _NUMBER.search(host) and not _is_ipv4(host):
        raise wrong(
            f"{shown(text)} has a host that is a number: programs read such addresses differently",
            "write all four parts in decimal, e.g. 127.0.0.1",
        )
    return f"{host}:{port}"


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _socket(parts: SplitResult) -> str:
    path = unquote(parts.netloc)
    if not path.startswith("/"):
        raise wrong(
            "the URL of a socket has to hold the socket's absolute path, with every / written as %2F",
            "write e.g. http+unix://%2Frun%2Fengine.sock",
        )
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES or "\0" in path:
        raise wrong(f"the path of a socket can have at most {MAX_SOCKET_PATH_BYTES} bytes", "use a shorter path")
    return quote(path, safe="")


def _prefix(path: str) -> str:
    path = path.rstrip("/")
    prefix = path.removesuffix("/v1").rstrip("/")
    if not prefix:
        return ""
    segments = prefix.split("/")[1:]
    if any(not _SEGMENT.fullmatch(segment) or segment in {".", ".."} for segment in segments):
        raise wrong(
            f"the URL's path {shown(path)} cannot be used",
            "write the base URL, e.g. https://example.com/api/v1",
        )
    if _ENDPOINTS & set(segments):
        raise wrong(
            f"the URL's path {shown(path)} goes too far: the gateway adds /v1/... itself",
            "end the URL at the host or at /v1",
        )
    return prefix
