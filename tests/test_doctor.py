"""What does not belong is found, and cleared only where that loses nothing: on SQLite and PostgreSQL."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from claims import NewTrials, Results
from sqlalchemy import select, update

from api.doctor import UNASKED, run_doctor
from orchestrator import leases, store
from orchestrator.artifacts import PARTIAL, ArtifactStore
from orchestrator.database import Database
from orchestrator.doctor import SETTLED, Finding, Kind, clear, examine
from orchestrator.lifecycle import Outcome, RunState, TrialState
from orchestrator.settings import Settings
from orchestrator.study import Artifact, AttemptResult, Claim, Study
from orchestrator.tables import RunRow, StudyRow
from worker.spec import GangConfig

TTL = timedelta(seconds=20)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def claim(database: Database, study: Study, new_trial: NewTrials) -> Callable[[datetime], Claim]:
    """Adds a trial, and claims it at a moment."""

    def run(at: datetime) -> Claim:
        with database.write() as session:
            store.add_trial(session, study.id, new_trial(), at)
            claimed = leases.claim(session, GangConfig(), "host-7", at, TTL)
        assert claimed is not None
        return claimed

    return run


@pytest.fixture
def keep(
    database: Database, artifacts: ArtifactStore, claim: Callable[[datetime], Claim], now: datetime,
    trial_result: Results,
) -> Callable[[bytes], Artifact]:  # fmt: skip
    """Completes a trial with this artifact, put days ago."""

    def run(data: bytes) -> Artifact:
        artifact = aged(artifacts, data, now - timedelta(days=3))
        ended = AttemptResult(Outcome.SUCCEEDED, result=trial_result(), artifact=artifact)
        held = claim(now)
        with database.write() as session:
            leases.finish(session, held.lease, ended, now)
        return artifact

    return run


def aged(artifacts: ArtifactStore, data: bytes, at: datetime) -> Artifact:
    """An artifact put at this moment."""
    artifact = artifacts.put(data)
    os.utime(artifacts.path(artifact), (at.timestamp(), at.timestamp()))
    return artifact


def kinds(findings: list[Finding]) -> list[Kind]:
    return [finding.kind for finding in findings]


def states(database: Database, study: Study, number: int) -> tuple[TrialState, list[RunState]]:
    with database.read() as session:
        trial = store.get_trial(session, study.id, number)
        return trial.state, [run.state for run in store.list_runs(session, trial.id)]


def test_nothing_is_wrong_with_a_sweep_that_runs(
    database: Database, artifacts: ArtifactStore, study: Study, now: datetime,
    keep: Callable[[bytes], Artifact], claim: Callable[[datetime], Claim], new_trial: NewTrials,
) -> None:  # fmt: skip
    keep(b"one")
    keep(b"one")
    claim(now)
    claim(now - SETTLED)  # its lease ran out less than an hour ago: its orchestrator may yet return
    with database.write() as session:
        store.add_trial(session, study.id, new_trial(), now)
    aged(artifacts, b"its row is on the way", now - SETTLED)
    (artifacts.root / "notes.txt").write_text("not ours")
    (artifacts.root / "sha256" / "ab").mkdir()
    (artifacts.root / "sha256" / "ab" / "notes.txt").write_text("not ours")
    assert examine(database, artifacts, now) == []
    assert clear(database, artifacts, [], now) == ([], [])
    assert states(database, study, 3) == (TrialState.RUNNING, [RunState.RUNNING])


def test_an_empty_database_without_a_folder_has_nothing_wrong(
    database: Database, artifacts: ArtifactStore, now: datetime
) -> None:
    assert examine(database, artifacts, now) == []


def test_files_without_a_row_are_deleted_once_they_are_an_hour_old(
    database: Database, artifacts: ArtifactStore, now: datetime, keep: Callable[[bytes], Artifact]
) -> None:
    kept = keep(b"kept")
    late = now - SETTLED - MINUTE
    stray = aged(artifacts, b"stray", late)
    partial = artifacts.path(kept).with_name(f"{PARTIAL}xyz")
    partial.write_bytes(b"half")
    os.utime(partial, (late.timestamp(), late.timestamp()))
    found = examine(database, artifacts, now)
    assert sorted(kinds(found)) == [Kind.STRAY_ARTIFACT, Kind.UNFINISHED_FILE]
    assert {finding.where for finding in found} == {stray.uri, partial.relative_to(artifacts.root).as_posix()}
    cleared, remaining = clear(database, artifacts, found, now)
    assert (sorted(kinds(cleared)), remaining) == (sorted(kinds(found)), [])
    assert [file.uri for file in artifacts.files()] == [kept.uri]
    assert clear(database, artifacts, found, now) == (cleared, [])  # again: they are gone


def test_an_artifact_put_again_since_it_was_found_stays(
    database: Database, artifacts: ArtifactStore, now: datetime, keep: Callable[[bytes], Artifact]
) -> None:
    keep(b"kept")
    stray = aged(artifacts, b"stray", now - timedelta(days=1))
    (finding,) = examine(database, artifacts, now)
    aged(artifacts, b"stray", now)
    assert clear(database, artifacts, [finding], now) == ([], [finding])
    assert artifacts.get(stray) == b"stray"


def test_a_folder_of_which_the_database_names_no_file_is_not_cleared(
    database: Database, artifacts: ArtifactStore, now: datetime
) -> None:
    another = aged(artifacts, b"another database's", now - timedelta(days=1))
    (finding,) = examine(database, artifacts, now)
    assert (finding.kind, finding.remedy) == (Kind.STRAY_ARTIFACT, None)
    assert clear(database, artifacts, [finding], now) == ([], [finding])
    assert artifacts.get(another) == b"another database's"


@pytest.mark.parametrize("damage", ["missing", "changed", "unreadable"])
def test_a_row_whose_artifact_is_damaged_is_listed_and_kept(
    database: Database, artifacts: ArtifactStore, now: datetime, keep: Callable[[bytes], Artifact], damage: str
) -> None:
    keep(b"whole")
    path = artifacts.path(keep(b"weights"))
    path.unlink()
    if damage == "changed":
        path.write_bytes(b"weightz")
    elif damage == "unreadable":
        path.mkdir()
    (finding,) = found = examine(database, artifacts, now)
    assert (finding.kind, finding.remedy) == (Kind.DAMAGED_ARTIFACT, None)
    assert finding.where == "attempt 2, trial 1 of sharing"
    assert path.name in finding.what
    assert clear(database, artifacts, found, now) == ([], [finding])
    assert examine(database, artifacts, now) == [finding]


def test_an_attempt_whose_lease_ran_out_long_ago_is_ended_and_its_run_queued_again(
    database: Database, artifacts: ArtifactStore, study: Study, now: datetime, claim: Callable[[datetime], Claim]
) -> None:
    held = claim(now - timedelta(hours=2))
    (finding,) = found = examine(database, artifacts, now)
    assert (finding.kind, finding.where) == (Kind.OVERDUE_LEASE, "attempt 1, trial 0 of sharing")
    assert finding.what == "held by host-7 until 2026-03-01 10:00 UTC"
    assert clear(database, artifacts, found, now) == (found, [])
    assert states(database, study, 0) == (TrialState.QUEUED, [RunState.QUEUED])
    with database.read() as session:
        (attempt,) = store.list_attempts(session, held.trial_id)
    assert (attempt.outcome, attempt.finished_at) == (Outcome.LOST, now)


def test_runs_queued_in_a_stopped_study_are_cancelled(
    database: Database, artifacts: ArtifactStore, study: Study, now: datetime,
    claim: Callable[[datetime], Claim], new_trial: NewTrials,
) -> None:  # fmt: skip
    running = claim(now)
    with database.write() as session:
        store.add_trial(session, study.id, new_trial(), now)
        first = session.scalars(select(RunRow).where(RunRow.trial_id == running.trial_id)).one()
        another = {"trial_id": first.trial_id, "seed": first.seed + 1, "budget": first.budget, "state": "queued"}
        session.add(RunRow(**another, ranks=1, device="cpu", created_at=now))
        session.execute(update(StudyRow).values(state="stopped"))
    found = examine(database, artifacts, now)
    assert kinds(found) == [Kind.STOPPED_RUN] * 2
    assert [finding.where for finding in found] == ["trial 1 of sharing", "trial 0 of sharing"]
    assert clear(database, artifacts, found, now) == (found, [])
    assert states(database, study, 0) == (TrialState.RUNNING, [RunState.RUNNING, RunState.CANCELLED])
    assert states(database, study, 1) == (TrialState.CANCELLED, [RunState.CANCELLED])
    assert examine(database, artifacts, now) == []


# The command


@pytest.fixture
def settings(database_url: str, artifacts: ArtifactStore, tmp_path: Path) -> Settings:
    home = {"CADDIE_HOME": str(tmp_path / "home"), "CADDIE_ARTIFACTS": str(artifacts.root)}
    return Settings.read({**home, "CADDIE_DATABASE_URL": database_url})


def test_the_doctor_exits_0_where_nothing_is_wrong_and_1_while_something_is(
    settings: Settings, artifacts: ArtifactStore, keep: Callable[[bytes], Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    lost, stray = keep(b"lost"), aged(artifacts, b"stray", datetime.fromtimestamp(0, UTC))
    keep(b"kept")
    artifacts.path(lost).unlink()

    def said(clearing: bool) -> tuple[int, list[str]]:
        code = run_doctor(settings, clearing=clearing, as_json=False)
        return code, capsys.readouterr().out.splitlines()

    missing = f"damaged artifact: attempt 1, trial 0 of sharing: artifact {lost.uri} is missing below {artifacts.root}"
    missing += "; --clear leaves it as it is"
    file = f"artifact without a row: {stray.uri}: 5 bytes, put at 1970-01-01 00:00 UTC"
    sums = "2 found: 1 × damaged artifact, 1 × artifact without a row"
    assert said(clearing=False) == (1, [UNASKED, missing, f"{file}; --clear deletes it", sums])
    after = "1 found after 1 were cleared: 1 × damaged artifact"
    assert said(clearing=True) == (1, [UNASKED, f"cleared: {file}", missing, after])
    artifacts.put(b"lost")
    assert said(clearing=True) == (0, [UNASKED, "nothing is wrong in the database and the artifacts"])


def test_the_doctor_speaks_json(
    settings: Settings, keep: Callable[[bytes], Artifact], artifacts: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(b"kept")
    stray = aged(artifacts, b"stray", datetime.fromtimestamp(0, UTC))
    assert run_doctor(settings, clearing=True, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    (cleared,) = answer["cleared"]
    assert (cleared["kind"], cleared["where"], cleared["remedy"]) == ("artifact without a row", stray.uri, "deletes it")
    assert (answer["remaining"], answer["ray"]) == ([], UNASKED)


def test_the_doctor_says_that_a_ray_cluster_does_not_answer_and_exits_1(
    settings: Settings, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.socket()) as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert run_doctor(replace(settings, ray_address=address), clearing=True, as_json=False) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Ray was not asked for its gangs: {address}: ")
    assert others == ["nothing is wrong in the database and the artifacts"]


def test_the_doctor_does_not_touch_a_database_of_another_version(
    empty_database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.read({"CADDIE_HOME": str(tmp_path), "CADDIE_DATABASE_URL": empty_database_url})
    assert run_doctor(settings, clearing=True, as_json=False) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "caddie migrate" in said.err
