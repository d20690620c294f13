"""Ask and tell over HTTP: executors that are not Ray, on SQLite and PostgreSQL, under leases that hold."""

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from claims import NewStudies, Results
from relay import Relay, canned
from sqlalchemy import select, update

from api.client import ApiError, Caddie
from api.desk import AskOut, LogLineIn, MeasurementIn, ReportIn, TellIn
from api.work import execute, work
from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.curves import list_measurements
from orchestrator.database import Database
from orchestrator.doctor import examine
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.local_launcher import LocalLauncher
from orchestrator.logs import list_lines
from orchestrator.study import Study
from orchestrator.tables import ATTEMPTS, AuditRow
from worker.inventory import count_parameters
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.spec import GangConfig, TrialSpec, override

MODEL = b"the model"
TINY = {
    "model.width": 32, "model.heads": 2, "model.kv_heads": 1, "model.vocab_size": 512,
    "data.dataset": "topics_sp512", "data.sequence_length": 32, "data.batch_tokens": 256, "budget.steps": 4,
    "evaluation.validations": 1, "evaluation.validation_tokens": 512,
}  # fmt: skip


@pytest.fixture
def create(database: Database, new_study: NewStudies) -> Callable[..., Study]:
    def run(**fields: Any) -> Study:
        base = override(load_recipe("laptop"), {"data.dataset": "count", "budget.steps": 3})
        with database.write() as session:
            return store.create_study(session, new_study(**{"base": base, "max_trials": 2, **fields}), _now())

    return run


@pytest.fixture
def address(database: Database, serve: Callable[..., str], tmp_path: Path) -> str:
    return serve(database, dashboard=False, artifacts=tmp_path / "artifacts")


@pytest.fixture
def caddie(address: str) -> Iterator[Caddie]:
    with Caddie(address) as caddie:
        yield caddie


def _now() -> datetime:
    return datetime.now(UTC)


def result_for(spec: TrialSpec, build: Results, **fields: Any) -> TrialResult:
    parameters = count_parameters(spec.model, spec.sharing)
    own = {"model_bytes": len(MODEL), "code_bytes": 100, "artifact_bytes": len(MODEL) + 100}
    return build(parameters=parameters, artifact_sha256=hashlib.sha256(MODEL).hexdigest(), **{**own, **fields})


def asked_by(caddie: Caddie, name: str = "lab", **options: Any) -> AskOut:
    asked = caddie.ask("sharing", name, **options)
    assert asked is not None
    return asked


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(ApiError) as refused:
        call()
    return refused.value.status, refused.value.kind


def test_an_executor_without_ray_or_database_drains_a_study(
    backend: str,
    caddie: Caddie,
    create: Callable[..., Study],
    database: Database,
    small_data_root: Path,
    tmp_path: Path,
) -> None:
    trials_wanted = 2 if backend == "sqlite" else 1  # each starts the real worker
    study = create(max_trials=trials_wanted, base=override(load_recipe("laptop"), TINY))
    launcher = LocalLauncher(tmp_path / "gangs", small_data_root, 1)
    try:
        assert work(caddie, "sharing", launcher, "lab", None) == trials_wanted
    finally:
        launcher.close()
    with database.read() as session:
        assert store.get_study(session, "sharing").state is StudyState.COMPLETE
        trials = store.list_trials(session, study.id)
        assert [trial.state for trial in trials] == [TrialState.COMPLETE] * trials_wanted
        attempts = [store.list_attempts(session, trial.id)[0] for trial in trials]
        measured = [len(list_measurements(session, trial.id)) for trial in trials]
        logged = [list_lines(session, trial.id)[0].said.line.split(":")[0] for trial in trials]
        audits = session.scalars(select(AuditRow.action).order_by(AuditRow.id)).all()
    assert {(attempt.owner, attempt.gang) for attempt in attempts} == {("executor:lab", "lab")}
    assert all(attempt.artifact is not None and "train" in attempt.phase_seconds for attempt in attempts)
    assert (measured, logged) == ([4] * trials_wanted, ["data"] * trials_wanted)
    assert audits == ["executor.ask", "executor.artifact", "executor.tell"] * trials_wanted
    assert caddie.artifact("sharing", 0)


@pytest.fixture
def launcher(small_data_root: Path, tmp_path: Path) -> Iterator[LocalLauncher]:
    launcher = LocalLauncher(tmp_path / "gangs", small_data_root, 1)
    yield launcher
    launcher.close()


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # what is between is no matter of the database
def test_an_executor_keeps_what_it_trained_while_the_server_is_away(
    address: str, caddie: Caddie, create: Callable[..., Study], launcher: LocalLauncher
) -> None:
    create(max_trials=1, base=override(load_recipe("laptop"), TINY))
    asked = asked_by(caddie)
    with (
        Relay(address, canned=(canned("500 Internal Server Error"),) * 2, cuts=(0,) * 5) as relay,
        Caddie(relay.url) as far,
    ):
        execute(far, asked, launcher, "lab", 60.0)
    assert caddie.trial("sharing", asked.trial).state is TrialState.COMPLETE


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_executor_that_is_not_let_in_hands_its_run_back_and_ends(
    address: str, caddie: Caddie, create: Callable[..., Study], launcher: LocalLauncher
) -> None:
    create(max_trials=1, base=override(load_recipe("laptop"), TINY))
    asked = asked_by(caddie)
    with (
        Relay(address, canned=(canned("401 Unauthorized"),)) as relay,
        Caddie(relay.url) as far,
        pytest.raises(ApiError),
    ):
        execute(far, asked, launcher, "lab", 60.0)
    assert asked_by(caddie).run_id == asked.run_id


def test_two_askers_never_get_the_same_run_and_a_study_without_more_answers_nothing(
    caddie: Caddie, create: Callable[..., Study]
) -> None:
    create(max_trials=4)
    given: list[AskOut | None] = []
    askers = [threading.Thread(target=lambda: given.append(caddie.ask("sharing", "lab"))) for _ in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    runs = [asked.run_id for asked in given if asked is not None]
    assert len(runs) == len(set(runs)) == 4
    assert caddie.ask("sharing", "lab", gang=GangConfig(ranks=8)) is None
    assert refusal(lambda: caddie.ask("no-such", "lab")) == (404, "not-found")


def test_a_report_sent_again_is_kept_once(caddie: Caddie, create: Callable[..., Study], database: Database) -> None:
    create()
    asked = asked_by(caddie)
    said = ReportIn(
        phase="train", measurements=[MeasurementIn(number=1, step=1, elapsed_seconds=0.1, metrics={"train_loss": 2.0})],
        lines=[LogLineIn(number=1, elapsed_seconds=0.1, line="step 1")],
    )  # fmt: skip
    for _ in range(2):
        assert caddie.report(asked, said).directive == "continue"
    with database.read() as session:
        trial = store.get_trial(session, store.get_study(session, "sharing").id, asked.trial)
        assert len(list_measurements(session, trial.id)) == len(list_lines(session, trial.id)) == 1
        assert store.list_attempts(session, trial.id)[0].phase == "train"


def test_a_success_is_told_after_its_artifact_and_again_with_the_same_answer(
    caddie: Caddie, create: Callable[..., Study], trial_result: Results
) -> None:
    create()
    asked = asked_by(caddie)
    end = TellIn(outcome="succeeded", reason="trained", result=result_for(asked.spec, trial_result))
    assert refusal(lambda: caddie.tell(asked, end)) == (422, "invalid-input")
    for _ in range(2):
        assert caddie.put_artifact(asked, MODEL).bytes == len(MODEL)
    other = end.model_copy(update={"result": result_for(asked.spec, trial_result, val_bpb=-1.0)})
    assert refusal(lambda: caddie.tell(asked, other)) == (422, "invalid-input")
    told = caddie.tell(asked, end)
    assert told.outcome is Outcome.SUCCEEDED
    assert caddie.tell(asked, end) == told
    assert caddie.tell(asked, TellIn(outcome="failed", reason="no, after all")) == told
    assert refusal(lambda: caddie.report(asked)) == (409, "lease-lost")
    assert refusal(lambda: caddie.put_artifact(asked, MODEL)) == (409, "lease-lost")
    assert caddie.artifact("sharing", asked.trial) == MODEL


def test_a_lost_lease_answers_409_everywhere_and_changes_nothing(
    caddie: Caddie, create: Callable[..., Study], database: Database, trial_result: Results
) -> None:
    create()
    asked = asked_by(caddie)
    caddie.cancel("sharing", asked.trial)
    end = TellIn(outcome="succeeded", result=result_for(asked.spec, trial_result))
    said = ReportIn(lines=[LogLineIn(number=1, elapsed_seconds=0.1, line="still here")])
    stranger = asked.model_copy(update={"lease_token": "0" * 32})
    for held in (asked, stranger, asked.model_copy(update={"attempt_id": 999})):
        for call in (
            lambda held=held: caddie.report(held, said), lambda held=held: caddie.tell(held, end),
            lambda held=held: caddie.put_artifact(held, MODEL),
        ):  # fmt: skip
            assert refusal(call) == (409, "lease-lost")
    trial = caddie.trial("sharing", asked.trial)
    assert trial.state is TrialState.CANCELLED
    assert caddie.logs("sharing", asked.trial) == []


def test_a_run_whose_executor_has_gone_is_asked_for_again(
    caddie: Caddie, create: Callable[..., Study], database: Database, tmp_path: Path
) -> None:
    create(max_trials=1)
    asked = asked_by(caddie, "gone")
    assert examine(database, ArtifactStore(tmp_path / "artifacts"), _now()) == []
    with database.write() as session:
        assert leases.resume(session, "host", _now(), timedelta(minutes=1)) == [], "no orchestrator takes it over"
        session.execute(update(ATTEMPTS).values(lease_expires_at=_now() - timedelta(minutes=1)))
    again = asked_by(caddie, "next")
    assert (again.run_id, again.attempt_id != asked.attempt_id) == (asked.run_id, True)
    assert refusal(lambda: caddie.report(asked)) == (409, "lease-lost")


def test_a_failure_and_a_preemption_go_back_to_the_queue_and_the_first_counts(
    caddie: Caddie, create: Callable[..., Study], database: Database
) -> None:
    create(max_trials=1)
    asked = asked_by(caddie)
    caddie.tell(asked, TellIn(outcome="preempted", reason="the machine is needed"))
    asked = asked_by(caddie)
    caddie.tell(asked, TellIn(outcome="failed", reason="no luck", cause=Cause.DIVERGED, traceback="line 3"))
    trial = caddie.trial("sharing", asked.trial)
    assert [attempt.outcome for attempt in trial.runs[0].attempts] == [Outcome.PREEMPTED, Outcome.FAILED]
    assert (trial.state, trial.runs[0].state) == (TrialState.FAILED, RunState.FAILED)
    assert [said.line for said in caddie.logs("sharing", asked.trial)] == ["line 3", "failed: no luck"]


def test_an_attempt_that_the_studys_rule_stops_is_told_so_until_it_ends(
    caddie: Caddie, create: Callable[..., Study], trial_result: Results
) -> None:
    create(max_trials=3, stopping={"rule": "median", "min_runs": 2, "after_fraction": 0.1, "spare": 1e-9})

    def curve(*scores: float) -> ReportIn:
        said = [
            MeasurementIn(number=n, step=n, elapsed_seconds=n, metrics={"val_bpb": score, "fraction": n / 10})
            for n, score in enumerate(scores, 1)
        ]
        return ReportIn(phase="train", measurements=said)

    for _ in range(2):
        asked = asked_by(caddie)
        assert caddie.report(asked, curve(3.0, 2.5)).directive == "continue"
        caddie.put_artifact(asked, MODEL)
        caddie.tell(asked, TellIn(outcome="succeeded", result=result_for(asked.spec, trial_result)))
    hopeless = asked_by(caddie)
    assert caddie.report(hopeless, curve(9.0, 8.5)).directive == "stop"
    assert caddie.report(hopeless).directive == "stop"
    told = caddie.tell(hopeless, TellIn(outcome="stopped"))
    assert (told.outcome, told.reason.split(":")[0]) == (Outcome.STOPPED, "median")
    assert caddie.trial("sharing", hopeless.trial).state is TrialState.PRUNED


def test_an_artifact_that_is_not_what_its_digest_says_is_not_stored(
    caddie: Caddie, create: Callable[..., Study], database: Database, tmp_path: Path, serve: Callable[..., str]
) -> None:
    create()
    asked = asked_by(caddie)
    url = (
        f"{serve(database, dashboard=False, artifacts=tmp_path / 'artifacts')}/v1/attempts/{asked.attempt_id}/artifact"
    )
    lease = {"Caddie-Lease": asked.lease_token}
    other = base64.b64encode(hashlib.sha256(b"another").digest()).decode()
    for header in ({}, {"Repr-Digest": "sha-256=:x:"}, {"Content-Digest": f"sha-256=:{other}:"}):
        refused = httpx.put(url, content=MODEL, headers={**lease, **header})
        assert (refused.status_code, refused.json()["problems"][0]["field"] != "") == (422, True)
    assert httpx.put(url, content=MODEL).status_code == 422, "no lease at all"
    assert [*ArtifactStore(tmp_path / "artifacts").files()] == []


def test_no_orchestrator_may_have_an_executors_name(database: Database) -> None:
    from orchestrator.settings import Settings
    from worker.shape import FieldError

    with pytest.raises(FieldError, match="CADDIE_OWNER"):
        Settings.read({"CADDIE_OWNER": "executor:lab"})


def test_an_ask_over_the_budget_proposes_once_and_goes_on_when_a_run_has_ended(
    caddie: Caddie, create: Callable[..., Study], trial_result: Results
) -> None:
    create(max_trials=20, spending={"gpu_hours": 1})
    first = asked_by(caddie)
    for _ in range(3):
        assert caddie.ask("sharing", "lab") is None, "the first of its kind runs alone"
        study = caddie.study("sharing")
        assert (study.state, study.proposed) == ("running", 2)
    caddie.put_artifact(first, MODEL)
    caddie.tell(first, TellIn(outcome="succeeded", result=result_for(first.spec, trial_result)))
    assert asked_by(caddie).trial == 1
