"""When the timing of a success counts, and what becomes of one that does not: on SQLite and PostgreSQL."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from claims import NewStudies, NewTrials, Results
from sqlalchemy import update

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, RunState, TrialState
from orchestrator.study import Artifact, Attempt, AttemptResult, Claim, NewStudy, NewTrial, Study, Trial
from orchestrator.tables import RunRow
from orchestrator.validity import KNOWN_PROBES, KNOWN_STEPS, LAST_PROBES, MAX_VOID
from worker.report import Hardware
from worker.spec import GangConfig

TTL = timedelta(seconds=20)
SAME = {"optimizer.matrix_lr": 0.02, "limits.slow_percent": 10.0}
H100 = Hardware(
    device="NVIDIA H100", node="node-1", node_devices=8, ranks=1, clocks_mhz=(1980.0,), clock_limit_mhz=1980.0,
    torch="2.13.0", cuda="13.0", probe_seconds=(0.002,), probe_after_seconds=(0.002,),
)  # fmt: skip


class Queue:
    """One study, whose trials are trained one after the other."""

    def __init__(self, database: Database, new_study: NewStudy, now: datetime) -> None:
        self.database, self.now = database, now
        with database.write() as session:
            self.study: Study = store.create_study(session, new_study, now)

    def claim(self, new: NewTrial | None = None) -> Claim:
        """The first run in line, after this trial was added."""
        with self.database.write() as session:
            if new is not None:
                store.add_trial(session, self.study.id, new, self.now)
            claimed = leases.claim(session, GangConfig(), "host", self.now, TTL)
        assert claimed is not None
        return claimed

    def end(self, held: Claim, ended: AttemptResult) -> AttemptResult:
        with self.database.write() as session:
            return leases.finish(session, held.lease, ended, self.now)

    def look(self, held: Claim) -> tuple[Trial, tuple[Attempt, ...]]:
        with self.database.read() as session:
            trial = store.get_trial(session, held.study_id, held.trial_number)
            return trial, store.list_attempts(session, held.trial_id)


@pytest.fixture
def queue(database: Database, new_study: NewStudies, now: datetime) -> Queue:
    return Queue(database, new_study(), now)


@pytest.fixture
def success(trial_result: Results) -> Callable[..., AttemptResult]:
    """A success with this step, on hardware with these fields."""

    def build(step_seconds: float = 0.1, probe: float = 0.002, **fields: object) -> AttemptResult:
        hardware = H100.model_copy(update={"probe_after_seconds": (probe,), **fields})
        result = trial_result(step_seconds=step_seconds, hardware=hardware)
        return AttemptResult(Outcome.SUCCEEDED, "trained to the end of its budget", result)

    return build


@pytest.fixture
def known(queue: Queue, new_trial: NewTrials, success: Callable[..., AttemptResult]) -> Callable[..., None]:
    """Lets so many trials of this configuration succeed in this way."""

    def run(times: int, changes: dict[str, object] | None = None, **fields: object) -> None:
        for seed in range(times):
            held = queue.claim(new_trial({**SAME, "seed": seed, **(changes or {})}, origin="submitted"))
            assert queue.end(held, success(**fields)).outcome is Outcome.SUCCEEDED

    return run


@pytest.fixture
def judged(queue: Queue, new_trial: NewTrials, success: Callable[..., AttemptResult]) -> Callable[..., AttemptResult]:
    """What becomes of a success of one more trial."""

    def run(changes: dict[str, object] | None = None, **fields: object) -> AttemptResult:
        held = queue.claim(new_trial({**SAME, "seed": 99, **(changes or {})}, origin="submitted"))
        return queue.end(held, success(**fields))

    return run


def test_a_success_that_was_slower_than_its_kind_is_void_and_goes_back_to_the_queue_without_charge(
    queue: Queue, known: Callable[..., None], new_trial: NewTrials, success: Callable[..., AttemptResult]
) -> None:
    known(KNOWN_STEPS, step_seconds=0.11)
    held = queue.claim(new_trial({**SAME, "seed": 99}, origin="submitted"))
    slow, queue.now = success(step_seconds=0.125), queue.now + timedelta(minutes=10)
    stored = Artifact("file:///a", 1000, "ab" * 32)
    assert slow.result is not None
    queue.end(held, AttemptResult(slow.outcome, slow.reason, slow.result, stored))
    trial, (attempt,) = queue.look(held)
    reason = "step 0.125 s, 14% slower than the 0.11 s of 3 attempts on 1 × NVIDIA H100, and the limit is 10%"
    assert (attempt.outcome, attempt.reason) == (Outcome.VOID, reason)
    assert (attempt.step_seconds, attempt.hardware, attempt.artifact) == (0.125, slow.result.hardware, stored)
    assert (trial.state, trial.reason, trial.result, trial.finished_at) == (TrialState.QUEUED, None, None, None)
    with queue.database.read() as session:
        (run,) = store.list_runs(session, held.trial_id)
        last = store.list_events(session)[-1]
    assert (run.state, last.kind) == (RunState.QUEUED, "trial.queued")
    assert last.message == f"Trial 3 is queued: attempt void, {reason}"
    again = queue.claim()
    assert again.run_id == held.run_id
    assert queue.end(again, success(step_seconds=0.11)).outcome is Outcome.SUCCEEDED
    trial, attempts = queue.look(held)
    assert trial.state is TrialState.COMPLETE
    assert [attempt.queued_at for attempt in attempts] == [held.started_at, queue.now]


def test_what_is_slow_every_time_stands_in_the_end_and_says_so(
    queue: Queue, known: Callable[..., None], new_trial: NewTrials, success: Callable[..., AttemptResult]
) -> None:
    known(KNOWN_STEPS)
    held = queue.claim(new_trial({**SAME, "seed": 99}, origin="submitted"))
    for _ in range(MAX_VOID):
        assert queue.end(held, success(step_seconds=0.2)).outcome is Outcome.VOID
        held = queue.claim()
    assert queue.end(held, success(step_seconds=0.2)).outcome is Outcome.SUCCEEDED
    trial, attempts = queue.look(held)
    assert [attempt.outcome for attempt in attempts] == [Outcome.VOID] * MAX_VOID + [Outcome.SUCCEEDED]
    assert trial.state is TrialState.COMPLETE
    assert trial.reason == attempts[-1].reason
    assert str(trial.reason).endswith(f"the limit is 10%; it stands after {MAX_VOID} void attempts")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {"step_seconds": 0.11}),  # by no more than the limit
        ({"limits.slow_percent": None}, {"step_seconds": 9.0, "probe": 9.0}),
        ({"limits.slow_percent": 200.0}, {"step_seconds": 0.29}),
        ({"optimizer.matrix_lr": 0.03}, {"step_seconds": 9.0}),  # another configuration
        ({}, {"step_seconds": 9.0, "probe": 9.0, "device": "NVIDIA H200"}),
    ],
)
def test_a_success_counts_that_is_as_fast_as_its_spec_asks_of_its_kind(
    known: Callable[..., None], judged: Callable[..., AttemptResult], changes: dict[str, object],
    fields: dict[str, object],
) -> None:  # fmt: skip
    known(KNOWN_PROBES)
    assert judged(changes, **fields).outcome is Outcome.SUCCEEDED


def test_too_few_successes_make_no_kind(known: Callable[..., None], judged: Callable[..., AttemptResult]) -> None:
    known(KNOWN_STEPS - 1)
    assert judged(step_seconds=9.0).outcome is Outcome.SUCCEEDED


def test_a_device_that_is_slower_at_the_same_work_makes_a_timing_void_whatever_the_spec(
    known: Callable[..., None], judged: Callable[..., AttemptResult]
) -> None:
    known(KNOWN_PROBES - 1)
    another = {"optimizer.matrix_lr": 0.03}
    assert judged({**another, "seed": 1}, probe=0.003).outcome is Outcome.SUCCEEDED
    ended = judged({**another, "seed": 2}, probe=0.0023)
    assert (ended.outcome, ended.reason) == (
        Outcome.VOID,
        "probe 0.0023 s, 15% slower than the 0.002 s of 5 attempts on 1 × NVIDIA H100, and the limit is 10%",
    )


def test_probes_are_compared_with_the_last_attempts_alone(
    known: Callable[..., None], judged: Callable[..., AttemptResult]
) -> None:
    free = {"limits.slow_percent": None}
    known(LAST_PROBES // 2, free)
    known(LAST_PROBES // 2 + 1, {**free, "optimizer.matrix_lr": 0.05}, probe=0.003)
    assert judged(probe=0.003).outcome is Outcome.SUCCEEDED


def test_a_run_with_a_smaller_micro_batch_is_not_compared_with_whole_ones(
    queue: Queue, known: Callable[..., None], new_trial: NewTrials, success: Callable[..., AttemptResult]
) -> None:
    known(KNOWN_STEPS)
    held = queue.claim(new_trial({**SAME, "seed": 99}, origin="submitted"))
    queue.end(held, AttemptResult(Outcome.FAILED, cause=Cause.OUT_OF_MEMORY))
    assert queue.end(queue.claim(), success(step_seconds=9.0)).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize("outcome", sorted(set(Outcome) - {Outcome.SUCCEEDED, Outcome.VOID}))
def test_only_a_success_is_judged(
    queue: Queue, known: Callable[..., None], new_trial: NewTrials,
    success: Callable[..., AttemptResult], outcome: Outcome,
) -> None:  # fmt: skip
    known(KNOWN_STEPS)
    held = queue.claim(new_trial({**SAME, "seed": 99}, origin="submitted"))
    ended = AttemptResult(outcome, "why", success(step_seconds=9.0).result if outcome is Outcome.STOPPED else None)
    assert queue.end(held, ended) == ended


def test_a_result_without_hardware_is_not_judged(
    queue: Queue, known: Callable[..., None], new_trial: NewTrials,
    trial_result: Results,
) -> None:  # fmt: skip
    known(KNOWN_STEPS)
    held = queue.claim(new_trial({**SAME, "seed": 99}, origin="submitted"))
    ended = AttemptResult(Outcome.SUCCEEDED, "done", trial_result(step_seconds=9.0))
    assert queue.end(held, ended) == ended
    assert queue.look(held)[1][0].hardware is None


def test_attempts_know_since_when_their_run_was_queued(queue: Queue, new_trial: NewTrials) -> None:
    added, waited = queue.now, timedelta(seconds=7)
    with queue.database.write() as session:
        store.add_trial(session, queue.study.id, new_trial(), added)
    queue.now += waited
    first = queue.claim()
    queue.now += waited
    queue.end(first, AttemptResult(Outcome.PREEMPTED))
    queue.now += waited
    queue.end(queue.claim(), AttemptResult(Outcome.PREEMPTED))
    with queue.database.write() as session:  # as an older version leaves them
        session.execute(update(RunRow).values(queued_at=None))
    queue.claim()
    attempts = queue.look(first)[1]
    assert [attempt.queued_at for attempt in attempts] == [added, added + 2 * waited, None]
