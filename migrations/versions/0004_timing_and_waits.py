"""attempts may be void, and keep their hardware; runs and attempts keep when they were queued; runs may start cold

Revision: 0004
After: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BEFORE = "outcome IN ('succeeded', 'stopped', 'failed', 'preempted', 'lost')"
AFTER = "outcome IN ('succeeded', 'stopped', 'failed', 'preempted', 'lost', 'void')"


def upgrade() -> None:
    op.add_column("runs", sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE runs SET queued_at = created_at")
    op.add_column("runs", sa.Column("cold", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("attempts", sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("attempts", sa.Column("hardware", sa.JSON(none_as_null=True), nullable=True))
    op.create_index("ix_trials_kind", "trials", ["spec_hash"])
    _replace_check(BEFORE, AFTER)


def downgrade() -> None:
    op.execute("UPDATE attempts SET outcome = 'preempted' WHERE outcome = 'void'")  # as free of charge
    _replace_check(AFTER, BEFORE)
    op.drop_index("ix_trials_kind", "trials")
    op.drop_column("attempts", "hardware")
    op.drop_column("attempts", "queued_at")
    op.drop_column("runs", "cold")
    op.drop_column("runs", "queued_at")


def _replace_check(old: str, new: str) -> None:
    """Let ck_attempts_outcome say something else."""
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        op.drop_constraint(op.f("ck_attempts_outcome"), "attempts")
        op.create_check_constraint(op.f("ck_attempts_outcome"), "attempts", f"outcome IS NULL OR {new}")
        return
    # SQLite alters no constraint, and a copy of the table would break what refers to it. Its manual's way to change a
    # CHECK (lang_altertable, section 7): rewrite the stored text, and have every connection read it again.
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    rewritten = connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = 'attempts' AND instr(sql, ?)", (old, new, old)
    )
    assert rewritten.rowcount == 1, "the constraint is not as an earlier revision made it"
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
