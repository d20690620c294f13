"""The states of a study, a trial, a run and an attempt, and the moves between them. DESIGN.md draws them."""

from enum import StrEnum


class StudyState(StrEnum):
    """running proposes and starts runs; paused finishes what runs; stopped and complete start nothing more."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    COMPLETE = "complete"


class TrialState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INFEASIBLE = "infeasible"


class RunState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """How one attempt ended. Preempted, lost and void cost their run nothing; failed counts against its attempts.

    void: it would have succeeded, but it was slower than its kind.
    """

    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"
    PREEMPTED = "preempted"
    LOST = "lost"
    VOID = "void"


class Cause(StrEnum):
    """Why an attempt failed.

    crash: a process died. hang: no sign of life for as long as the spec's limits allow. limit: it took longer than
    they allow. diverged and bad_input would come again. error: any other exception.
    """

    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    HANG = "hang"
    LIMIT = "limit"
    DIVERGED = "diverged"
    BAD_INPUT = "bad_input"
    ERROR = "error"


STUDY_MOVES: dict[StudyState, frozenset[StudyState]] = {
    StudyState.RUNNING: frozenset({StudyState.PAUSED, StudyState.STOPPED, StudyState.COMPLETE}),
    StudyState.PAUSED: frozenset({StudyState.RUNNING, StudyState.STOPPED}),
    StudyState.STOPPED: frozenset(),  # but for one that its own budget stopped, by another budget: see amendments
    StudyState.COMPLETE: frozenset({StudyState.RUNNING, StudyState.STOPPED}),
}

TRIAL_MOVES: dict[TrialState, frozenset[TrialState]] = {
    TrialState.QUEUED: frozenset({TrialState.RUNNING, TrialState.CANCELLED}),
    TrialState.RUNNING: frozenset(
        {TrialState.QUEUED, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.CANCELLED}
    ),
    TrialState.COMPLETE: frozenset(),
    TrialState.PRUNED: frozenset({TrialState.QUEUED}),  # promoted from a cheaper rung
    TrialState.FAILED: frozenset({TrialState.QUEUED}),  # retried, as one that was cancelled
    TrialState.CANCELLED: frozenset({TrialState.QUEUED}),
    TrialState.INFEASIBLE: frozenset(),
}

OPEN_RUNS = frozenset({RunState.QUEUED, RunState.RUNNING})
OPEN_TRIALS = frozenset({TrialState.QUEUED, TrialState.RUNNING})
UNCHARGED = frozenset({Outcome.PREEMPTED, Outcome.LOST, Outcome.VOID})
RETRIED_FROM = (TrialState.FAILED, TrialState.CANCELLED)
PERMANENT = frozenset({Cause.DIVERGED, Cause.BAD_INPUT})


def states_before(moves: dict[TrialState, frozenset[TrialState]], after: TrialState) -> tuple[TrialState, ...]:
    """The states from which a trial may move to `after`."""
    return tuple(state for state, targets in moves.items() if after in targets)
