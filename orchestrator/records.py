"""Runs made elsewhere, taken into a study: they teach its sampler and stand on its leaderboard, and cost it nothing."""

from dataclasses import asdict
from datetime import datetime

from sqlalchemy import insert
from sqlalchemy.orm import Session

from orchestrator.caps import scores_of
from orchestrator.errors import Conflict
from orchestrator.lifecycle import RunState, TrialState
from orchestrator.rows import trial_of
from orchestrator.store import add_event, find_trial, next_number
from orchestrator.study import NewTrial, Study, Trial
from orchestrator.tables import RUNS, TRIALS, TrialRow
from worker.inventory import count_parameters
from worker.report import TrialResult
from worker.spec import InvalidSpec, Problem, TrialSpec


def check_result(spec: TrialSpec, result: TrialResult) -> None:
    """Raises InvalidSpec where the result cannot be of this spec, naming each figure that contradicts it."""
    expected = {
        "parameters": count_parameters(spec.model, spec.sharing),
        "artifact_bytes": result.model_bytes + result.code_bytes,
    }
    problems = [
        Problem(f"result.{name}", getattr(result, name), f"must be {right:,}: another spec's result?")
        for name, right in expected.items()
        if getattr(result, name) != right
    ]
    if problems:
        raise InvalidSpec(tuple(problems))


def import_trial(session: Session, study: Study, new: NewTrial, result: TrialResult, now: datetime) -> Trial:
    """Add a finished trial with the result that it had elsewhere: complete, or pruned where training was stopped.

    Raises Conflict where the study has the configuration already, IllegalMove where it takes no trials, and InvalidSpec
    as check_result does.
    """
    check_result(new.spec, result)
    number = next_number(session, study.id, "imported")
    assert number is not None, "only proposals come too late"
    known = find_trial(session, study.id, spec_hash=new.spec.canonical_hash)
    if known is not None:
        message = f"is that of trial {known.number} ({known.state}), which is there already"
        raise Conflict("spec", known.spec_hash, message, existing=f"/v1/studies/{study.name}/trials/{known.number}")
    scores = scores_of(result, study.definition)
    state = TrialState.PRUNED if result.stopped else TrialState.COMPLETE
    values = {
        "study_id": study.id, "number": number, "origin": "imported", "state": state, "params": new.params,
        "spec": new.spec.model_dump(mode="json"), "spec_hash": new.spec.canonical_hash,
        "prediction": asdict(new.prediction), "verdict": new.verdict, "reason": new.reason,
        "idempotency_key": new.idempotency_key, "result": result.model_dump(mode="json"), "val_bpb": scores.val_bpb,
        "artifact_bytes": scores.artifact_bytes, "feasible": scores.feasible, "created_at": now, "finished_at": now,
    }  # fmt: skip
    trial_id = session.scalar(insert(TRIALS).values(values).returning(TRIALS.c.id))
    session.execute(
        insert(RUNS).values(
            trial_id=trial_id, seed=new.spec.seed, budget=new.spec.budget.model_dump(mode="json"), rung=0,
            state=RunState.STOPPED if result.stopped else RunState.SUCCEEDED, ranks=new.spec.gang.ranks,
            device=new.spec.gang.device, priority=0, cold=False, created_at=now, queued_at=now, scores=asdict(scores),
        )
    )  # fmt: skip
    message = f"Trial {number} was imported: {result.val_bpb:.4f} BPB in {result.artifact_bytes:,} bytes"
    add_event(session, study.id, number, "trial.imported", message, now)
    return trial_of(session.get_one(TrialRow, trial_id))
