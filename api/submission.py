"""Submitting a trial: predicted, judged, and added exactly once however often and however concurrently it is sent."""

import logging
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator import feasibility, store
from orchestrator.database import Database
from orchestrator.errors import Conflict
from orchestrator.lifecycle import TrialState
from orchestrator.points import Domain
from orchestrator.study import NewTrial, Study, Trial
from worker.spec import TrialSpec

log = logging.getLogger(__name__)

RECENT_TRIALS = 500  # what a prediction is calibrated on


@dataclass(frozen=True)
class Submitted:
    """The trial, and whether it was there already under the same idempotency key."""

    trial: Trial
    replayed: bool


def submit(
    database: Database,
    study: Study,
    spec: TrialSpec,
    now: datetime,
    *,
    key: str | None = None,
    allow_duplicate: bool = False,
) -> Submitted:
    """Add the trial, or find it where the key says that it was added before.

    Raises Conflict where the key belongs to another spec, or where a trial of the same canonical spec exists and
    duplicates are not allowed; IllegalMove where the study takes no trials. A refused submission leaves nothing behind.
    """
    with database.read() as session:
        replay = _replay(session, study, spec, key)
        history = recent_trials(session, study)
    if replay is not None:
        return Submitted(replay, replayed=True)
    prediction = feasibility.predict(spec, history)
    verdict, reason = feasibility.judge(prediction, study.definition, spec)
    params = Domain(study.definition.base, study.definition.space).partial(spec)
    new = NewTrial(spec, params, "submitted", prediction, verdict, reason, key)
    try:
        with database.write() as session:
            trial = store.add_trial(session, study.id, new, now)
            assert trial is not None, "only proposals come too late"
            # After the insert: it holds the study's row, so that no other submission can slip in between.
            if not allow_duplicate:
                _refuse_duplicate(session, study, trial)
    except IntegrityError:
        with database.read() as session:
            replay = _replay(session, study, spec, key)
        if replay is None:
            raise
        return Submitted(replay, replayed=True)
    log.info(
        "trial %d of study %s was submitted: %s", trial.number, study.name, trial.state, extra={"trial_id": trial.id}
    )
    return Submitted(trial, replayed=False)


def recent_trials(session: Session, study: Study) -> tuple[Trial, ...]:
    """The study's latest complete trials, which say how far predictions are off."""
    total = sum(store.count_trials(session, study.id).values())
    return store.list_trials(session, study.id, states=(TrialState.COMPLETE,), after=total - 1 - RECENT_TRIALS)


def _replay(session: Session, study: Study, spec: TrialSpec, key: str | None) -> Trial | None:
    if key is None:
        return None
    found = store.find_trial(session, study.id, idempotency_key=key)
    if found is not None and found.spec != spec:
        message = f"was used for trial {found.number}, which has another spec"
        raise Conflict("Idempotency-Key", key, message, existing=_name(study, found))
    return found


def _refuse_duplicate(session: Session, study: Study, trial: Trial) -> None:
    first = store.find_trial(session, study.id, spec_hash=trial.spec_hash)
    if first is not None and first.number != trial.number:
        message = f"trial {first.number} ({first.state}) has the same configuration; allow_duplicate adds another"
        raise Conflict("spec", trial.spec_hash, message, existing=_name(study, first))


def _name(study: Study, trial: Trial) -> str:
    return f"/v1/studies/{study.name}/trials/{trial.number}"
