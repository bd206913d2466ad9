"""Which names a listener answers to, so that no web page can have a browser talk to it.

A browser on the same machine reaches loopback listeners, and sends what any page tells it to: with the page's own host
name in `Host` after that name was made to resolve to 127.0.0.1 (DNS rebinding), or with the page's address in `Origin`
(a POST of `text/plain` needs no permission). Neither can be forged by a page, so a listener that asks nobody for a key
takes only names that are this machine's, or that the operator has listed.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.config import Settings
from gateway.config.values import is_loopback
from gateway.errors import GatewayError, InvalidRequest

ANY = "*"
_MOST_SEEN = 1000


class WrongHost(InvalidRequest):
    status = 421
    code = "invalid_host"


class ForeignOrigin(InvalidRequest):
    status = 403
    code = "foreign_origin"


class HostList:
    """The names that are meant. Host names and addresses, without ports."""

    def __init__(self, names: Iterable[str] = (), *, own: str) -> None:
        """`names` are in place of this machine's own: loopback names and `own`, the address that is listened on."""
        listed = [name.lower().strip("[]").removesuffix(".") for name in names]
        self._exact = frozenset(name for name in listed if not name.startswith("."))
        self._below = tuple(name for name in listed if name.startswith("."))
        self._own = None if listed else own.lower()
        self.seen: set[bytes] = set()
        """Values of `Host` that were let in, as they came: looked at once. Bounded, since ports are the client's."""

    def host_problem(self, value: bytes) -> GatewayError | None:
        """Why a `Host` is not this listener's; None when it is."""
        if not self.allows(host_name(value.decode("latin-1"))):
            return WrongHost(
                "The Host header does not name this listener. Its names are this machine's own, or those of "
                "allowed_hosts in the configuration."
            )
        if len(self.seen) < _MOST_SEEN:
            self.seen.add(value)
        return None

    def origin_problem(self, value: bytes) -> GatewayError | None:
        """Why a web page of this origin may not ask here; None when it may."""
        scheme, _, rest = value.decode("latin-1").partition("://")
        if ANY in self._exact or (scheme in ("http", "https") and self.allows(host_name(rest))):
            return None  # desktop programs have origins without a host: null, tauri://localhost
        return ForeignOrigin(
            "Web pages of other origins may not ask here; allowed_hosts in the configuration names those that may."
        )

    def allows(self, name: str) -> bool:
        """Whether a name without port is one of them; in lower case."""
        if not name:
            return False
        if self._own is not None:
            return name == self._own or is_loopback(name)
        return name in self._exact or ANY in self._exact or name.endswith(self._below)


def host_name(value: str) -> str:
    """The name or address in a Host header, without port and brackets; empty when it is malformed."""
    if value.startswith("["):
        name, _, rest = value[1:].partition("]")
    else:
        name, colon, rest = value.partition(":")
        rest = colon + rest
    port = rest.removeprefix(":")
    if rest and (not rest.startswith(":") or (port and not (port.isascii() and port.isdigit()))):
        return ""
    return name.lower().removesuffix(".")


def hosts_of(settings: Settings) -> HostList | None:
    """The names of the clients' listener; None: any will do."""
    server = settings.server
    if server.allowed_hosts:
        return HostList(server.allowed_hosts, own=server.host)
    # Pages cannot connect to Unix sockets, and have no key.
    if settings.auth == "insecure" and server.uds is None:
        return HostList(own=server.host)
    return None
