"""Studies that are searched without a database: what several files of tests share."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.lifecycle import OPEN_TRIALS, StudyState, TrialState
from orchestrator.proposer import Proposed, Proposer
from orchestrator.study import CAP_BYTES, NewStudy, NewTrial, Study, Trial
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.spec import GangConfig

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ONE = GangConfig()


def make_study(
    space: Mapping[str, Any], sampler: str = "tpe", seed: int = 0, cap_bytes: int = CAP_BYTES, **fields: Any
) -> Study:
    base = {"base": load_recipe("laptop"), "space": space, "cap_bytes": cap_bytes, **fields}
    definition = NewStudy.model_validate({"name": "study", "sampler": sampler, "seed": seed, **base})
    return Study(1, "study", StudyState.RUNNING, definition, 0, 0, None, NOW, NOW)


def as_trial(
    number: int, new: NewTrial, state: TrialState = TrialState.QUEUED, val_bpb: float | None = None,
    diagnostics: Mapping[str, Any] | None = None,
) -> Trial:  # fmt: skip
    """A proposal as the row that it becomes, in any later state; with a result where there is a score."""
    result = None
    if val_bpb is not None:
        code, model = new.prediction.code_bytes, new.prediction.artifact_bytes - new.prediction.code_bytes
        result = TrialResult(
            val_bpb=val_bpb, val_bpb_prequant=val_bpb, val_loss=2.5, parameters=1, model_bytes=model, code_bytes=code,
            artifact_bytes=model + code, artifact_sha256="0" * 64, steps=10, tokens=1000, train_seconds=1.0,
            evaluate_seconds=1.0, pack_seconds=1.0, step_seconds=0.1, stopped=False, bytes_by_class={},
            diagnostics=dict(diagnostics or {}),
        )  # fmt: skip
    return Trial(
        number + 1, 1, number, state, new.origin, new.spec, new.spec.canonical_hash, new.params, new.prediction,
        new.verdict, new.reason, result, NOW, None if state is TrialState.QUEUED else NOW,
        None if state in OPEN_TRIALS else NOW, new.suggestion, None if result is None else True,
    )  # fmt: skip


def search(
    study: Study, count: int, score: Callable[[NewTrial], float], gangs: Sequence[GangConfig] = (ONE,)
) -> list[Trial]:
    """The study's first trials, each scored before the next is proposed."""
    proposer, history = Proposer(study), list[Trial]()
    for number in range(count):
        new = must(proposer.propose(history, gangs[number % len(gangs)]))
        history.append(as_trial(number, new, TrialState.COMPLETE, score(new)))
    return history


def must(proposed: Proposed) -> NewTrial:
    assert proposed.trial is not None, proposed.reason
    return proposed.trial
