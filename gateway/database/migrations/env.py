"""alembic's entry: run what is due on the connection, and within the transaction, that the program hands over."""

from __future__ import annotations

from alembic import context

from gateway.database.tables import SCHEMA_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=SCHEMA_TABLE
)
with context.begin_transaction():
    context.run_migrations()
