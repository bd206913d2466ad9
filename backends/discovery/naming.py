"""Names for replicas that nobody has named: made from the address alone, so that they stay when others come and go."""

from __future__ import annotations

import hashlib
import ipaddress
import re

LONGEST = 80
"""Of a replica's name, as in the configuration."""


def name_of(pool: str, host: str, port: int) -> str:
    """At most 80 letters, digits, dots, dashes and underscores; different for different addresses.

    IPv6 addresses are written in full: shortened ones of different addresses look alike without their colons.

    >>> name_of("chat", "10.0.0.5", 30000), name_of("chat", "2001:db8::1", 30000)
    ('chat-10.0.0.5-30000', 'chat-2001-db8-0-0-0-0-0-1-30000')
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        text = host.rstrip(".").lower()
    else:
        text = str(address)
        if isinstance(address, ipaddress.IPv6Address):
            text = "-".join(f"{int(group, 16):x}" for group in address.exploded.partition("%")[0].split(":"))
    whole = f"{pool}-{text}-{port}" if pool else f"{text}-{port}"
    name = re.sub(r"[^A-Za-z0-9._-]", "-", whole).lstrip("-._")
    if name == whole and len(name) <= LONGEST:
        return name
    # What was cut off or replaced still counts: by the end of the name, where a reader looks for it least.
    digest = hashlib.sha256(whole.encode()).hexdigest()[:10]
    return f"{name[: LONGEST - len(digest) - 1]}-{digest}"


def url_of(scheme: str, host: str, port: int) -> str:
    """
    >>> url_of("http", "::1", 30000)
    'http://[::1]:30000'
    """
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
