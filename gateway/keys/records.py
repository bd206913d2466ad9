"""What is on record about keys and tenants: as the database, the directory and the admin API hold it."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.limits.sets import LimitSet, Raise

PRIORITY_CLASSES = ("critical", "standard", "batch", "sheddable")
"""Names of `gateway.store.places.Band`, the most urgent first."""


class TenantRecord(msgspec.Struct, frozen=True):
    """Whose keys they are. Tenants that only the configuration or only the database knows are tenants as well."""

    name: str
    weight: float = 1.0
    """Share of a busy pool relative to other tenants', above 0."""
    limits: LimitSet = LimitSet()
    user_limits: LimitSet = LimitSet()
    """For each end user (`user` or `safety_identifier` of a request) of this tenant."""
    model_limits: dict[str, LimitSet] = {}
    """For this tenant's use of each model, by its name."""
    raises: tuple[Raise, ...] = ()
    """Temporary changes of `limits`."""
    disabled: bool = False
    metadata: dict[str, Any] = {}


class KeyRecord(msgspec.Struct, frozen=True):
    """One API key, without the key: it is kept as a keyed digest only, and shown once."""

    id: str
    """`key_` and 16 characters; what logs, metrics and commands name it by."""
    digest: bytes
    """HMAC-SHA-256 of the whole key under the server's pepper."""
    tenant: str
    name: str = ""
    """The operator's own word for it."""
    hint: str = ""
    """The key's last four characters."""
    models: tuple[str, ...] | None = None
    """Models it may use, by name (aliases count as their model); None: all."""
    adapters: tuple[str, ...] | None = None
    """LoRA adapters it may use; None: all."""
    regions: tuple[str, ...] = ()
    """The only regions its requests may be served in; empty: any."""
    priority_class: str = "standard"
    deadline_ms: int | None = None
    """Its requests' deadline where they name none."""
    max_output_tokens: int | None = None
    """What a request without `max_tokens` gets in hard mode, and the most it may ask for in any; None: no limit."""
    limits: LimitSet = LimitSet()
    raises: tuple[Raise, ...] = ()
    disabled: bool = False
    created_unix_s: float = 0.0
    expires_unix_s: float | None = None
    """From then on it is as if it had never been."""
    replaced_by: str | None = None
    """The key that took its place in a rotation."""
    metadata: dict[str, Any] = {}
    capture_content: bool = False
    """The texts of its requests and their answers go into their traces."""
