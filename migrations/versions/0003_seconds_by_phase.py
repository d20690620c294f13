"""attempts.phase_since and attempts.phase_seconds: how long an attempt was in each phase

Revision: 0003
After: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("phase_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("attempts", sa.Column("phase_seconds", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "phase_seconds")
    op.drop_column("attempts", "phase_since")
