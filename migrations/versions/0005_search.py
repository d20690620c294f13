"""trials keep what proposed them and whether they keep every cap, and may be imported; runs keep their scores

Revision: 0005
After: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BEFORE = "origin IN ('proposed', 'submitted')"
AFTER = "origin IN ('proposed', 'submitted', 'imported')"
BYTES = "(result IS NULL) = (artifact_bytes IS NULL)"
UNCAPPED = 1e9
FEASIBLE = "(result IS NULL) = (feasible IS NULL)"


def upgrade() -> None:
    op.add_column("trials", sa.Column("suggestion", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("trials", sa.Column("feasible", sa.Boolean(), nullable=True))
    op.add_column("runs", sa.Column("idempotency_key", sa.String(255), nullable=True))
    op.add_column("runs", sa.Column("scores", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("runs", sa.Column("spared_at", sa.Float(), nullable=True))
    op.create_index("uq_runs_idempotency_key", "runs", ["trial_id", "idempotency_key"], unique=True)
    _score(op.get_bind())
    if op.get_bind().dialect.name == "sqlite":
        _rewrite(BEFORE, AFTER)
        kept = f"CONSTRAINT ck_trials_artifact_bytes CHECK ({BYTES})"
        _rewrite(kept, f"{kept}, CONSTRAINT ck_trials_feasible CHECK ({FEASIBLE})")
    else:
        op.drop_constraint(op.f("ck_trials_origin"), "trials")
        op.create_check_constraint(op.f("ck_trials_origin"), "trials", AFTER)
        op.create_check_constraint(op.f("ck_trials_feasible"), "trials", FEASIBLE)


def downgrade() -> None:
    op.execute("UPDATE trials SET origin = 'submitted' WHERE origin = 'imported'")
    if op.get_bind().dialect.name == "sqlite":
        _rewrite(AFTER, BEFORE)
        _rewrite(f", CONSTRAINT ck_trials_feasible CHECK ({FEASIBLE})", "")
    else:
        op.drop_constraint(op.f("ck_trials_feasible"), "trials")
        op.drop_constraint(op.f("ck_trials_origin"), "trials")
        op.create_check_constraint(op.f("ck_trials_origin"), "trials", BEFORE)
    op.drop_index("uq_runs_idempotency_key", "runs")
    for column in ("spared_at", "scores", "idempotency_key"):
        op.drop_column("runs", column)
    for column in ("feasible", "suggestion"):
        op.drop_column("trials", column)


def _score(connection: sa.Connection) -> None:
    """Take over what earlier results say, by the one cap that their studies had. A trial had one run then."""
    studies = sa.table("studies", sa.column("id"), sa.column("definition", sa.JSON()))
    result, kept = sa.column("result", sa.JSON()), sa.column("feasible", sa.Boolean())
    trials = sa.table("trials", sa.column("id"), sa.column("study_id"), result, kept)
    runs = sa.table("runs", sa.column("trial_id"), sa.column("scores", sa.JSON()))
    caps = {row.id: row.definition.get("cap_bytes") for row in connection.execute(sa.select(studies))}
    scored = sa.select(trials.c.id, trials.c.study_id, trials.c.result).where(trials.c.feasible.is_(None))
    for study in connection.execute(sa.select(studies)).all():  # seconds had no cap
        uncapped = {**study.definition, "cap_train_seconds": UNCAPPED, "cap_evaluate_seconds": UNCAPPED}
        connection.execute(sa.update(studies).where(studies.c.id == study.id).values(definition=uncapped))
    for row in connection.execute(scored.order_by(trials.c.id)).all():
        if row.result is None:
            continue
        named = ("val_bpb", "val_loss", "artifact_bytes", "train_seconds", "evaluate_seconds")
        feasible = row.result["artifact_bytes"] <= caps[row.study_id]
        scores = {**{name: row.result[name] for name in named}, "feasible": feasible}
        connection.execute(sa.update(trials).where(trials.c.id == row.id).values(feasible=feasible))
        connection.execute(sa.update(runs).where(runs.c.trial_id == row.id).values(scores=scores))


def _rewrite(old: str, new: str) -> None:
    """Let the stored text of SQLite's table say something else, as revision 0004 does, and for its reasons."""
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    rewritten = connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = 'trials' AND instr(sql, ?)", (old, new, old)
    )
    assert rewritten.rowcount == 1, "the constraint is not as an earlier revision made it"
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
