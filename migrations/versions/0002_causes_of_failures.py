"""attempts.cause: why an attempt failed

Revision: 0002
After: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

CHECK = (
    "cause IS NULL OR (outcome IS NOT NULL AND outcome = 'failed' AND "
    "cause IN ('crash', 'out_of_memory', 'hang', 'limit', 'diverged', 'bad_input', 'error'))"
)


def upgrade() -> None:
    # As one column with its constraint: SQLite adds no constraint to a table, and a copy of this one would break what
    # refers to it.
    op.execute(f"ALTER TABLE attempts ADD COLUMN cause VARCHAR(16) CONSTRAINT ck_attempts_cause CHECK ({CHECK})")


def downgrade() -> None:
    op.drop_column("attempts", "cause")
