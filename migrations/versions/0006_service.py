"""tokens and an audit of what they wrote; notes, tags and logs; studies have a priority and can be archived

Revision: 0006
After: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ROLES = "role IN ('viewer', 'submitter', 'admin')"


def upgrade() -> None:
    op.add_column("studies", sa.Column("priority", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("studies", sa.Column("archived_at", _when(), nullable=True))
    op.add_column("runs", sa.Column("forgiven", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("attempts", sa.Column("told_sha256", sa.String(64), nullable=True))
    op.create_index("ix_attempts_finished_at", "attempts", ["finished_at"])
    op.create_table(
        "log_lines",
        sa.Column("attempt_id", sa.Integer(), sa.ForeignKey("attempts.id"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("elapsed_seconds", sa.Double(), nullable=False),
        sa.Column("line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("attempt_id", "number"),
    )
    op.create_table(
        "notes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.Integer(), sa.ForeignKey("trials.id"), nullable=False, index=True),
        sa.Column("at", _when(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "tags",
        sa.Column("trial_id", sa.Integer(), sa.ForeignKey("trials.id"), nullable=False),
        sa.Column("tag", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("trial_id", "tag"),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", _when(), nullable=False),
        sa.Column("expires_at", _when(), nullable=True),
        sa.Column("revoked_at", _when(), nullable=True),
        sa.Column("last_used_at", _when(), nullable=True),
        sa.CheckConstraint(ROLES, name="role"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("sha256"),
    )
    op.create_table(
        "sign_ins",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("token_sha256", sa.String(64), nullable=False),
        sa.Column("expires_at", _when(), nullable=False, index=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audits",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", _when(), nullable=False, index=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def downgrade() -> None:
    for table in ("audits", "sign_ins", "tokens", "tags", "notes", "log_lines"):
        op.drop_table(table)
    op.drop_index("ix_attempts_finished_at", "attempts")
    op.drop_column("attempts", "told_sha256")
    for column in ("archived_at", "priority"):
        op.drop_column("studies", column)
    op.drop_column("runs", "forgiven")


def _when() -> sa.DateTime:
    return sa.DateTime(timezone=True)
