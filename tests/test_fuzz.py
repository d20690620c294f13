"""Whatever is sent, the API answers as it declares, and what it keeps agrees with itself afterwards."""

import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from fuzzing import DOOMED, STUDY, TOKEN, configuration, fuzz
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session
from sweep import Sweep, result_of

from api.admission import Door
from api.app import create_app
from orchestrator import labels, store
from orchestrator.database import Database
from orchestrator.doctor import Kind, examine
from orchestrator.lifecycle import OPEN_TRIALS, Outcome, RunState, TrialState
from orchestrator.logs import add_lines
from orchestrator.study import Study, Trial
from orchestrator.tables import EventRow, StudyRow
from orchestrator.tokens import digest
from worker.report import LogLine
from worker.spec import parse_spec

RUN_STATES = {
    TrialState.QUEUED: {RunState.QUEUED},
    TrialState.RUNNING: {RunState.QUEUED, RunState.RUNNING},
    TrialState.COMPLETE: set(RunState),  # its replicates go their own ways
    TrialState.PRUNED: {RunState.STOPPED, RunState.CANCELLED},
    TrialState.FAILED: {RunState.FAILED, RunState.CANCELLED},
    TrialState.CANCELLED: {RunState.CANCELLED, RunState.FAILED, RunState.STOPPED, RunState.SUCCEEDED},
    TrialState.INFEASIBLE: set(),
}


def seeded(database: Database, folder: Path, name: str) -> Sweep:
    """A study with trials in every state, some of them labelled and with logs. Its lease is held now: by the clock."""
    sweep = Sweep(database, folder, datetime.now(UTC), name)
    with database.write() as session:
        for trial in store.list_trials(session, sweep.study.id)[:3]:
            labels.set_tags(session, trial.id, ["good", f"n{trial.number}"])
            labels.add_note(session, trial.id, "me", "worth another seed", sweep.now)
        lines = [LogLine(number=n, elapsed_seconds=n, line=f"step {n}") for n in range(1, 4)]
        add_lines(session, sweep.running.lease.attempt_id, lines)
    return sweep


def whole_trial(session: Session, trial: Trial) -> None:
    """A trial, its runs and its attempts say the same."""
    runs, attempts = store.list_runs(session, trial.id), store.list_attempts(session, trial.id)
    assert {run.state for run in runs} <= RUN_STATES[trial.state], (trial.number, trial.state)
    assert (trial.finished_at is None) == (trial.state in OPEN_TRIALS)
    assert trial.result is not None or trial.state is not TrialState.COMPLETE
    for run in runs:
        own = [attempt for attempt in attempts if attempt.run_id == run.id]
        outcomes = Counter(attempt.outcome for attempt in own)
        assert outcomes[None] == (run.state is RunState.RUNNING)
        assert outcomes[Outcome.SUCCEEDED] == (run.state is RunState.SUCCEEDED) or trial.origin == "imported"
        assert [attempt.number for attempt in own] == list(range(1, len(own) + 1))


def whole_study(session: Session, study: Study) -> list[int]:
    """A study's counts are those of its trials; returns their numbers."""
    trials = store.list_trials(session, study.id)
    row = session.get_one(StudyRow, study.id)
    assert [trial.number for trial in trials] == list(range(row.next_number))
    assert row.proposed == sum(trial.origin == "proposed" for trial in trials) <= row.max_trials
    for trial in trials:
        whole_trial(session, trial)
    return [trial.number for trial in trials]


def whole(database: Database, sweep: Sweep) -> dict[str, list[int]]:
    """Everything that is kept agrees with itself. Returns each study's trials."""
    with database.read() as session:
        studies = store.list_studies(session)
        numbers = {study.name: whole_study(session, study) for study in studies}
        known = {(study.id, number) for study in studies for number in [None, *numbers[study.name]]}
        said = session.execute(select(EventRow.study_id, EventRow.trial_number).distinct()).all()
        assert {(study_id, number) for study_id, number in said} <= known
        if session.get_bind().dialect.name == "sqlite":
            assert session.scalar(text("PRAGMA integrity_check")) == "ok"
            assert session.execute(text("PRAGMA foreign_key_check")).all() == []
        assert session.scalar(select(func.count()).select_from(StudyRow)) == len(studies)
    found = examine(database, sweep.artifacts, datetime.now(UTC))
    assert [one for one in found if one.kind is not Kind.OVERDUE_LEASE] == []
    return numbers


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(0)])])
def test_whatever_is_sent_the_api_answers_as_declared_and_keeps_what_it_holds_whole(
    long: bool, backend: str, database: Database, tmp_path: Path
) -> None:
    sweep, doomed = (seeded(database, tmp_path / "artifacts", name) for name in (STUDY, DOOMED))
    door = Door(admin_sha256=digest(TOKEN), requests_per_second=10**6)
    app = create_app(database, artifacts=sweep.artifacts.root, dashboard=False, door=door)
    result = result_of(parse_spec(sweep.study.definition.base), random.Random(1)).model_dump(mode="json")
    # The systematic cases take the most time, and PostgreSQL refuses more than SQLite does: there a third has them.
    paths = [] if long else sorted(app.openapi()["paths"])
    share = 2 * len(paths) // 3 if backend == "postgresql" else len(paths)
    drawn = random.Random(None if long else 1).sample(paths, share)
    config = configuration(200 if long else 4, drawn=drawn, linked=long or backend == "sqlite", dice=long)

    wrong, statuses = fuzz(app, config, result, sweep.running.lease, doomed.running.lease)

    assert not wrong, "\n\n".join(wrong)
    documented = {f"{m.upper()} {path}" for path, methods in app.openapi()["paths"].items() for m in methods}
    assert set(statuses) == documented
    numbers = whole(database, sweep)
    with TestClient(app) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        for study, trials in numbers.items():
            for path in (f"/studies/{study}", *(f"/studies/{study}/trials/{number}" for number in trials)):
                for place in (f"/v1{path}", path):
                    assert client.get(place).status_code == 200, place
        for place in ("/", "/v1/studies?limit=500", "/v1/audit?limit=500", "/v1/cluster", "/cluster"):
            assert client.get(place).status_code == 200, place
        assert client.get("/v1/openapi.json").json() == app.openapi()
