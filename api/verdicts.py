"""Record verdicts over HTTP: a trial held against another, or against losses from elsewhere."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from api.context import LARGEST_ID, DatabaseOf, StudyName, TrialNumber
from api.problems import responses
from api.standings import VerdictOut
from orchestrator import seeds, store
from orchestrator.errors import IllegalMove
from orchestrator.lifecycle import Cause, TrialState
from orchestrator.records import MOST_NATS
from orchestrator.standing import ranked
from orchestrator.statistics import Sample
from orchestrator.study import Run, Scores, Study, Trial
from orchestrator.verdict import Champion, judge_record, planned_seeds
from worker.shape import FieldError

router = APIRouter(tags=["trials"], responses=responses(404, 409, 422))

Nats = Annotated[float, Query(gt=0, lt=MOST_NATS, allow_inf_nan=False)]


@router.get("/studies/{study}/trials/{number}/verdict")
def get_verdict(
    study: StudyName,
    number: TrialNumber,
    database: DatabaseOf,
    against: Annotated[int | None, Query(ge=0, le=LARGEST_ID, description="Another trial of the study.")] = None,
    losses: Annotated[
        tuple[Nats, ...], Query(description="Or the losses of a record from elsewhere, in nats per token, one a seed.")
    ] = (),
) -> VerdictOut:
    """Whether the trial sets a record, by the challenge's rule: against a trial, by default the best other one,
    and those that were asked for all their seeds before it; or against losses on the same text and tokenizer."""
    if against is not None and losses:
        raise FieldError("query.losses", list(losses), "must be absent where `against` names a trial")
    with database.read() as session:
        return verdict_of(session, store.get_study(session, study), number, against, losses)


def verdict_of(
    session: Session, study: Study, number: int, against: int | None, losses: tuple[float, ...] = ()
) -> VerdictOut:
    """The verdict on the trial, against a trial or these losses. Raises NotFound, IllegalMove, FieldError."""
    trial, runs, scores = _complete(session, study, number)
    rival = None if losses else _rival(session, study, number, against)
    declared = seeds.list_declared(session, study.id)
    champion = _of_trial(session, study, rival, trial, scores) if rival is not None else _given(losses)
    rest = () if rival is None else [one for one in declared if one not in (number, rival)]
    others = [_of_trial(session, study, one, trial, scores) for one in rest]
    failed = {one.run_id for one in store.list_attempts(session, trial.id) if one.cause is Cause.DIVERGED}
    own = trial.spec.seed
    attempts = [one for one in declared if one != rival]  # the champion is no attempt to beat itself
    place = 1 + (attempts.index(number) if number in attempts else len(attempts))
    diverged = frozenset(run.seed for run in runs if run.rung == 0 and run.id in failed)
    planned = planned_seeds(study.definition.replication, own)
    verdict = judge_record(runs, own, planned, place, champion, others, diverged)
    return VerdictOut.of(study.name, number, rival, verdict, scores)


def _complete(session: Session, study: Study, number: int) -> tuple[Trial, tuple[Run, ...], Scores]:
    """The trial with its runs, and the scores of one of them. Raises NotFound, IllegalMove."""
    trial = store.get_trial(session, study.id, number)
    runs = store.list_runs(session, trial.id)
    scores = next((run.scores for run in runs if run.rung == 0 and run.scores is not None), None)
    if trial.state is not TrialState.COMPLETE or scores is None:
        raise IllegalMove(f"trial {number}", trial.state, "have a verdict", (TrialState.COMPLETE,))
    return trial, runs, scores


def _rival(session: Session, study: Study, number: int, against: int | None) -> int:
    """The number of the trial to hold it against: the named one, or the best other."""
    if against == number:
        raise FieldError("query.against", against, "must be another trial")
    if against is not None:
        return against
    others = (standing for standing in ranked(seeds.list_standings(session, study.id)) if standing.bpb)
    best = next((standing.number for standing in others if standing.number != number), None)
    if best is None:
        raise FieldError("query.against", None, "must be given, or losses, where no other trial is complete")
    return best


def _of_trial(session: Session, study: Study, number: int, challenger: Trial, scores: Scores) -> Champion:
    trial, runs, own = _complete(session, study, number)
    planned = planned_seeds(study.definition.replication, trial.spec.seed)
    scale = 1.0
    if trial.spec.data.dataset != challenger.spec.data.dataset:  # by bytes, which all tokenizers have in common
        scale = (own.val_bpb / own.val_loss) / (scores.val_bpb / scores.val_loss)
    return Champion.of(number, runs, trial.spec.seed, planned, scale)


def _given(losses: tuple[float, ...]) -> Champion:
    return Champion("the losses given", Sample.of(losses))
