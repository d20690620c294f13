"""The seeds of complete trials in SQL: what they scored, and more of them asked for."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.lifecycle import OPEN_RUNS, Outcome, RunState, StudyState, TrialState
from orchestrator.rows import run_of
from orchestrator.standing import Standing
from orchestrator.store import add_event, count_open_runs, hold_study, insert_missing, no_trial, reopen
from orchestrator.study import ReplicationConfig, Run, Study
from orchestrator.tables import RUNS, TRIALS, AttemptRow, RunRow, TrialRow

PRIORITY = {"submitted": 10, "earned": 5}
"""A seed that a person asks for waits with other submissions; one that was earned comes before proposals."""
CHUNK = 500  # ids in one query; databases bound how many parameters a statement takes


def list_standings(session: Session, study_id: int, limit: int | None = None) -> list[Standing]:
    """The study's complete trials, each with its seeds; of those with one seed no more than the `limit` best."""
    complete = (TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE)
    other = RUNS.alias()
    trials = (
        select(TRIALS.c.id, TRIALS.c.number, TRIALS.c.val_bpb, TRIALS.c.feasible, RUNS.c.seed)
        .join(RUNS, RUNS.c.trial_id == TRIALS.c.id).where(*complete, RUNS.c.rung == 0)
        .where(~exists().where(other.c.trial_id == TRIALS.c.id, other.c.rung == 0, other.c.id != RUNS.c.id))
        .order_by(TRIALS.c.feasible.desc(), TRIALS.c.val_bpb, TRIALS.c.number, RUNS.c.id).limit(limit)
    )  # fmt: skip
    # Nearly all have one run, whose score the trial has too: there is no JSON to read.
    standings = [
        Standing(
            trial_id, number, seed, val_bpb,
            bpb={seed: val_bpb} if feasible else {}, over=int(not feasible), taken=frozenset((seed,)), waits=False,
        )
        for trial_id, number, val_bpb, feasible, seed in session.execute(trials).all()
    ]  # fmt: skip
    several = (
        select(TRIALS.c.id, TRIALS.c.number, TRIALS.c.val_bpb).join(RUNS, RUNS.c.trial_id == TRIALS.c.id)
        .where(*complete, RUNS.c.rung == 0).group_by(TRIALS.c.id).having(func.count() > 1).order_by(TRIALS.c.id)
    )  # fmt: skip
    # Asked for once, then by ids: as a subquery it may be run once a row where PostgreSQL's statistics are old.
    replicated = session.execute(several).all()
    ids = [trial_id for trial_id, _, _ in replicated]
    runs: dict[int, list[tuple[int, str, dict[str, float] | None]]] = {trial_id: [] for trial_id in ids}
    query = select(RUNS.c.trial_id, RUNS.c.seed, RUNS.c.state, RUNS.c.scores).order_by(RUNS.c.id)
    query = query.where(RUNS.c.rung == 0)
    chunks = (query.where(RUNS.c.trial_id.in_(ids[start : start + CHUNK])) for start in range(0, len(ids), CHUNK))
    for trial_id, seed, state, scores in (row for chunk in chunks for row in session.execute(chunk)):
        runs[trial_id].append((seed, state, scores if state == RunState.SUCCEEDED else None))
    for trial_id, number, val_bpb in replicated:
        of = runs[trial_id]
        own = of[0][0]
        scored = [(seed, scores) for seed, _, scores in of if scores is not None]
        standings.append(Standing(
            trial_id, number, own, val_bpb,
            bpb={seed: scores["val_bpb"] for seed, scores in scored if scores["feasible"]},
            over=sum(not scores["feasible"] for _, scores in scored), taken=frozenset(seed for seed, _, _ in of),
            waits=any(state in OPEN_RUNS for _, state, _ in of), failed=sum(s == RunState.FAILED for _, s, _ in of),
        ))  # fmt: skip
    return standings


def add_seed(
    session: Session,
    study_id: int,
    trial_id: int,
    seed: int,
    now: datetime,
    *,
    origin: Literal["submitted", "earned"],
    why: str,
    key: str | None = None,
) -> Run | None:
    """Queue a complete trial's run at this seed and its own budget; None, changing nothing, where it has one there.

    None, too, where it was earned and the study no longer runs. Submitting reopens a complete study, and raises
    IllegalMove for a stopped one.
    """
    state = hold_study(session, study_id)
    if origin == "earned" and state is not StudyState.RUNNING:
        return None
    if state is StudyState.STOPPED:
        raise IllegalMove(f"study {study_id}", state, "take seeds", ("running", "paused", "complete"))
    trial = session.get_one(TrialRow, trial_id)
    assert trial.state == TrialState.COMPLETE, "other trials have no further seeds"
    spec = trial.spec
    values = {
        "trial_id": trial_id, "seed": seed, "rung": 0, "budget": spec["budget"], "state": RunState.QUEUED,
        "ranks": spec["gang"]["ranks"], "device": spec["gang"]["device"], "priority": PRIORITY[origin],
        "cold": spec.get("limits", {}).get("cold", False), "created_at": now, "queued_at": now, "idempotency_key": key,
    }  # fmt: skip
    if insert_missing(session, RunRow, [values]) != 1:
        return None
    if origin == "submitted":
        reopen(session, study_id, now)
    add_event(session, study_id, trial.number, "run.queued", f"Trial {trial.number} runs at seed {seed}: {why}", now)
    added = session.scalar(select(RunRow).where(RunRow.trial_id == trial_id, RunRow.seed == seed, RunRow.rung == 0))
    assert added is not None
    return run_of(added)


def ask_seeds(
    session: Session, study: Study, number: int, now: datetime, *, named: Sequence[int] = (), count: int = 0
) -> tuple[Run, ...]:
    """Queue a complete trial's runs at the seeds that are `named`, and at `count` more of the study's list: all of
    them, or none.

    Raises NotFound; IllegalMove for a trial that is not complete, or in a stopped study; Conflict where a seed has a
    run, or the list has too few left.
    """
    hold_study(session, study.id)
    trial = session.scalar(select(TrialRow).where(TrialRow.study_id == study.id, TrialRow.number == number))
    if trial is None:
        raise no_trial(session, study.id, number)
    if trial.state != TrialState.COMPLETE:
        raise IllegalMove(f"trial {number}", trial.state, "take further seeds", (TrialState.COMPLETE,))
    taken = set(session.scalars(select(RunRow.seed).where(RunRow.trial_id == trial.id, RunRow.rung == 0)))
    for place, seed in enumerate(named):
        if seed in taken:
            raise Conflict(f"seeds.{place}", seed, f"has a run of trial {number} already")
        taken.add(seed)
    listed = (study.definition.replication or ReplicationConfig()).seeds
    left = [seed for seed in listed if seed not in taken]
    if count > len(left):
        raise Conflict("count", count, f"asks for more than the {len(left)} left of the study's {len(listed)} seeds")
    runs = []
    for seed in (*named, *left[:count]):
        run = add_seed(session, study.id, trial.id, seed, now, origin="submitted", why="it was asked for")
        assert run is not None, "the study is held, and the seed is free"
        runs.append(run)
    return tuple(runs)


def cancel_seed(session: Session, study_id: int, number: int, run_id: int, now: datetime) -> Run:
    """End an open run of a complete trial, and its open attempt; whoever holds a lease on it has lost it.

    Raises NotFound, and IllegalMove for a run that is finished, or whose trial still depends on it.
    """
    hold_study(session, study_id)
    found = session.execute(
        select(RunRow, TrialRow.state).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.study_id == study_id, TrialRow.number == number, RunRow.id == run_id)
    ).one_or_none()  # fmt: skip
    if found is None:
        raise NotFound(f"run of trial {number}", run_id)
    if found[1] != TrialState.COMPLETE:
        raise IllegalMove(f"trial {number}", found[1], "lose a run: cancel the trial", (TrialState.COMPLETE,))
    cancelled = session.scalar(
        update(RUNS).where(RUNS.c.id == run_id, RUNS.c.state.in_(OPEN_RUNS))
        .values(state=RunState.CANCELLED).returning(RUNS.c.seed)
    )  # fmt: skip
    if cancelled is None:
        raise IllegalMove(f"run {run_id}", found[0].state, "be cancelled", ("queued", "running"))
    session.execute(
        update(AttemptRow).where(AttemptRow.run_id == run_id, AttemptRow.outcome.is_(None)).values(
            outcome=Outcome.STOPPED, reason="cancelled", finished_at=now, lease_token=None, lease_expires_at=None
        )
    )  # fmt: skip
    add_event(session, study_id, number, "run.cancelled", f"Trial {number} at seed {cancelled} was cancelled", now)
    return replace(run_of(found[0]), state=RunState.CANCELLED)


def find_seed(session: Session, study_id: int, key: str) -> Run | None:
    """The run that a submission under this idempotency key asked for, where its trial was there already."""
    query = select(RunRow).join(TrialRow, TrialRow.id == RunRow.trial_id)
    row = session.scalar(query.where(TrialRow.study_id == study_id, RunRow.idempotency_key == key))
    return None if row is None else run_of(row)


def number_of(session: Session, run: Run) -> int:
    """The number of the run's trial."""
    return session.scalars(select(TrialRow.number).where(TrialRow.id == run.trial_id)).one()


def list_declared(session: Session, study_id: int) -> tuple[int, ...]:
    """The numbers of the study's declared trials, in that order. A trial is declared by its second seed: before anyone
    can have seen what that scores."""
    query = (
        select(TrialRow.number).join(RunRow, RunRow.trial_id == TrialRow.id).order_by(RunRow.id)
        .where(TrialRow.study_id == study_id, RunRow.rung == 0)
    )  # fmt: skip
    screened: set[int] = set()
    declared: dict[int, None] = {}
    for trial in session.scalars(query):
        if trial in screened:
            declared.setdefault(trial)
        screened.add(trial)
    return tuple(declared)


def progress_mark(session: Session, study_id: int) -> tuple[int, int]:
    """Another one whenever a run of the study has ended or was added, and no other run came or went between."""
    last = session.scalar(select(func.max(RUNS.c.id))) or 0
    return last, count_open_runs(session, study_id)
