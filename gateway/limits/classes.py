"""How urgent a request is: its key's class, which the request itself may lower and never raise.

OpenAI's `service_tier` maps to classes as far as it says something about urgency: `priority` asks for the most urgent
class, which only a key of that class gets; `flex` (cheaper and slower) is batch work that waits long; `default`, `auto`
and tiers that are not known here leave the class of the key.
"""

from __future__ import annotations

from typing import Any

from gateway.errors import InvalidRequest
from gateway.store.places import Band

HEADER = "x-tidegate-class"

BANDS: dict[str, Band] = {band.name.lower(): band for band in Band}
"""The classes by their names."""

_TIERS = {"priority": Band.CRITICAL, "flex": Band.BATCH}
_BY_BYTES = {name.encode(): band for name, band in BANDS.items()}


def band_of(key_class: str | None, service_tier: Any = None, header: bytes | None = None) -> Band:
    """The class of one request.

    `key_class` is the key's (None, where nobody is asked for a key: standard), `service_tier` the field of the body as
    it came, `header` the value of `x-tidegate-class`. The least urgent of the three counts. Raises `InvalidRequest`
    for a class in the header that does not exist.
    """
    band = Band.STANDARD if key_class is None else BANDS[key_class]
    if service_tier is not None and isinstance(service_tier, str):
        band = max(band, _TIERS.get(service_tier, band))
    if header is None:
        return band
    asked = _BY_BYTES.get(header.strip().lower())
    if asked is None:
        raise InvalidRequest(
            f"The header {HEADER} must be one of {', '.join(BANDS)}; it can lower the class of your key.",
            param=HEADER,
            code="invalid_header",
        )
    return max(band, asked)


def waits_long(service_tier: Any) -> bool:
    """Whether the request may wait as long as it may run, instead of as long as a person would: `flex`."""
    return bool(service_tier == "flex")


def urgency(band: Band) -> int:
    """The class as a number for engines, relative to what requests without a number get there: 1, 0, -1, -2."""
    return int(Band.STANDARD - band)
