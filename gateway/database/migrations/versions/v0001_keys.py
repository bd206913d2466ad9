"""Keys, tenants, spend of record and the audit.

A revision says what was done then: it repeats the tables and imports nothing that later versions change.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SQLITE_APPEND_ONLY = (
    "CREATE TRIGGER tidegate_audit_update BEFORE UPDATE ON tidegate_audit"
    " BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END",
    "CREATE TRIGGER tidegate_audit_delete BEFORE DELETE ON tidegate_audit"
    " BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END",
    # INSERT OR REPLACE deletes without asking the trigger above.
    "CREATE TRIGGER tidegate_audit_replace BEFORE INSERT ON tidegate_audit"
    " WHEN EXISTS (SELECT 1 FROM tidegate_audit WHERE id = NEW.id)"
    " BEGIN SELECT RAISE(ABORT, 'the audit is append-only'); END",
)
_POSTGRESQL_APPEND_ONLY = (
    "CREATE FUNCTION tidegate_audit_append_only() RETURNS trigger LANGUAGE plpgsql"
    " AS $$ BEGIN RAISE EXCEPTION 'the audit is append-only'; END $$",
    "CREATE TRIGGER tidegate_audit_change BEFORE UPDATE OR DELETE ON tidegate_audit"
    " FOR EACH ROW EXECUTE FUNCTION tidegate_audit_append_only()",
    "CREATE TRIGGER tidegate_audit_truncate BEFORE TRUNCATE ON tidegate_audit"
    " FOR EACH STATEMENT EXECUTE FUNCTION tidegate_audit_append_only()",
)


def upgrade() -> None:
    counters = op.create_table(
        "tidegate_counters",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("audit_id", sa.BigInteger, nullable=False),
        sa.Column("live_keys", sa.BigInteger, nullable=False),
        sa.Column("pepper_check", sa.LargeBinary),
    )
    op.bulk_insert(counters, [{"id": 1, "version": 0, "audit_id": 0, "live_keys": 0}])
    _directory()
    op.create_table(
        "tidegate_spend",
        sa.Column("period", sa.String(32), primary_key=True),
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("micros", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "tidegate_spend_batches",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("added_unix_s", sa.Float, nullable=False),
    )
    op.create_index("tidegate_spend_batches_added", "tidegate_spend_batches", ["added_unix_s"])
    op.create_table(
        "tidegate_audit",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_unix_s", sa.Float, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("object", sa.Text, nullable=False),
        sa.Column("diff", sa.Text, nullable=False),
    )
    sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in _SQLITE_APPEND_ONLY if sqlite else _POSTGRESQL_APPEND_ONLY:
        op.get_bind().exec_driver_sql(statement)


def _directory() -> None:
    op.create_table(
        "tidegate_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hint", sa.String(4), nullable=False),
        sa.Column("models", sa.Text),
        sa.Column("adapters", sa.Text),
        sa.Column("regions", sa.Text, nullable=False),
        sa.Column("priority_class", sa.String(32), nullable=False),
        sa.Column("deadline_ms", sa.BigInteger),
        sa.Column("max_output_tokens", sa.BigInteger),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("raises", sa.Text, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("created_unix_s", sa.Float, nullable=False),
        sa.Column("expires_unix_s", sa.Float),
        sa.Column("replaced_by", sa.String(64)),
        sa.Column("metadata", sa.Text, nullable=False),
    )
    op.create_index("tidegate_keys_version", "tidegate_keys", ["version"])
    op.create_index("tidegate_keys_tenant", "tidegate_keys", ["tenant"])
    op.create_table(
        "tidegate_tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("user_limits", sa.Text, nullable=False),
        sa.Column("model_limits", sa.Text, nullable=False),
        sa.Column("raises", sa.Text, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
    )
    op.create_index("tidegate_tenants_version", "tidegate_tenants", ["version"])
