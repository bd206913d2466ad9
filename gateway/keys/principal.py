"""Who sends a request, and what that one may ask for."""

from __future__ import annotations

import msgspec

from gateway.keys.errors import AdapterNotAllowed, Forbidden, ModelNotAllowed, RegionNotAllowed
from gateway.keys.records import KeyRecord, TenantRecord

ANONYMOUS = TenantRecord(name="default")
"""The tenant of every request where there are no keys (`auth: insecure`) and the configuration says nothing of it."""


class Principal(msgspec.Struct, frozen=True, weakref=True, eq=False):
    """A key and its tenant as they are now. A change of either makes a new one, so identity is enough for a cache."""

    key: KeyRecord | None
    """None: `auth: insecure`, whoever can connect."""
    tenant: TenantRecord

    @property
    def key_id(self) -> str:
        """What records and metrics name it by; empty where there are no keys."""
        return "" if self.key is None else self.key.id


def authorise(principal: Principal, model: str, adapter: str | None = None) -> None:
    """Raise `ModelNotAllowed` or `AdapterNotAllowed` unless the key may use the model, and the adapter if one is named.

    `model` is the model's own name, or what the client sent where no model goes by that: asked before the model is
    looked for, it gives the same answer for a model that does not exist as for one that is kept from this key.
    """
    key = principal.key
    if key is None:
        return
    if key.models is not None and model not in key.models:
        raise ModelNotAllowed("This API key may not use the model asked for.", param="model")
    if adapter is not None and key.adapters is not None and adapter not in key.adapters:
        raise AdapterNotAllowed("This API key may not use the adapter asked for.", param="model")


def may_use(principal: Principal, model: str, adapter: str | None = None) -> bool:
    """The same as an answer."""
    try:
        authorise(principal, model, adapter)
    except Forbidden:
        return False
    return True


def allowed_regions(principal: Principal, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Where the request may be served: what it asks for, of what its key allows. Empty: anywhere.

    Raises `RegionNotAllowed` when nothing is left.
    """
    key = principal.key
    if key is None or not key.regions:
        return asked
    if not asked:
        return key.regions
    both = tuple(region for region in asked if region in key.regions)
    if not both:
        raise RegionNotAllowed("This API key may not be served in the region asked for.", param="x-tidegate-region")
    return both
