"""Submitted trials in SQL, many at a time: each takes about the same few statements as one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, insert, literal, select, union_all, update
from sqlalchemy.orm import Session

from orchestrator.errors import IllegalMove, NotFound
from orchestrator.lifecycle import RunState, StudyState, TrialState
from orchestrator.store import add_events, reopen
from orchestrator.study import NewTrial, Run, Trial
from orchestrator.tables import RUNS, STUDIES, TRIALS

OPEN_TO_TRIALS = (StudyState.RUNNING, StudyState.PAUSED, StudyState.COMPLETE)

_HOLD = (
    update(STUDIES).where(STUDIES.c.id == bindparam("study_id")).values(refused=STUDIES.c.refused)
    .returning(STUDIES.c.name, STUDIES.c.state, STUDIES.c.next_number)
)  # fmt: skip
_COUNT = update(STUDIES).where(STUDIES.c.id == bindparam("study_id")).values(next_number=bindparam("next"))
# What is asked for is text that a key may be, too: each row says which of the two it is.
_KNOWN = union_all(
    select(literal("hash").label("what"), TRIALS.c.spec_hash)
    .where(TRIALS.c.study_id == bindparam("study_id"), TRIALS.c.spec_hash.in_(bindparam("hashes", expanding=True))),
    select(literal("key"), TRIALS.c.idempotency_key)
    .where(TRIALS.c.study_id == bindparam("study_id"), TRIALS.c.idempotency_key.in_(bindparam("keys", expanding=True))),
    select(literal("key"), RUNS.c.idempotency_key).join(TRIALS, TRIALS.c.id == RUNS.c.trial_id)
    .where(TRIALS.c.study_id == bindparam("study_id"), RUNS.c.idempotency_key.in_(bindparam("keys", expanding=True))),
)  # fmt: skip
_ADD_TRIALS = insert(TRIALS).returning(TRIALS.c.id, TRIALS.c.number)
_ADD_RUNS = insert(RUNS).returning(RUNS.c.id, RUNS.c.trial_id)


@dataclass(frozen=True)
class Held:
    """A study that nobody else adds to until the commit."""

    id: int
    name: str
    state: StudyState
    next_number: int


def hold(session: Session, study_id: int) -> Held:
    """Hold the study. Comes first in its transaction. Raises NotFound."""
    row = session.connection().execute(_HOLD, {"study_id": study_id}).one_or_none()
    if row is None:
        raise NotFound("study", study_id)
    return Held(study_id, row.name, StudyState(row.state), row.next_number)


def list_known(
    session: Session, study_id: int, hashes: Collection[str], keys: Collection[str]
) -> tuple[set[str], set[str]]:
    """Of these hashes those that a trial of the study has, and of these keys those that were used in it."""
    asked = {"study_id": study_id, "hashes": list(hashes), "keys": list(keys)}
    found = session.connection().execute(_KNOWN, asked).all()
    return {each for what, each in found if what == "hash"}, {each for what, each in found if what == "key"}


def add_submitted(
    session: Session, held: Held, news: Sequence[tuple[NewTrial, str]], now: datetime
) -> list[tuple[Trial, Run | None]]:
    """Add submitted trials as store.add_trial does, in this order, each with its spec's canonical hash.

    Their keys are new to the study. Raises IllegalMove where the study takes no trials.
    """
    if held.state not in OPEN_TO_TRIALS:
        raise IllegalMove(f"study {held.name}", held.state, "take trials", OPEN_TO_TRIALS)
    connection = session.connection()
    values = [_values(held, place, new, spec_hash, now) for place, (new, spec_hash) in enumerate(news)]
    ids = {number: trial_id for trial_id, number in connection.execute(_ADD_TRIALS, values)}
    trials = [_trial(ids[row["number"]], row, new) for row, (new, _) in zip(values, news, strict=True)]
    queued = [trial for trial in trials if trial.state is TrialState.QUEUED]
    runs = dict[int, int]()
    if queued:
        added = connection.execute(_ADD_RUNS, [_run_values(trial, now) for trial in queued])
        runs = {trial_id: run_id for run_id, trial_id in added}
        if held.state is StudyState.COMPLETE:
            reopen(session, held.id, now)
    connection.execute(_COUNT, {"study_id": held.id, "next": held.next_number + len(news)})
    add_events(session, held.id, [_event(trial) for trial in trials], now)
    return [(trial, _run(runs[trial.id], trial) if trial.id in runs else None) for trial in trials]


def _values(held: Held, place: int, new: NewTrial, spec_hash: str, now: datetime) -> dict[str, Any]:
    infeasible = new.verdict == "cannot_fit"
    return {
        "study_id": held.id, "number": held.next_number + place, "origin": new.origin,
        "spec": new.spec.model_dump(mode="json"),
        "state": TrialState.INFEASIBLE if infeasible else TrialState.QUEUED, "spec_hash": spec_hash,
        "params": new.params, "prediction": asdict(new.prediction), "verdict": new.verdict, "reason": new.reason,
        "idempotency_key": new.idempotency_key, "created_at": now, "finished_at": now if infeasible else None,
    }  # fmt: skip


def _run_values(trial: Trial, now: datetime) -> dict[str, Any]:
    spec = trial.spec
    return {
        "trial_id": trial.id, "seed": spec.seed, "rung": 0, "budget": spec.budget.model_dump(mode="json"),
        "state": RunState.QUEUED, "ranks": spec.gang.ranks, "device": spec.gang.device, "priority": 10,
        "cold": spec.limits.cold, "created_at": now, "queued_at": now,
    }  # fmt: skip


def _trial(trial_id: int, row: Mapping[str, Any], new: NewTrial) -> Trial:
    return Trial(
        id=trial_id, study_id=row["study_id"], number=row["number"], state=row["state"], origin=new.origin,
        spec=new.spec, spec_hash=row["spec_hash"], params=new.params, prediction=new.prediction, verdict=new.verdict,
        reason=new.reason, result=None, created_at=row["created_at"], started_at=None, finished_at=row["finished_at"],
    )  # fmt: skip


def _run(run_id: int, trial: Trial) -> Run:
    spec = trial.spec
    return Run(
        id=run_id, trial_id=trial.id, seed=spec.seed, state=RunState.QUEUED, gang=spec.gang, rung=0,
        budget=spec.budget, scores=None, spared_at=None,
    )  # fmt: skip


def _event(trial: Trial) -> tuple[int, str, str]:
    if trial.state is TrialState.INFEASIBLE:
        return trial.number, "trial.infeasible", f"Trial {trial.number} was refused: {trial.reason}"
    return trial.number, "trial.queued", f"Trial {trial.number} was {trial.origin}"
