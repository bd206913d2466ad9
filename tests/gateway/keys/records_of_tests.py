"""Keys and tenants for tests."""

from __future__ import annotations

from typing import Any

from gateway.database.answers import Changes
from gateway.keys.directory import Directory, Freshness
from gateway.keys.format import digest, hint, mint, new_id
from gateway.keys.records import KeyRecord, TenantRecord

PEPPER = b"a pepper of the tests, 32 bytes!"
NOW = 1_800_000_000.0


def made(tenant: str = "acme", **fields: Any) -> tuple[str, KeyRecord]:
    """A key that was never issued before, and its record."""
    key = mint()
    return key, KeyRecord(
        id=new_id(), digest=digest(PEPPER, key.encode()), tenant=tenant, hint=hint(key), created_unix_s=NOW, **fields
    )


def directory_of(*records: KeyRecord, tenants: tuple[TenantRecord, ...] = ()) -> Directory:
    """One that knows these keys, and whose reading is current."""
    directory = Directory(PEPPER, freshness=Freshness.CURRENT)
    directory.apply(Changes(1, keys=records, tenants=tenants, complete=True))
    return directory


def bearing(key: str) -> list[tuple[bytes, bytes]]:
    """A request's headers, as a client of OpenAI's would send them."""
    return [(b"host", b"localhost"), (b"accept", b"*/*"), (b"authorization", b"Bearer " + key.encode())]
