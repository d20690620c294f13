"""The caps of a study, on bytes and on seconds, and by how much a result misses them."""

from dataclasses import dataclass

from orchestrator.study import CAP_BYTES, CAP_SECONDS, NewStudy, Scores
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


def scores_of(result: TrialResult, study: NewStudy) -> Scores:
    """What counts of a result in this study."""
    return Scores(
        val_bpb=result.val_bpb, val_loss=result.val_loss, artifact_bytes=result.artifact_bytes,
        train_seconds=result.train_seconds, evaluate_seconds=result.evaluate_seconds,
        feasible=all(over <= 0 for over in excess(result, study).values()),
    )  # fmt: skip
