"""Runs for executors that are not Ray: asked for, reported and told from outside, each under its lease.

Nobody need run an orchestrator for them: asking also expires what ran out, proposes where nothing waits, and completes
a study that has come to its end. Several orchestrators and servers may do the same beside each other.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.audit import add_audit
from orchestrator.database import Database
from orchestrator.errors import LeaseLost, OverBudget
from orchestrator.lifecycle import Outcome, StudyState
from orchestrator.records import check_result
from orchestrator.settings import EXECUTOR
from orchestrator.spending import Purses
from orchestrator.stopping import Stopping
from orchestrator.study import AttemptResult, Claim, Lease, Study
from orchestrator.tables import ATTEMPTS, AttemptRow, StudyRow
from worker.report import Directive, LogLine, Measurement, TrialResult
from worker.shape import FieldError
from worker.spec import GangConfig, TrialSpec

if TYPE_CHECKING:
    from orchestrator.supply import Supply

log = logging.getLogger(__name__)

GRACE = timedelta(seconds=10)
"""How long after its end a lease is still its holder's: an orchestrator may just be coming back to its database."""


@dataclass(frozen=True)
class Told:
    """How an attempt ended, as it was recorded: a success that was slower than its kind is void."""

    attempt_id: int
    outcome: Outcome
    reason: str


@dataclass
class _Desk:
    """What gives out the runs of one study, for one asker at a time. All of it is cache."""

    supply: "Supply"
    purses: Purses = field(default_factory=Purses)
    gave_up: dict[GangConfig, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Executors:
    """The desks of every study that is asked for, for callers on any threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._desks: dict[int, _Desk] = {}
        self._stopping = Stopping(database)

    def ask(
        self,
        study: str,
        gang: GangConfig | None,
        name: str,
        ttl: timedelta,
        clock: Callable[[], datetime],
        actor: str,
    ) -> Claim | None:
        """A run of the study for this executor's gang (the study's first shape, if it names none), under a new lease.

        One that waits, or else a new proposal, which may take seconds; None where there is nothing to do: the study
        does not run, its budget or its proposals are used up, or all that is left runs already. Raises NotFound.
        """
        with self._database.read() as session:
            found = store.get_study(session, study)
        shape = gang or found.definition.shapes[0]
        self._expire(clock())
        desk = self._desk(found.id)
        with desk.lock:
            try:
                while (claim := self._claim(desk, found, shape, name, ttl, clock(), actor)) is None:
                    if not self._provide(desk, found.name, shape, clock()):
                        return None
            except OverBudget as error:  # no other proposal would cost less
                if error.final:
                    desk.supply.stop(found, str(error), clock())
                return None
        log.info("trial %d started on executor %s", claim.trial_number, name)
        return claim

    def report(
        self,
        lease: Lease,
        phase: str | None,
        measurements: Sequence[Measurement],
        lines: Sequence[LogLine],
        ttl: timedelta,
        now: datetime,
    ) -> Directive:
        """Keep what the attempt has measured and logged, each once, and renew its lease; whether it is to go on.

        Raises LeaseLost.
        """
        with self._database.write() as session:
            leases.record(session, lease, phase, measurements, now, ttl, lines)
            stop = _told_to_stop(session, lease)
        if not stop and any("val_bpb" in measurement.metrics for measurement in measurements):
            stop = self._judge(lease, measurements, now)
        return Directive.STOP if stop else Directive.CONTINUE

    def require_held(self, lease: Lease) -> None:
        """Raises LeaseLost where the lease is not held any more."""
        with self._database.read() as session:
            leases.claim_of(session, lease)

    def tell(
        self, lease: Lease, ended: AttemptResult, artifacts: ArtifactStore | None, now: datetime, actor: str
    ) -> Told:
        """End the attempt; telling it again under the same lease gives the same answer, and changes nothing.

        Raises LeaseLost, InvalidSpec where the result cannot be of the attempt's spec, and FieldError where its
        artifact was not stored before.
        """
        with self._database.read() as session:
            told = _told(session, lease)
            if told is not None:
                return told
            claim = leases.claim_of(session, lease)
            asked = session.scalar(select(AttemptRow.reason).where(AttemptRow.id == lease.attempt_id))
        if ended.result is not None:
            ended = _with_artifact(ended, ended.result, claim.spec, artifacts)
        if ended.outcome is Outcome.STOPPED and asked:
            ended = replace(ended, reason=asked)
        try:
            with self._database.write() as session:
                recorded = leases.finish(session, lease, ended, now)
                known = update(ATTEMPTS).where(ATTEMPTS.c.id == lease.attempt_id)
                session.execute(known.values(told_sha256=_digest(lease)))
                subject = f"studies/{session.get_one(StudyRow, claim.study_id).name}/trials/{claim.trial_number}"
                add_audit(session, actor, "executor.tell", subject, now)
        except LeaseLost:  # told twice at once, perhaps
            with self._database.read() as session:
                told = _told(session, lease)
            if told is None:
                raise
            return told
        log.info("trial %d ended as %s %s", claim.trial_number, recorded.outcome, recorded.reason)
        return Told(lease.attempt_id, recorded.outcome, recorded.reason)

    def _desk(self, study_id: int) -> _Desk:
        from orchestrator.supply import Supply  # here: it brings Optuna, which a server does without until asked

        with self._lock:
            if study_id not in self._desks:
                self._desks[study_id] = _Desk(Supply(self._database))
            return self._desks[study_id]

    def _expire(self, now: datetime) -> None:
        with self._database.write() as session:
            lost = leases.expire(session, now, grace=GRACE)
        if lost:
            log.warning("%d attempts lost their lease and were queued again", lost)

    def _claim(
        self, desk: _Desk, study: Study, gang: GangConfig, name: str, ttl: timedelta, now: datetime, actor: str
    ) -> Claim | None:
        """None where nothing waits for this gang. Raises OverBudget."""
        with self._database.write() as session:
            claim = leases.claim(
                session, gang, EXECUTOR + name, now, ttl, name=name, purses=desk.purses, study_id=study.id
            )
            if claim is not None:
                subject = f"studies/{study.name}/trials/{claim.trial_number}"
                add_audit(session, actor, "executor.ask", subject, now)
        return claim

    def _provide(self, desk: _Desk, name: str, gang: GangConfig, now: datetime) -> bool:
        """Queue what the study wants next for this shape; whether there may be something to claim now. A study that
        wants nothing any more is completed."""
        with self._database.read() as session:
            study = store.get_study(session, name)
            enough = desk.purses.enough(session, [study], now)
        if study.state is not StudyState.RUNNING:
            return False
        if study.id in enough:
            desk.supply.stop(study, enough[study.id], now)
            return False
        shapes = desk.supply.shapes(study)
        if gang in shapes:
            added, why = desk.supply.add(study, gang, now)
            if added:
                desk.gave_up.clear()
                return True
            if why is not None:
                desk.gave_up[gang] = why
        exhausted = all(shape in desk.gave_up for shape in shapes)
        gave_up = "; ".join(dict.fromkeys(desk.gave_up.values())) if exhausted else None
        if desk.supply.replicate(study, gave_up, now):
            return True
        desk.supply.complete(study, gave_up, now)
        return False

    def _judge(self, lease: Lease, measurements: Sequence[Measurement], now: datetime) -> bool:
        """Whether the study's rule stops the attempt after what it has just measured; noted with it, if so."""
        with self._database.read() as session:
            claim = leases.claim_of(session, lease)
        with self._lock:
            why = self._stopping.look([(claim, measurements)], now).get(lease.attempt_id)
        if why is None:
            return False
        with self._database.write() as session:
            leases.ask_to_stop(session, lease, why)
        return True


def _told_to_stop(session: Session, lease: Lease) -> bool:
    return session.scalar(select(AttemptRow.reason).where(AttemptRow.id == lease.attempt_id)) is not None


def _told(session: Session, lease: Lease) -> Told | None:
    """What was told under this lease before."""
    row = session.execute(
        select(AttemptRow.outcome, AttemptRow.reason)
        .where(AttemptRow.id == lease.attempt_id, AttemptRow.told_sha256 == _digest(lease))
    ).one_or_none()  # fmt: skip
    return (
        None if row is None or row.outcome is None else Told(lease.attempt_id, Outcome(row.outcome), row.reason or "")
    )


def _digest(lease: Lease) -> str:
    return hashlib.sha256(lease.token.encode()).hexdigest()


def _with_artifact(
    ended: AttemptResult, result: TrialResult, spec: TrialSpec, artifacts: ArtifactStore | None
) -> AttemptResult:
    check_result(spec, result)
    if result.stopped != (ended.outcome is Outcome.STOPPED):
        raise FieldError("result.stopped", result.stopped, f"must be {not result.stopped} for outcome {ended.outcome}")
    stored = None if artifacts is None else artifacts.find(result.artifact_sha256, result.model_bytes)
    if stored is None:
        expected = f"must be of an artifact of {result.model_bytes:,} bytes that was stored before: PUT it first"
        raise FieldError("result.artifact_sha256", result.artifact_sha256, expected)
    return replace(ended, artifact=stored)
