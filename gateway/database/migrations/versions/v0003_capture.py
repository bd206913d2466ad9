"""Keys whose requests' and answers' texts go into their traces."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("tidegate_keys", sa.Column("capture_content", sa.Boolean, nullable=False, server_default=sa.false()))
