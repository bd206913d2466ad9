"""The tables. Their names begin with `tidegate_`, so that a database may be shared with other programs.

A change to this file needs a new revision under `migrations/versions` and its name in `REVISION`.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, LargeBinary, MetaData, String, Table, Text, false

REVISION = "0003"
"""The revision that this program reads and writes."""
SCHEMA_TABLE = "tidegate_schema"
"""Where alembic keeps the database's own revision."""

metadata = MetaData()

counters = Table(
    "tidegate_counters",
    metadata,
    # One row. Whoever changes a key or a tenant, or writes to the audit, updates it first and so waits for whoever was
    # before: versions and audit ids become visible in their order, without gaps. A sequence would give neither.
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("audit_id", BigInteger, nullable=False),
    Column("live_keys", BigInteger, nullable=False),
    Column("pepper_check", LargeBinary),
)

keys = Table(
    "tidegate_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("removed", Boolean, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("tenant", String(63), nullable=False),
    Column("name", Text, nullable=False),
    Column("hint", String(4), nullable=False),
    # JSON from here on where it says Text.
    Column("models", Text),
    Column("adapters", Text),
    Column("regions", Text, nullable=False),
    Column("priority_class", String(32), nullable=False),
    Column("deadline_ms", BigInteger),
    Column("max_output_tokens", BigInteger),
    Column("limits", Text, nullable=False),
    Column("raises", Text, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("created_unix_s", Float, nullable=False),
    Column("expires_unix_s", Float),
    Column("replaced_by", String(64)),
    Column("metadata", Text, nullable=False),
    Column("capture_content", Boolean, nullable=False, server_default=false()),
    Index("tidegate_keys_version", "version"),
    Index("tidegate_keys_tenant", "tenant"),
)

tenants = Table(
    "tidegate_tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("removed", Boolean, nullable=False),
    Column("weight", Float, nullable=False),
    Column("limits", Text, nullable=False),
    Column("user_limits", Text, nullable=False),
    Column("model_limits", Text, nullable=False),
    Column("raises", Text, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("metadata", Text, nullable=False),
    Index("tidegate_tenants_version", "version"),
)

spend = Table(
    "tidegate_spend",
    metadata,
    Column("period", String(32), primary_key=True),
    Column("scope", Text, primary_key=True),
    Column("micros", BigInteger, nullable=False),
)

spend_batches = Table(
    "tidegate_spend_batches",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("added_unix_s", Float, nullable=False),
    Index("tidegate_spend_batches_added", "added_unix_s"),
)

audit = Table(
    "tidegate_audit",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("time_unix_s", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(64), nullable=False),
    Column("object", Text, nullable=False),
    Column("diff", Text, nullable=False),
)

sole = Table(
    "tidegate_sole",
    metadata,
    # At most one row, of the gateway that counts limits in its own memory: see `sole`.
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("gateway", String(64), nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("machine", Text, nullable=False),
    Column("process_started", BigInteger, nullable=False),
    Column("since_unix_s", Float, nullable=False),
    Column("renewed_unix_s", Float, nullable=False),
    Column("renewals", BigInteger, nullable=False),
)
