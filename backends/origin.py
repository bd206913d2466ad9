"""Where a model server listens: the part of a URL that decides which connections can be shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

DEFAULT_PORTS: Final = {"http": 80, "https": 443, "http+unix": 0}


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port, or the path of a unix socket. Equal origins can share connections.

    `host` is lower-case and carries no brackets: `::1`, not `[::1]`. With `uds` set, the host is only a name
    for the Host header, and the port is 0.

    A name that ends in a dot (`engine.svc.cluster.local.`) is absolute: it is looked up as it stands, without the
    resolver's search domains. The server is told, and its certificate is compared with, the name without that dot.
    """

    scheme: str
    host: str
    port: int
    uds: str | None = None

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Read `http://h:p`, `https://h` or `http+unix://%2Fpath%2Fto.sock`; raises ValueError.

        >>> Origin.parse("http://[::1]:30000")
        Origin(scheme='http', host='::1', port=30000, uds=None)
        >>> Origin.parse("http+unix://%2Frun%2Fengine.sock").uds
        '/run/engine.sock'
        """
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS:
            raise ValueError(f"scheme must be one of {', '.join(DEFAULT_PORTS)}, not {parts.scheme!r}")
        if "@" in parts.netloc:
            raise ValueError("no user name or password in the address of a server, please")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError("an origin has no path, query or fragment")
        if parts.scheme == "http+unix":
            path = unquote(parts.netloc)
            if not path.startswith("/"):
                raise ValueError("http+unix needs an absolute, percent-encoded path: http+unix://%2Fpath%2Fto.sock")
            return cls("http+unix", "localhost", 0, path)
        if not parts.hostname or not all("!" <= c <= "~" for c in parts.hostname):
            raise ValueError("the host is missing or malformed (international names: write the xn-- form)")
        port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
        if port == 0:
            raise ValueError("port 0 cannot be connected to")
        return cls(parts.scheme, parts.hostname, port)

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def address(self) -> str:
        """What error messages call this server: `127.0.0.1:30000`, `[::1]:30000`, `unix:/run/engine.sock`."""
        return f"unix:{self.uds}" if self.uds is not None else f"{self._bracketed}:{self.port}"

    @property
    def host_header(self) -> bytes:
        """Value of the Host header; the port is left out when it is the scheme's own (RFC 9110 7.2)."""
        name = f"[{self.host}]" if ":" in self.host else self.server_name
        if self.uds is not None or self.port == DEFAULT_PORTS[self.scheme]:
            return name.encode("ascii")
        return f"{name}:{self.port}".encode("ascii")

    @property
    def server_name(self) -> str:
        """For TLS, which knows no absolute names (RFC 6066 §3), and certificates name none."""
        return self.host.removesuffix(".")

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        if self.uds is not None:
            return f"http+unix:{self.uds}"
        return f"{self.scheme}://{self.host_header.decode('ascii')}"
