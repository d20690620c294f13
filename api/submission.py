"""Submitting a trial: predicted, judged, and added exactly once however often and however concurrently it is sent."""

import logging
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from api.context import Writer
from orchestrator import feasibility, seeds, store
from orchestrator.errors import Conflict
from orchestrator.lifecycle import TrialState
from orchestrator.points import Domain
from orchestrator.replicates import next_seed
from orchestrator.study import NewTrial, ReplicationConfig, Study, Trial
from worker.spec import TrialSpec

log = logging.getLogger(__name__)

RECENT_TRIALS = 500  # what a prediction is calibrated on


@dataclass(frozen=True)
class Submitted:
    """The trial, its run at the seed that was asked for, and whether both were there already under the same key."""

    trial: Trial
    run_id: int | None
    """None where the trial is infeasible."""
    replayed: bool = False


def submit(
    writer: Writer,
    study: Study,
    spec: TrialSpec,
    *,
    key: str | None = None,
    allow_duplicate: bool = False,
) -> Submitted:
    """Add the trial, or find it where the key says that it was added before.

    A duplicate of a complete trial is that trial's next replicate: where duplicates are allowed, it gets a run at the
    spec's seed or, if it has one there, at the next seed of the study's list. A duplicate of one that is open, or
    ended in any other way, is a trial of its own.

    Raises Conflict where the key belongs to another spec, where a trial of the same canonical spec exists and
    duplicates are not allowed, or where no seed is left; IllegalMove where the study takes no trials. A refused
    submission leaves nothing behind.
    """
    with writer.database.read() as session:
        replay = _replay(session, study, spec, key)
        history = recent_trials(session, study)
    if replay is not None:
        return replay
    prediction = feasibility.predict(spec, history)
    verdict, reason = feasibility.judge(prediction, study.definition, spec)
    params = Domain(study.definition.base, study.definition.space).partial(spec)
    new = NewTrial(spec, params, "submitted", prediction, verdict, reason, key)
    with writer.write("trial.submit", f"studies/{study.name}") as session:
        store.hold_study(session, study.id)  # from here on no other submission can slip in between
        submitted = _replay(session, study, spec, key) or _add(session, study, new, writer.now, allow_duplicate)
    trial = submitted.trial
    log.info(
        "trial %d of study %s was submitted: %s", trial.number, study.name, trial.state, extra={"trial_id": trial.id}
    )
    return submitted


def recent_trials(session: Session, study: Study) -> tuple[Trial, ...]:
    """The study's latest complete trials, which say how far predictions are off."""
    total = sum(store.count_trials(session, study.id).values())
    return store.list_trials(session, study.id, states=(TrialState.COMPLETE,), after=total - 1 - RECENT_TRIALS)


def _replay(session: Session, study: Study, spec: TrialSpec, key: str | None) -> Submitted | None:
    """What a submission under this key made before, as a trial or as a further seed of one."""
    if key is None:
        return None
    trial = store.find_trial(session, study.id, idempotency_key=key)
    run = seeds.find_seed(session, study.id, key) if trial is None else None
    if run is not None:
        trial = store.get_trial(session, study.id, seeds.number_of(session, run))
    if trial is None:
        return None
    runs = store.list_runs(session, trial.id)
    if run is None:
        same, run_id = trial.spec == spec, runs[0].id if runs else None
    else:  # at the seed that was asked for, or at another because that one had a run
        had = {earlier.seed for earlier in runs if earlier.rung == 0 and earlier.id <= run.id}
        same, run_id = spec.canonical_hash == trial.spec_hash and spec.seed in had, run.id
    if not same:
        message = f"was used for trial {trial.number}, which has another spec"
        raise Conflict("Idempotency-Key", key, message, existing=_name(study, trial))
    return Submitted(trial, run_id, replayed=True)


def _add(session: Session, study: Study, new: NewTrial, now: datetime, allow_duplicate: bool) -> Submitted:
    if allow_duplicate:
        twin = store.find_trial(session, study.id, spec_hash=new.spec.canonical_hash, state=TrialState.COMPLETE)
        if twin is not None:
            return _add_seed(session, study, twin, new, now)
    trial = store.add_trial(session, study.id, new, now)
    assert trial is not None, "only proposals come too late"
    if not allow_duplicate:
        _refuse_duplicate(session, study, trial)
    runs = store.list_runs(session, trial.id)
    return Submitted(trial, runs[0].id if runs else None)


def _add_seed(session: Session, study: Study, twin: Trial, new: NewTrial, now: datetime) -> Submitted:
    taken = frozenset(run.seed for run in store.list_runs(session, twin.id) if run.rung == 0)
    terms = study.definition.replication or ReplicationConfig()
    seed = new.spec.seed if new.spec.seed not in taken else next_seed(terms.seeds, taken)
    if seed is None:
        message = f"and every seed of the study's list have a run of trial {twin.number}"
        raise Conflict("seed", new.spec.seed, message, existing=_name(study, twin))
    run = seeds.add_seed(
        session, study.id, twin.id, seed, now, origin="submitted", why="its configuration was submitted again",
        key=new.idempotency_key,
    )  # fmt: skip
    assert run is not None, "the study is held, and the seed is free"
    return Submitted(twin, run.id)


def _refuse_duplicate(session: Session, study: Study, trial: Trial) -> None:
    first = store.find_trial(session, study.id, spec_hash=trial.spec_hash)
    if first is not None and first.number != trial.number:
        adds = "another seed to it" if first.state is TrialState.COMPLETE else "another"
        message = f"trial {first.number} ({first.state}) has the same configuration; allow_duplicate adds {adds}"
        raise Conflict("spec", trial.spec_hash, message, existing=_name(study, first))


def _name(study: Study, trial: Trial) -> str:
    return f"/v1/studies/{study.name}/trials/{trial.number}"
