"""Runs made elsewhere, taken into a study: they teach its sampler and stand on its leaderboard, and cost it nothing."""

from collections.abc import Iterator
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

MOST_NATS = 100.0
MOST_SECONDS = 1e9
MOST_COUNT = 2**53  # beyond it a float, which JSON's readers use, is not exact
SCORES = ("val_bpb", "val_bpb_prequant", "val_loss")
BYTES = ("model_bytes", "code_bytes", "artifact_bytes")
SECONDS = ("train_seconds", "evaluate_seconds", "pack_seconds", "step_seconds")


def _impossible(result: TrialResult) -> Iterator[Problem]:
    """Figures that no result has, of whatever spec."""
    bounds: dict[str, tuple[float, float]] = {
        **dict.fromkeys(SCORES, (1e-9, MOST_NATS)), **dict.fromkeys(SECONDS, (0, MOST_SECONDS)),
        **dict.fromkeys((*BYTES, "steps"), (1, MOST_COUNT)), "tokens": (0, MOST_COUNT),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        if not least <= (value := getattr(result, name)) <= most:
            yield Problem(f"result.{name}", value, f"must be from {least:g} to {most:g}")
    for name, value in result.bytes_by_class.items():
        if not 0 <= value <= MOST_COUNT:
            yield Problem(f"result.bytes_by_class.{name}", value, f"must be from 0 to {MOST_COUNT:g}")


def check_result(spec: TrialSpec, result: TrialResult) -> None:
    """Raises InvalidSpec where the result cannot be of this spec, or of any, naming each figure that is wrong."""
    expected = {
        "parameters": count_parameters(spec.model, spec.sharing),
        "artifact_bytes": result.model_bytes + result.code_bytes,
    }
    problems = list(_impossible(result)) or [
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
