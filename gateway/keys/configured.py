"""The keys and tenants that stand in the configuration, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.config.limits import StaticKey, Tenant
from gateway.keys.format import digest
from gateway.keys.records import KeyRecord, TenantRecord

STATIC = "static:"
"""How the ids of these keys begin."""


def static_records(keys: Sequence[StaticKey], pepper: bytes) -> list[KeyRecord]:
    """`keys.static`, each with a digest in place of its key. Nothing is shown of the key: it need not be random."""
    return [
        KeyRecord(
            id=STATIC + each.name,
            digest=digest(pepper, each.key.get_secret_value().encode()),
            tenant=each.tenant,
            name=each.name,
            models=each.models,
            adapters=each.adapters,
            regions=each.regions,
            priority_class=each.priority_class,
            deadline_ms=each.deadline_ms,
            max_output_tokens=each.max_output_tokens,
            limits=each.limits.limit_set(),
            metadata=dict(each.metadata),
            capture_content=each.capture_content,
        )
        for each in keys
    ]


def tenant_records(tenants: Mapping[str, Tenant]) -> dict[str, TenantRecord]:
    """The section `tenants`."""
    return {
        name: TenantRecord(
            name=name,
            weight=each.weight,
            limits=each.limits.limit_set(),
            user_limits=each.user_limits.limit_set(),
            model_limits={model: limits.limit_set() for model, limits in each.model_limits.items()},
            metadata=dict(each.metadata),
        )
        for name, each in tenants.items()
    }
