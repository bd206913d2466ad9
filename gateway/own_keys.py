"""The keys that the gateway itself is let in with at its backends: which there are, and what is known of each."""

from __future__ import annotations

from backends.dialects.protocol import Dialect
from gateway.config import Backend
from routing.credential import Credential, Credentials


def keys_of(backend: Backend) -> tuple[str, ...]:
    """The keys themselves, in the order in which they are used; none where requests go without."""
    if backend.api_keys is not None:
        return tuple(key.get_secret_value() for key in backend.api_keys)
    return () if backend.api_key is None else (backend.api_key.get_secret_value(),)


def credentials_of(backend: Backend, before: Backend | None, known: Credentials | None) -> Credentials | None:
    """The state of a backend's keys; None where it has none.

    What is known of a key that was there `before` stays known, unless keys are now sent in another way: then whoever
    changed that wants to see whether it helps.
    """
    keys = keys_of(backend)
    if not keys:
        return None
    states: dict[str, Credential] = {}
    same_way = before is not None and (before.key_header, before.headers) == (backend.key_header, backend.headers)
    if before is not None and known is not None and same_way:
        states = dict(zip(keys_of(before), known.keys, strict=True))
        if keys_of(before) == keys:
            return known
    ring = [states.get(key) or Credential() for key in keys]
    for position, state in enumerate(ring):
        state.position = position
    return Credentials(ring) if known is None else known.carry(ring)


def headers_with(key: str | None, backend: Backend, dialect: Dialect) -> list[tuple[str, str]]:
    """Headers that go with every request to the replicas, the key among them."""
    if key is None or backend.key_header is None:
        fields = dict(dialect.head_fields(key))
    else:
        fields = dict(dialect.head_fields(None))
        fields[backend.key_header.name.lower()] = f"{backend.key_header.scheme} {key}".strip()
    # The operator's own come last: `anthropic-version` can be set to another than the dialect's.
    return list({**fields, **backend.headers}.items())
