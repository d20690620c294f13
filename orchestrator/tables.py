"""The tables, and the invariants that the database itself keeps. One set for SQLite and PostgreSQL."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from orchestrator.lifecycle import OPEN_TRIALS, Cause, Outcome, RunState, StudyState, TrialState


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on both databases; SQLite keeps it without its zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetimes do not enter the database"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class AnyText(TypeDecorator[str]):
    """Text that may come from a gang or a log. What PostgreSQL cannot keep becomes U+FFFD (NUL) or ? (surrogates)."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd").encode(errors="replace").decode()


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, datetime: UtcDateTime}


def _one_of(column: str, values: type[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


_OPEN = ", ".join(repr(state.value) for state in sorted(OPEN_TRIALS))


class StudyRow(Base):
    __tablename__ = "studies"
    __table_args__ = (
        CheckConstraint(_one_of("state", StudyState), name="state"),
        CheckConstraint("proposed <= max_trials", name="proposed"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    definition: Mapped[dict[str, Any]]
    """A NewStudy, as JSON; after creation only its budget may change: `max_trials` and `spending`."""
    max_trials: Mapped[int]
    next_number: Mapped[int] = mapped_column(default=0)
    proposed: Mapped[int] = mapped_column(default=0)
    refused: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str | None] = mapped_column(AnyText)
    """Why the study last changed state by itself."""
    created_at: Mapped[datetime]
    changed_at: Mapped[datetime]
    """When the state last changed."""
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    """Whose runs start first, higher before lower, where studies share gangs."""
    archived_at: Mapped[datetime | None]
    """Since when it is left out of lists. Only a study that is stopped or complete can be."""


class TrialRow(Base):
    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("study_id", "number"),
        UniqueConstraint("study_id", "idempotency_key", name="uq_trials_idempotency_key"),
        CheckConstraint(_one_of("state", TrialState), name="state"),
        CheckConstraint("origin IN ('proposed', 'submitted', 'imported')", name="origin"),
        CheckConstraint("verdict IN ('fits', 'grey', 'cannot_fit')", name="verdict"),
        CheckConstraint(f"(state IN ({_OPEN})) = (finished_at IS NULL)", name="finished_at"),
        CheckConstraint("state <> 'complete' OR result IS NOT NULL", name="result"),
        CheckConstraint("(result IS NULL) = (val_bpb IS NULL)", name="val_bpb"),
        CheckConstraint("(result IS NULL) = (artifact_bytes IS NULL)", name="artifact_bytes"),
        CheckConstraint("(result IS NULL) = (feasible IS NULL)", name="feasible"),
        Index("ix_trials_state", "study_id", "state"),
        Index("ix_trials_spec_hash", "study_id", "spec_hash"),
        Index("ix_trials_kind", "spec_hash"),
        Index(
            "uq_trials_proposed_spec",
            "study_id",
            "spec_hash",
            unique=True,
            sqlite_where=text("origin = 'proposed'"),
            postgresql_where=text("origin = 'proposed'"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    origin: Mapped[str] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]]
    spec_hash: Mapped[str] = mapped_column(String(64))
    params: Mapped[dict[str, Any]]
    prediction: Mapped[dict[str, Any]]
    verdict: Mapped[str] = mapped_column(String(16))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    reason: Mapped[str | None] = mapped_column(AnyText)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """A TrialResult, from the run that decided the trial's state."""
    val_bpb: Mapped[float | None]
    artifact_bytes: Mapped[int | None] = mapped_column(BigInteger)
    feasible: Mapped[bool | None]
    """Whether the result keeps every cap of the study."""
    suggestion: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """A Suggestion: what a proposal came from."""
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    """When its first attempt started."""
    finished_at: Mapped[datetime | None]


class RunRow(Base):
    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("trial_id", "seed", "rung"),
        CheckConstraint(_one_of("state", RunState), name="state"),
        Index("uq_runs_idempotency_key", "trial_id", "idempotency_key", unique=True),
        Index("ix_runs_queue", "state", "device", "ranks", "priority"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id"), index=True)
    seed: Mapped[int] = mapped_column(BigInteger)
    rung: Mapped[int] = mapped_column(default=0)
    """0 is the spec's own budget; -1 the dearest of the cheaper rungs, and so on down."""
    budget: Mapped[dict[str, Any]]
    """A BudgetConfig: the spec's own, or a cheaper one."""
    state: Mapped[str] = mapped_column(String(16))
    ranks: Mapped[int]
    device: Mapped[str] = mapped_column(String(8))
    priority: Mapped[int] = mapped_column(default=0)
    """Higher first; submitted trials come before proposed ones."""
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]
    """When it last entered the queue."""
    cold: Mapped[bool] = mapped_column(server_default=false())
    """Whether it wants a gang that has run nothing before."""
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    """Of the submission that asked for this seed, where its trial was there already."""
    scores: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """A Scores, of the attempt that succeeded or was stopped with a result."""
    forgiven: Mapped[int] = mapped_column(server_default=text("0"))
    """Attempts up to this number no longer count against it: it was retried after them."""
    spared_at: Mapped[float | None] = mapped_column(Float)
    """The fraction of the budget at which it would have been stopped, had it not been spared."""


class AttemptRow(Base):
    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("run_id", "number"),
        CheckConstraint(f"outcome IS NULL OR {_one_of('outcome', Outcome)}", name="outcome"),
        CheckConstraint(
            f"cause IS NULL OR (outcome IS NOT NULL AND outcome = 'failed' AND {_one_of('cause', Cause)})", name="cause"
        ),
        CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name="finished_at"),
        CheckConstraint("(outcome IS NULL) = (lease_token IS NOT NULL)", name="lease_token"),
        CheckConstraint("(lease_token IS NULL) = (lease_expires_at IS NULL)", name="lease_expires_at"),
        Index(
            "uq_attempts_open",
            "run_id",
            unique=True,
            sqlite_where=text("outcome IS NULL"),
            postgresql_where=text("outcome IS NULL"),
        ),
        Index(
            "uq_attempts_succeeded",
            "run_id",
            unique=True,
            sqlite_where=text("outcome = 'succeeded'"),
            postgresql_where=text("outcome = 'succeeded'"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    number: Mapped[int]
    owner: Mapped[str] = mapped_column(AnyText)
    """The orchestrator that claimed it."""
    gang: Mapped[str | None] = mapped_column(AnyText)
    phase: Mapped[str] = mapped_column(AnyText, default="queue")
    phase_since: Mapped[datetime | None]
    """When it entered its phase; None on attempts older than the ledger."""
    phase_seconds: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Seconds by phase, of the phases it has left."""
    outcome: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(AnyText)
    """Why it ended; of an open attempt of an executor, why it is to end early."""
    permanent: Mapped[bool] = mapped_column(default=False)
    cause: Mapped[str | None] = mapped_column(String(16))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    hardware: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The result's Hardware once more: what the timing of later attempts is judged by."""
    queued_at: Mapped[datetime | None]
    """When its run had entered the queue that it was claimed from; None on attempts older than the column."""
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None] = mapped_column(index=True)
    lease_token: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[datetime | None] = mapped_column(index=True)
    told_sha256: Mapped[str | None] = mapped_column(String(64))
    """Of the lease's token, where an executor told the end over HTTP: what it tells again changes nothing."""


class MeasurementRow(Base):
    __tablename__ = "measurements"
    __table_args__ = (UniqueConstraint("attempt_id", "step", "name", name="uq_measurements_step_name"),)

    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """The gang's own count of its messages, so that one delivered twice is kept once."""
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int]
    value: Mapped[float]
    elapsed_seconds: Mapped[float]


class ArtifactRow(Base):
    __tablename__ = "artifacts"
    __table_args__ = (CheckConstraint("bytes > 0", name="bytes"),)

    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"), primary_key=True)
    uri: Mapped[str] = mapped_column(Text)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)


class EventRow(Base):
    __tablename__ = "events"
    __table_args__ = (Index("ix_events_study", "study_id", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id"))
    trial_number: Mapped[int | None]
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(AnyText)


class LogRow(Base):
    """A line that an attempt's rank 0 logged, numbered by its gang from 1."""

    __tablename__ = "log_lines"

    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    elapsed_seconds: Mapped[float]
    """Since the attempt began, by its gang's clock."""
    line: Mapped[str] = mapped_column(AnyText)


class NoteRow(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id"), index=True)
    at: Mapped[datetime]
    author: Mapped[str] = mapped_column(AnyText)
    """The name of the token that wrote it."""
    text: Mapped[str] = mapped_column(AnyText)


class TagRow(Base):
    __tablename__ = "tags"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(64), primary_key=True)


class TokenRow(Base):
    """An access token, of which only the hash is kept."""

    __tablename__ = "tokens"
    __table_args__ = (CheckConstraint("role IN ('viewer', 'submitter', 'admin')", name="role"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class SignInRow(Base):
    """A browser that showed a token, until it signs out. What its cookie holds is kept as a hash alone."""

    __tablename__ = "sign_ins"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    token_sha256: Mapped[str] = mapped_column(String(64))
    """Of the token that was shown: the sign-in is worth as much as that is now. No foreign key, because the token may
    be the environment's, which has no row."""
    expires_at: Mapped[datetime] = mapped_column(index=True)


class AuditRow(Base):
    """One write through the API: who changed what, when. Committed with the change itself."""

    __tablename__ = "audits"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(AnyText)
    """The name of the token, or `local` where the door is open."""
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(AnyText)
    """The path of what was changed below /v1, such as studies/sweep/trials/3."""


STUDIES, TRIALS, RUNS, ATTEMPTS, EVENTS = (
    cast(Table, row.__table__) for row in (StudyRow, TrialRow, RunRow, AttemptRow, EventRow)
)
"""For the statements that every trial takes: an UPDATE of a mapped class costs three times as much time in Python."""
