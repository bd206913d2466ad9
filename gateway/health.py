"""`tidegate health`: asks a gateway's `/readyz`, for a container's health check. Standard library only, to be quick."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

_MAX_ANSWER_BYTES = 4096
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
PATH = "/readyz"


class AddressError(Exception):
    """It is not known where to ask; the message says why."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def check(url: str, timeout_s: float) -> tuple[bool, str]:
    """Whether the gateway at `url` is ready, and what to tell people."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise AddressError(f"{url}: {error}") from error
    path = parts.path if parts.path not in ("", "/") else PATH
    connection: http.client.HTTPConnection
    if parts.scheme == "http+unix":
        connection = UnixConnection(unquote(parts.netloc), timeout_s)
    elif parts.scheme == "http" and parts.hostname:
        connection = http.client.HTTPConnection(parts.hostname, port or 80, timeout=timeout_s)
    else:
        raise AddressError(f"{url} is not a URL such as http://127.0.0.1:7400 or http+unix://%2Frun%2Ftidegate.sock")
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(_MAX_ANSWER_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer from {url}: {str(error) or type(error).__name__}"
    finally:
        connection.close()
    return response.status == 200, text


def configured_url(config: Path | None, environ: Mapping[str, str]) -> str:
    """Where the gateway of this configuration listens. Raises `AddressError`.

    Only the `server` section is looked at: a gateway that refused a bad new file still runs, and runs where it did.
    """
    from pydantic import ValidationError

    from gateway.config import Server, Settings
    from gateway.config.environment import apply_environment
    from gateway.config.lines import read_document

    document = None if config is None else read_document(config)
    if document is not None and not document.readable:
        raise AddressError("; ".join(str(problem) for problem in document.problems))
    data = {} if document is None else {"server": document.data.get("server") or {}}
    relevant = {name: text for name, text in environ.items() if name.upper().startswith("TIDEGATE_SERVER")}
    apply_environment(Settings, data, relevant, "TIDEGATE_", "__")
    try:
        server = Server.model_validate(data.get("server", {}))
    except ValidationError as error:
        raise AddressError(f"the server section cannot be used: {error.error_count()} problems") from error
    if server.uds is not None:
        return "http+unix://" + str(server.uds).replace("%", "%25").replace("/", "%2F")
    if server.port == 0:
        raise AddressError("server.port is 0, so the port is not known; give --url")
    host = _WILDCARDS.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
