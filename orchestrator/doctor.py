"""What does not belong, in the database and the folder of artifacts: found, and cleared where that loses nothing.

Evidence is kept: a row whose artifact is missing or damaged is only listed.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import Row, select, update
from sqlalchemy.orm import Session

from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore, DamagedArtifact, StoredFile
from orchestrator.database import Database
from orchestrator.errors import IllegalMove
from orchestrator.lifecycle import RunState, StudyState, TrialState
from orchestrator.study import Artifact
from orchestrator.tables import ArtifactRow, AttemptRow, RunRow, StudyRow, TrialRow

SETTLED = timedelta(hours=1)
"""What is younger may be on its way: an artifact is on disk before its row, and an orchestrator may yet return."""
ENDS_AS_LOST = "ends it as lost, and queues its run again"


class Kind(StrEnum):
    DAMAGED_ARTIFACT = "damaged artifact"
    STRAY_ARTIFACT = "artifact without a row"
    UNFINISHED_FILE = "unfinished file"
    OVERDUE_LEASE = "overdue lease"
    LEASE_WITHOUT_GANG = "lease without a gang"
    GANG_WITHOUT_LEASE = "gang without a lease"
    STOPPED_RUN = "queued in a stopped study"


@dataclass(frozen=True)
class Finding:
    """One thing that does not belong. `remedy` is what clearing does about it; None where it does nothing."""

    kind: Kind
    what: str
    where: str
    remedy: str | None
    file: StoredFile | None = None


def examine(database: Database, artifacts: ArtifactStore, now: datetime) -> list[Finding]:
    """Everything that does not belong. Reads every artifact that a row names; changes nothing."""
    files = list(artifacts.files())  # before the rows: a file that is put meanwhile has its row by then, or is not seen
    with database.read() as session:
        rows = _artifact_rows(session)
        found = [*_overdue_leases(session, now), *_stopped_runs(session)]
    named = {row.uri for row in rows}
    return [*_damaged(artifacts, rows), *_stray(files, named, now - SETTLED), *found]


def clear(
    database: Database, artifacts: ArtifactStore, findings: Sequence[Finding], now: datetime
) -> tuple[list[Finding], list[Finding]]:
    """Apply the remedies, each safe to repeat; what was cleared, and what remains."""
    with database.write() as session:
        leases.expire(session, now, grace=SETTLED)
    with database.read() as session:
        queued = _queued_in_stopped(session)
    for run in queued:
        _cancel(database, run, now)
    cleared: list[Finding] = []
    remaining: list[Finding] = []
    for finding in findings:
        file, can = finding.file, finding.remedy is not None
        gone = can and (file is None or artifacts.remove(file, now - SETTLED))
        (cleared if gone else remaining).append(finding)
    return cleared, remaining


def _artifact_rows(session: Session) -> Sequence[Row[int, str, int, str, int, str]]:
    return session.execute(
        select(ArtifactRow.attempt_id, ArtifactRow.uri, ArtifactRow.bytes, ArtifactRow.sha256,
               TrialRow.number, StudyRow.name)
        .join(AttemptRow, AttemptRow.id == ArtifactRow.attempt_id).join(RunRow, RunRow.id == AttemptRow.run_id)
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(StudyRow, StudyRow.id == TrialRow.study_id)
        .order_by(ArtifactRow.attempt_id)
    ).all()  # fmt: skip


def _damaged(artifacts: ArtifactStore, rows: Sequence[Row[int, str, int, str, int, str]]) -> Iterator[Finding]:
    said: dict[Artifact, str | None] = {}  # equal bytes are one file, and read once
    for attempt_id, uri, size, sha256, number, study in rows:
        artifact = Artifact(uri, size, sha256)
        if artifact not in said:
            try:
                artifacts.check(artifact)
                said[artifact] = None
            except DamagedArtifact as error:
                said[artifact] = str(error)
        if (wrong := said[artifact]) is not None:
            yield Finding(Kind.DAMAGED_ARTIFACT, wrong, place(attempt_id, number, study), None)


def _stray(files: Sequence[StoredFile], named: set[str], before: datetime) -> Iterator[Finding]:
    # With another database than the folder's, every artifact would look abandoned.
    ours = not any(file.whole for file in files) or any(file.uri in named for file in files)
    for file in files:
        if file.uri in named or file.put_at >= before:
            continue
        kind = Kind.STRAY_ARTIFACT if file.whole else Kind.UNFINISHED_FILE
        what = f"{file.bytes:,} bytes, put at {moment(file.put_at)}"
        if file.whole and not ours:
            what += ", in a folder of which this database names no file"
        yield Finding(kind, what, file.uri, None if file.whole and not ours else "deletes it", file)


def _overdue_leases(session: Session, now: datetime) -> Iterator[Finding]:
    overdue = session.execute(
        select(AttemptRow.id, AttemptRow.owner, AttemptRow.lease_expires_at, TrialRow.number, StudyRow.name)
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(AttemptRow.outcome.is_(None), AttemptRow.lease_expires_at <= now - SETTLED).order_by(AttemptRow.id)
    )  # fmt: skip
    for attempt_id, owner, expired_at, number, study in overdue:
        assert expired_at is not None, "an open attempt has a lease"
        what = f"held by {owner} until {moment(expired_at)}"
        yield Finding(Kind.OVERDUE_LEASE, what, place(attempt_id, number, study), ENDS_AS_LOST)


def _stopped_runs(session: Session) -> Iterator[Finding]:
    for run in _queued_in_stopped(session):
        what = f"run {run.id}, which no gang will take"
        yield Finding(Kind.STOPPED_RUN, what, f"trial {run.number} of {run.study}", "cancels it")


def _queued_in_stopped(session: Session) -> Sequence[Row[int, int, int, str, str]]:
    return session.execute(
        select(RunRow.id, TrialRow.study_id, TrialRow.number, TrialRow.state, StudyRow.name.label("study"))
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(RunRow.state == RunState.QUEUED, StudyRow.state == StudyState.STOPPED).order_by(RunRow.id)
    ).all()  # fmt: skip


def _cancel(database: Database, run: Row[int, int, int, str, str], now: datetime) -> None:
    """A queued trial is cancelled with its runs; of one that runs, or has ended, only this run is."""
    with suppress(IllegalMove), database.write() as session:  # somebody else has cancelled it meanwhile
        if run.state == TrialState.QUEUED:
            store.cancel_trial(session, run.study_id, run.number, now)
        else:
            guarded = update(RunRow).where(RunRow.id == run.id, RunRow.state == RunState.QUEUED)
            session.execute(guarded.values(state=RunState.CANCELLED))


def place(attempt_id: int, number: int, study: str) -> str:
    """Where a finding about an attempt is."""
    return f"attempt {attempt_id}, trial {number} of {study}"


def moment(at: datetime) -> str:
    """A time as findings say it."""
    return f"{at:%Y-%m-%d %H:%M} UTC"
