"""What a study did not spend: on trials that were refused before they ran, and on what was pruned of others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from orchestrator.cost import Cost
from orchestrator.lifecycle import RunState, TrialState
from orchestrator.tables import RUNS, TRIALS

Spared = Sequence[tuple[float | None, int, dict[str, Any]]]
"""Of each trial: seconds, None where nobody knew them; ranks; gang."""


@dataclass(frozen=True)
class Savings:
    """Costs that nobody had. Trials whose seconds nobody knew count as nothing, and are counted; points that the search
    refused, and that never were trials, are not in it."""

    refused: Cost
    """What infeasible trials were predicted to take."""
    refused_trials: int
    refused_unknown: int
    """Of them, those whose seconds nobody knew."""
    pruned: Cost
    """What was left of runs that were stopped, at the pace that they had; and what trials that were not promoted from
    a rung were predicted to take at their own budget."""
    pruned_trials: int
    pruned_unknown: int


def savings(session: Session, study_id: int, gpu_hour_dollars: float) -> Savings:
    """Of the study's trials as they are now: one that is promoted after all no longer counts."""
    of_study = TRIALS.c.study_id == study_id
    gang = TRIALS.c.spec["gang"].label("gang")
    refused = session.execute(
        select(TRIALS.c.prediction, gang).where(of_study, TRIALS.c.state == TrialState.INFEASIBLE)
    ).all()
    last = select(func.max(RUNS.c.id)).where(RUNS.c.trial_id == TRIALS.c.id).correlate(TRIALS).scalar_subquery()
    done = (TRIALS.c.result[name].as_float() for name in ("train_seconds", "steps", "tokens"))
    pruned = session.execute(
        select(TRIALS.c.prediction, gang, RUNS.c.state, RUNS.c.budget, RUNS.c.ranks.label("used"), *done)
        .join(RUNS, RUNS.c.id == last).where(of_study, TRIALS.c.state == TrialState.PRUNED)
    ).all()  # fmt: skip
    of_refused = [(_predicted(prediction), gang["ranks"], gang) for prediction, gang in refused]
    of_pruned = [
        (_rest(budget, *reached), used, gang)
        if state == RunState.STOPPED
        else (_predicted(prediction), gang["ranks"], gang)
        for prediction, gang, state, budget, used, *reached in pruned
    ]
    return Savings(
        _sum(of_refused, gpu_hour_dollars), len(refused), _unknown(of_refused),
        _sum(of_pruned, gpu_hour_dollars), len(pruned), _unknown(of_pruned),
    )  # fmt: skip


def _unknown(spared: Spared) -> int:
    return sum(seconds is None for seconds, *_ in spared)


def _sum(spared: Spared, gpu_hour_dollars: float) -> Cost:
    seconds = gpu_seconds = 0.0
    for known, ranks, gang in spared:
        each = known or 0.0
        seconds += each
        gpu_seconds += each * (ranks if gang["device"] == "gpu" else 0)
    return Cost(seconds, gpu_seconds, gpu_seconds * gpu_hour_dollars / 3600)


def _predicted(prediction: dict[str, Any]) -> float | None:
    if prediction.get("train_seconds") is None:
        return None
    return float(prediction["train_seconds"] + (prediction.get("evaluate_seconds") or 0.0))


def _rest(budget: dict[str, Any], seconds: float | None, steps: float | None, tokens: float | None) -> float | None:
    """Seconds of training that a run had before it when it was stopped, by the limit that it was nearest to; None
    without a sign of how far it came."""
    reached = {"seconds": seconds, "steps": steps, "tokens": tokens}
    share = max(((value or 0.0) / budget[name] for name, value in reached.items() if budget.get(name)), default=0.0)
    if not share or seconds is None:
        return None
    return seconds * (1 / share - 1) if share < 1 else 0.0
