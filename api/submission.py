"""Submitting trials: predicted, judged, and added exactly once however often and however concurrently they are sent."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count, islice

from sqlalchemy.orm import Session

from api.bodies import ALLOWING
from api.context import Writer
from orchestrator import feasibility, seeds, store
from orchestrator.calibration import Calibration
from orchestrator.errors import Conflict
from orchestrator.lifecycle import TrialState
from orchestrator.points import Domain
from orchestrator.replicates import next_seed
from orchestrator.study import NewTrial, ReplicationConfig, Run, Study, Trial
from worker.spec import TrialSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """The trial, its run at the seed that was asked for, and whether both were there already under the same key."""

    trial: Trial
    run_id: int | None
    """None where the trial is infeasible."""
    replayed: bool = False


@dataclass(frozen=True)
class Asked:
    """A trial that a body asks for; `place` is where in the body, for problems that name a field."""

    spec: TrialSpec
    allow_duplicate: bool = False
    place: str = ""


def submit(
    writer: Writer, study: Study, spec: TrialSpec, *, key: str | None = None, allow_duplicate: bool = False
) -> Submitted:
    """Add the trial, or find it where the key says that it was added before: a batch of one."""
    return submit_batch(writer, study, (Asked(spec, allow_duplicate),), key=key)[0]


def submit_batch(
    writer: Writer, study: Study, asked: Sequence[Asked], *, key: str | None = None
) -> tuple[Submitted, ...]:
    """Add all these trials in one transaction, or find them where the key says that they were added before.

    A duplicate of a complete trial is that trial's next replicate: where duplicates are allowed, it gets a run at the
    spec's seed or, if it has one there, at the next seed of the study's list. A duplicate of one that is open, or
    ended in any other way, is a trial of its own.

    Raises Conflict where the key belongs to other specs, where a trial of the same canonical spec exists and
    duplicates are not allowed, or where no seed is left; IllegalMove where the study takes no trials. A refused
    submission leaves nothing behind.
    """
    with writer.database.read() as session:
        replay = _replay(session, study, asked, key)
        calibration = writer.calibrations.read(session, study.id)
    if replay is not None:
        return replay
    domain = Domain(study.definition.base, study.definition.space)
    new = [judged(study, domain, calibration, one.spec, own) for one, own in zip(asked, _keys(key), strict=False)]
    with writer.write("trial.submit", f"studies/{study.name}") as session:
        store.hold_study(session, study.id)  # from here on no other submission can slip in between
        submitted = _replay(session, study, asked, key) or tuple(
            _add(session, study, trial, writer.now, one) for one, trial in zip(asked, new, strict=True)
        )
    for one in submitted:
        number, state = one.trial.number, one.trial.state
        log.info("trial %d of study %s was submitted: %s", number, study.name, state, extra={"trial_id": one.trial.id})
    return submitted


def judged(
    study: Study,
    domain: Domain,
    calibration: Calibration,
    spec: TrialSpec,
    key: str | None,
    spec_hash: str | None = None,
) -> NewTrial:
    """The trial that would be added: predicted, and judged by the study's caps."""
    prediction = calibration.predict(spec, spec_hash)
    verdict, reason = feasibility.judge(prediction, study.definition, spec)
    return NewTrial(spec, domain.partial(spec), "submitted", prediction, verdict, reason, key)


def _keys(key: str | None) -> Iterator[str | None]:
    """The key of each trial of a batch, without end: the first has the batch's own, the others one that nobody can
    send, because it has a space."""
    yield key
    digest = None if key is None else hashlib.sha256(key.encode()).hexdigest()
    yield from (digest and f"{digest} {place}" for place in count(1))


def _replay(session: Session, study: Study, asked: Sequence[Asked], key: str | None) -> tuple[Submitted, ...] | None:
    """What a submission under this key made before."""
    keys = _keys(key)
    first = _replayed(session, study, asked[0].spec, next(keys), key)
    if first is None:
        return None
    others = [_replayed(session, study, one.spec, own, key) for one, own in zip(asked[1:], keys, strict=False)]
    found = [first, *(one for one in others if one is not None)]
    if len(found) < len(asked) or _named(session, study, next(islice(_keys(key), len(asked), None))) is not None:
        message = f"was used for {'more' if len(found) == len(asked) else 'fewer'} trials"
        raise Conflict("Idempotency-Key", key, message, existing=_name(study, first.trial))
    return tuple(found)


def _replayed(session: Session, study: Study, spec: TrialSpec, own: str | None, key: str | None) -> Submitted | None:
    """The trial with this key of its own, or its further seed, which must be of this spec. `key` is the batch's."""
    named = _named(session, study, own)
    if named is None:
        return None
    trial, run = named
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


def _named(session: Session, study: Study, key: str | None) -> tuple[Trial, Run | None] | None:
    """The trial that was submitted under this key; or the run, where its trial was there already."""
    if key is None:
        return None
    trial = store.find_trial(session, study.id, idempotency_key=key)
    if trial is not None:
        return trial, None
    run = seeds.find_seed(session, study.id, key)
    return None if run is None else (store.get_trial(session, study.id, seeds.number_of(session, run)), run)


def _add(session: Session, study: Study, new: NewTrial, now: datetime, asked: Asked) -> Submitted:
    try:
        return _add_alone(session, study, new, now, asked.allow_duplicate)
    except Conflict as error:
        field = f"{asked.place}.{error.field}" if asked.place else error.field
        raise Conflict(field, error.value, error.message, error.existing) from None


def _add_alone(session: Session, study: Study, new: NewTrial, now: datetime, allow_duplicate: bool) -> Submitted:
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
        message = f"trial {first.number} ({first.state}) has the same configuration; {ALLOWING} adds {adds}"
        raise Conflict("spec", trial.spec_hash[:16], message, existing=_name(study, first))


def _name(study: Study, trial: Trial) -> str:
    return f"/v1/studies/{study.name}/trials/{trial.number}"
