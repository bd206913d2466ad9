"""Who uses this database alone: the lease of a gateway whose limits are counted in its own memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "tidegate_sole",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("gateway", sa.String(64), nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("process_started", sa.BigInteger, nullable=False),
        sa.Column("since_unix_s", sa.Float, nullable=False),
        sa.Column("renewed_unix_s", sa.Float, nullable=False),
        sa.Column("renewals", sa.BigInteger, nullable=False),
    )
