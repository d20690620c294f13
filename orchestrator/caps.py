"""The caps of a study, on bytes and on seconds, and by how much a result misses them."""

from dataclasses import dataclass

from orchestrator.study import CAP_BYTES, CAP_SECONDS, NewStudy, Scores, Trial
from worker.report import TrialResult


@dataclass(frozen=True)
class Caps:
    """The caps of a spec that is judged outside a study: the challenge's, unless it says otherwise."""

    cap_bytes: int = CAP_BYTES
    tolerance_bytes: int = 0
    cap_train_seconds: float = CAP_SECONDS
    cap_evaluate_seconds: float = CAP_SECONDS


def excess(result: TrialResult, study: NewStudy) -> dict[str, float]:
    """By how much a result is over each cap of the study, 0 or less where it keeps it, by what is capped.

    A budget in seconds ends with the step that reaches it, so training may take one step longer.
    """
    return {
        "artifact_bytes": float(result.artifact_bytes - study.cap_bytes),
        "train_seconds": result.train_seconds - result.step_seconds - study.cap_train_seconds,
        "evaluate_seconds": result.evaluate_seconds - study.cap_evaluate_seconds,
    }


def refused_by(trial: Trial, study: NewStudy) -> dict[str, float]:
    """By how much an infeasible trial is predicted over each cap, by what is capped: above 0 where it was refused.

    Bytes count as expected, seconds, of which none may be known, at their low end. A target in bytes that is out of
    reach is a smaller cap.
    """
    prediction, target = trial.prediction, trial.spec.quantisation.target_bytes
    cap = target if target is not None and prediction.artifact_bytes_low > target else study.cap_bytes
    over = {"artifact_bytes": float(prediction.artifact_bytes - cap)}
    if prediction.train_seconds_low is not None:
        over["train_seconds"] = prediction.train_seconds_low - study.cap_train_seconds
    if prediction.evaluate_seconds_low is not None:
        over["evaluate_seconds"] = prediction.evaluate_seconds_low - study.cap_evaluate_seconds
    return over if max(over.values()) > 0 else {**over, "verdict": 1.0}  # whatever it was refused for


def scores_of(result: TrialResult, study: NewStudy) -> Scores:
    """What counts of a result in this study."""
    return Scores(
        val_bpb=result.val_bpb, val_loss=result.val_loss, artifact_bytes=result.artifact_bytes,
        train_seconds=result.train_seconds, evaluate_seconds=result.evaluate_seconds,
        feasible=all(over <= 0 for over in excess(result, study).values()),
    )  # fmt: skip
