"""studies, trials, runs, attempts, measurements, artifacts, events

Revision: 0001
After: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_studies()
    _create_trials()
    _create_runs()
    _create_attempts()
    _create_measurements()
    _create_artifacts()
    _create_events()


def downgrade() -> None:
    for table in ("events", "artifacts", "measurements", "attempts", "runs", "trials", "studies"):
        op.drop_table(table)


def _create_studies() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("max_trials", sa.Integer(), nullable=False),
        sa.Column("next_number", sa.Integer(), nullable=False),
        sa.Column("proposed", sa.Integer(), nullable=False),
        sa.Column("refused", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('running', 'paused', 'stopped', 'complete')", name=op.f("ck_studies_state")),
        sa.CheckConstraint("proposed <= max_trials", name=op.f("ck_studies_proposed")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
        sa.UniqueConstraint("name", name=op.f("uq_studies_name")),
    )


def _create_trials() -> None:
    op.create_table(
        "trials",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("prediction", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("idempotency_key", sa.String(255), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("val_bpb", sa.Double(), nullable=True),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'complete', 'pruned', 'failed', 'cancelled', 'infeasible')",
            name=op.f("ck_trials_state"),
        ),
        sa.CheckConstraint("origin IN ('proposed', 'submitted')", name=op.f("ck_trials_origin")),
        sa.CheckConstraint("verdict IN ('fits', 'grey', 'cannot_fit')", name=op.f("ck_trials_verdict")),
        sa.CheckConstraint(
            "(state IN ('queued', 'running')) = (finished_at IS NULL)", name=op.f("ck_trials_finished_at")
        ),
        sa.CheckConstraint("state <> 'complete' OR result IS NOT NULL", name=op.f("ck_trials_result")),
        sa.CheckConstraint("(result IS NULL) = (val_bpb IS NULL)", name=op.f("ck_trials_val_bpb")),
        sa.CheckConstraint("(result IS NULL) = (artifact_bytes IS NULL)", name=op.f("ck_trials_artifact_bytes")),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_trials_study_id_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trials")),
        sa.UniqueConstraint("study_id", "idempotency_key", name="uq_trials_idempotency_key"),
        sa.UniqueConstraint("study_id", "number", name=op.f("uq_trials_study_id")),
    )
    op.create_index("ix_trials_spec_hash", "trials", ["study_id", "spec_hash"])
    op.create_index("ix_trials_state", "trials", ["study_id", "state"])
    _create_partial_index("uq_trials_proposed_spec", "trials", ["study_id", "spec_hash"], "origin = 'proposed'")


def _create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("budget", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("ranks", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(8), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'stopped', 'failed', 'cancelled')", name=op.f("ck_runs_state")
        ),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name=op.f("fk_runs_trial_id_trials")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("trial_id", "seed", "rung", name=op.f("uq_runs_trial_id")),
    )
    op.create_index("ix_runs_queue", "runs", ["state", "device", "ranks", "priority"])
    op.create_index(op.f("ix_runs_trial_id"), "runs", ["trial_id"])


def _create_attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("gang", sa.Text(), nullable=True),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("permanent", sa.Boolean(), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.String(64), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "outcome IS NULL OR outcome IN ('succeeded', 'stopped', 'failed', 'preempted', 'lost')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name=op.f("ck_attempts_finished_at")),
        sa.CheckConstraint("(outcome IS NULL) = (lease_token IS NOT NULL)", name=op.f("ck_attempts_lease_token")),
        sa.CheckConstraint(
            "(lease_token IS NULL) = (lease_expires_at IS NULL)", name=op.f("ck_attempts_lease_expires_at")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_attempts_run_id_runs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_attempts_run_id")),
    )
    op.create_index(op.f("ix_attempts_lease_expires_at"), "attempts", ["lease_expires_at"])
    _create_partial_index("uq_attempts_open", "attempts", ["run_id"], "outcome IS NULL")
    _create_partial_index("uq_attempts_succeeded", "attempts", ["run_id"], "outcome = 'succeeded'")


def _create_measurements() -> None:
    op.create_table(
        "measurements",
        sa.Column("attempt_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("elapsed_seconds", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempts.id"], name=op.f("fk_measurements_attempt_id_attempts")),
        sa.PrimaryKeyConstraint("attempt_id", "number", "name", name=op.f("pk_measurements")),
        sa.UniqueConstraint("attempt_id", "step", "name", name="uq_measurements_step_name"),
    )


def _create_artifacts() -> None:
    op.create_table(
        "artifacts",
        sa.Column("attempt_id", sa.Integer(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.CheckConstraint("bytes > 0", name=op.f("ck_artifacts_bytes")),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempts.id"], name=op.f("fk_artifacts_attempt_id_attempts")),
        sa.PrimaryKeyConstraint("attempt_id", name=op.f("pk_artifacts")),
    )
    op.create_index(op.f("ix_artifacts_sha256"), "artifacts", ["sha256"])


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("trial_number", sa.Integer(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_events_study_id_studies")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index("ix_events_study", "events", ["study_id", "id"])


def _create_partial_index(name: str, table: str, columns: list[str], where: str) -> None:
    """Unique among the rows that satisfy `where`."""
    op.create_index(name, table, columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
