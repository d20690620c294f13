"""Studies of many complete trials, written as rows at once: what tests of speed and of whole studies share."""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, select, update

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult, NewStudy, NewTrial, Study
from orchestrator.tables import RunRow, StudyRow, TrialRow
from worker.report import TrialResult
from worker.spec import GangConfig

TTL = timedelta(minutes=1)
Crowd = Callable[..., Study]


def crowd_of(
    database: Database, new: NewStudy, first: NewTrial, result: TrialResult, now: datetime,
    rows: Iterable[dict[str, Any]],
) -> Study:  # fmt: skip
    """A study with one complete trial with a run for each of `rows`, which replace columns of the trial's row."""
    with database.write() as session:
        study = store.create_study(session, new, now)
        assert store.add_trial(session, study.id, first, now) is not None
        claim = leases.claim(session, GangConfig(), "host", now, TTL)
        assert claim is not None
        leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=result), now)
        trial, run = (
            dict(session.execute(select(row.__table__).order_by(row.__table__.c.id.desc()).limit(1)).mappings().one())
            for row in (TrialRow, RunRow)
        )
        del trial["id"], run["id"]
        made = [{**trial, "number": n, "spec_hash": f"{n:064}", **changes} for n, changes in enumerate(rows, 1)]
        session.execute(insert(TrialRow), made)
        session.execute(update(StudyRow).where(StudyRow.id == study.id).values(next_number=1 + len(made)))
        added = session.scalars(select(TrialRow.id).where(TrialRow.study_id == study.id, TrialRow.number > 0))
        session.execute(insert(RunRow), [{**run, "trial_id": trial_id} for trial_id in added])
    return study
